"""Estimators for slates, each with its idea of what a position's reward depends on.

`ips` and `snips` assume nothing and pay for it with the weight of the whole slate. The pseudo-inverse in its short form
Σ_l w_l - L + 1 is left out: it is biased for slates without replacement.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float64

from recsys.data.schema import DataError
from recsys.loading import Config
from recsys.offpolicy.estimators import Terms, mean_terms
from recsys.offpolicy.evidence import Evidence


class IndependentIPS(Config):
    """n⁻¹ Σ_i Σ_l w(item at l) r_l, with weights of each position alone (Li et al. 2018)."""

    name: Literal["independent"] = "independent"
    self_normalized: bool = False

    def terms(self, evidence: Evidence) -> Terms:
        if evidence.marginal is None or evidence.target_marginal is None:
            missing = "the log has no" if evidence.marginal is None else "ask (marginal_draws) for the target's"
            raise DataError(f"independent needs the probability of an item at its position: {missing} marginals")
        assumes = "the reward at a position depends on the item there alone"
        weights = evidence.target_marginal / evidence.marginal
        return _by_position(evidence, weights, self.self_normalized, assumes)


class RewardInteractionIPS(Config):
    """n⁻¹ Σ_i Σ_l w(items down to l) r_l (McInerney et al. 2020)."""

    name: Literal["rips"] = "rips"
    self_normalized: bool = False

    def terms(self, evidence: Evidence) -> Terms:
        return _by_position(evidence, evidence.cascade_weights, self.self_normalized, _CASCADE)


class CascadeDR(Config):
    """n⁻¹ Σ_i Σ_l [w_{1:l} (r_l - Q̂_l) + w_{1:l-1} E_π Q̂_l], Q̂_l the reward from l down (Kiyohara et al. 2022)."""

    name: Literal["cascade_dr"] = "cascade_dr"

    def terms(self, evidence: Evidence) -> Terms:
        if evidence.direct is None or evidence.predicted is None:
            raise DataError("cascade_dr needs a reward model; give one (reward_model: item_means), or leave it out")
        weights = evidence.cascade_weights
        above = np.concatenate([np.ones((len(weights), 1)), weights[:, :-1]], axis=1)
        values = weights * (evidence.reward - evidence.predicted) + above * evidence.direct
        return mean_terms(weights, values.sum(1), assumes=_CASCADE)


_CASCADE = "the reward at a position depends on the items there and above"


def _by_position(
    evidence: Evidence, weights: Float64[np.ndarray, "requests slots"], self_normalized: bool, assumes: str
) -> Terms:
    weighted = weights * evidence.reward
    assumption = assumes if evidence.slots > 1 else None
    if self_normalized:
        return Terms(weights, np.zeros(len(weights)), weighted, weights, assumes=assumption)
    return mean_terms(weights, weighted.sum(1), assumes=assumption)
