"""What a policy is trained to do on logged feedback: each objective is its config, and its loss a function of a `View`.

π is the policy that is trained, p the propensity in the log, w = π / p of what was shown, r the reward, n the requests
of a batch. An objective that weighs slates takes the probability and the reward of the whole slate; one that weighs
items takes each shown item as an action of its own, with the policy's probability of it at the top.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from recsys.data.schema import DataError
from recsys.loading import Config


@dataclass(frozen=True)
class View:
    """A batch of logged requests, seen from the policy that is trained. All in fp64."""

    slate: Float[Tensor, " batch"]
    """log π of the whole slate."""
    slate_propensity: Float[Tensor, " batch"]
    """log p of it."""
    shown: Float[Tensor, "batch slots"]
    """log π of each shown item at the top."""
    propensity: Float[Tensor, "batch slots"]
    """log p of each shown item, given those above it."""
    reward: Float[Tensor, "batch slots"]
    policy: Float[Tensor, "batch candidates"]
    """log π of every candidate at the top."""
    reference: Float[Tensor, "batch candidates"] | None = None
    """The same of the policy that the last iteration ended with; no gradient."""
    shown_reference: Float[Tensor, "batch slots"] | None = None
    model: Float[Tensor, "batch candidates"] | None = None
    """q̂ of every candidate."""
    shown_model: Float[Tensor, "batch slots"] | None = None

    @property
    def ratio(self) -> Float[Tensor, " batch"]:
        return (self.slate - self.slate_propensity).exp()

    @property
    def total(self) -> Float[Tensor, " batch"]:
        return self.reward.sum(1)


class IPSObjective(Config):
    """- mean(min(w, cap) r) + variance √(Var(min(w, cap) r) / n), counterfactual risk minimisation.

    (Swaminathan and Joachims 2015, "Batch learning from logged bandit feedback", POEM.)
    """

    name: Literal["ips"] = "ips"
    cap: float | None = Field(None, gt=0)
    """Largest weight; a request that weighs more gives no gradient. null: none."""
    variance: float = Field(0.0, ge=0)

    def loss(self, view: View) -> Float[Tensor, ""]:
        terms = _capped(view.ratio, self.cap) * view.total
        if self.variance == 0 or len(terms) < 2:
            return -terms.mean()
        # a root has no gradient at 0, which all terms alike would bring
        return -terms.mean() + self.variance * (terms.var() / len(terms) + 1e-12).sqrt()


class SNIPSObjective(Config):
    """- Σ w r / Σ w: what is shown more often than in the log must earn it (Swaminathan and Joachims 2015)."""

    name: Literal["snips"] = "snips"

    def loss(self, view: View) -> Float[Tensor, ""]:
        return -(view.ratio * view.total).sum() / view.ratio.sum()


class DRObjective(Config):
    """- mean(Σ_a π(a) q̂(a) + min(w, cap) (r - q̂)), for slates of one (Dudík et al. 2011)."""

    name: Literal["dr"] = "dr"
    cap: float | None = Field(None, gt=0)

    def loss(self, view: View) -> Float[Tensor, ""]:
        if view.reward.shape[1] > 1:
            raise DataError("dr learns from requests that show one item; use ips, snips or exp_smoothing for slates")
        model, shown_model = _model(view, self.name)
        direct = (view.policy.exp() * model).sum(1)
        return -(direct + _capped(view.ratio, self.cap) * (view.total - shown_model[:, 0])).mean()


class SmoothingObjective(Config):
    """- mean(π / p^α · r), exponential smoothing (Aouali et al. 2023): α = 1 is IPS, less is more cautious."""

    name: Literal["exp_smoothing"] = "exp_smoothing"
    alpha: float = Field(0.8, ge=0, le=1)

    def loss(self, view: View) -> Float[Tensor, ""]:
        return -((view.slate - self.alpha * view.slate_propensity).exp() * view.total).mean()


class TopKObjective(Config):
    """Top-K off-policy REINFORCE (Chen et al. 2019, arXiv:1812.02353): weighs items.

    Its gradient is - mean(min(π/p, cap) · K (1 - π)^(K-1) · r · ∇log π), the weights held fixed: an item that is sure
    to be among K drawn ones is pushed no further. K = 1 is off-policy REINFORCE.
    """

    name: Literal["topk_reinforce"] = "topk_reinforce"
    k: int = Field(5, ge=1)
    cap: float | None = Field(10.0, gt=0)

    def loss(self, view: View) -> Float[Tensor, ""]:
        fixed = view.shown.detach()
        ratio = _capped((fixed - view.propensity).exp(), self.cap)
        among = self.k * (1 - fixed.exp()) ** (self.k - 1)
        return -(ratio * among * view.reward * view.shown).mean()


class MDPOObjective(Config):
    """Mirror descent (Tomar et al. 2020, arXiv:2005.09814): - Σ_a π(a) q̂(a) + KL(π ‖ π_k) / step, over all candidates.

    π_k is the policy that the last iteration ended with (`refresh` epochs make one); the optimum of an iteration is
    π_k · exp(step · q̂), normalised.
    """

    name: Literal["mdpo"] = "mdpo"
    step: float = Field(10.0, gt=0)

    def loss(self, view: View) -> Float[Tensor, ""]:
        model, _ = _model(view, self.name)
        assert view.reference is not None
        possible = view.policy > -torch.inf
        away = (view.policy - view.reference).masked_fill(~possible, 0.0)
        return (view.policy.exp() * (away / self.step - model)).sum(1).mean()


Group = Literal["slate", "batch"]
"""What a reward is compared with: the mean of its slate, or of all that is shown in the batch."""


class OPMDObjective(Config):
    """Group-relative REINFORCE as online policy mirror descent (arXiv:2509.24203): weighs items.

    - mean((r - b) log π) + τ/2 mean((log π - log π_k)²), where π_k is the last iteration's policy and b the baseline of
    the group: the mean, or τ log mean exp(r / τ). At π_k its gradient is right whatever the log was drawn from.
    """

    name: Literal["opmd"] = "opmd"
    temperature: float = Field(1.0, gt=0)
    """τ: how dear it is to leave π_k."""
    baseline: Literal["mean", "soft"] = "mean"
    scaled: bool = False
    """Divide by 1 + τ, so that a large τ does not also mean a large step."""
    group: Group = "slate"

    def loss(self, view: View) -> Float[Tensor, ""]:
        assert view.shown_reference is not None
        if self.baseline == "mean":
            advantage = view.reward - _mean(view.reward, self.group)
        else:
            soft = view.reward / self.temperature
            dims = (1,) if self.group == "slate" else (0, 1)
            count = math.prod(soft.shape[dim] for dim in dims)
            advantage = view.reward - self.temperature * (soft.logsumexp(dims, keepdim=True) - math.log(count))
        away = (view.shown - view.shown_reference) ** 2
        loss = (self.temperature / 2 * away - advantage * view.shown).mean()
        return loss / (1 + self.temperature) if self.scaled else loss


class AsymREObjective(Config):
    """- mean((r - mean - shift) log π), asymmetric REINFORCE (see arXiv:2509.24203): weighs items.

    A shift below 0 rewards everything that the log shows: imitation of the log, as strong as the shift is large.
    """

    name: Literal["asymre"] = "asymre"
    shift: float = -0.1
    group: Group = "slate"

    def loss(self, view: View) -> Float[Tensor, ""]:
        return -((view.reward - _mean(view.reward, self.group) - self.shift) * view.shown).mean()


class ClippedGroupObjective(Config):
    """Group-relative REINFORCE on a part of the items, REC (arXiv:2509.24203): weighs items by ρ = π / p, held fixed.

    Its gradient is - mean(M · [ρ if weighted] · (r - mean) · ∇log π), with M 1 where ρ lies

    - one_side: at most 1 + high for a reward above the mean, at least 1 - low for one below (as PPO);
    - two_side: between 1 - low and 1 + high;
    - ring: there, or at most 1 - outer_low for a reward above the mean, or at least 1 + outer_high for one below;

    and else 0.
    """

    name: Literal["rec"] = "rec"
    clip: Literal["one_side", "two_side", "ring"] = "one_side"
    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(0.2, ge=0)
    outer_low: float = Field(0.6, ge=0, le=1)
    outer_high: float = Field(2.0, ge=0)
    weighted: bool = True
    group: Group = "slate"

    def loss(self, view: View) -> Float[Tensor, ""]:
        advantage = view.reward - _mean(view.reward, self.group)
        ratio = (view.shown.detach() - view.propensity).exp()
        up, down = advantage > 0, advantage < 0
        inside = (ratio >= 1 - self.low) & (ratio <= 1 + self.high)
        match self.clip:
            case "one_side":
                kept = (up & (ratio <= 1 + self.high)) | (down & (ratio >= 1 - self.low))
            case "two_side":
                kept = inside
            case "ring":
                kept = inside | (up & (ratio <= 1 - self.outer_low)) | (down & (ratio >= 1 + self.outer_high))
        weight = kept * ratio if self.weighted else kept.double()
        return -(weight * advantage * view.shown).mean()


ObjectiveConfig = Annotated[
    IPSObjective
    | SNIPSObjective
    | DRObjective
    | SmoothingObjective
    | TopKObjective
    | MDPOObjective
    | OPMDObjective
    | AsymREObjective
    | ClippedGroupObjective,
    Field(discriminator="name"),
]

BY_MODEL = (DRObjective, MDPOObjective)
"""Objectives that read a reward model."""

BY_REFERENCE = (MDPOObjective, OPMDObjective)
"""Objectives that read the policy of the last iteration."""


def _capped(ratio: Float[Tensor, " *shape"], cap: float | None) -> Float[Tensor, " *shape"]:
    return ratio if cap is None else ratio.clamp(max=cap)


def _mean(reward: Float[Tensor, "batch slots"], group: Group) -> Float[Tensor, "rows one"]:
    return reward.mean(1, keepdim=True) if group == "slate" else reward.mean()[None, None]


def _model(view: View, name: str) -> tuple[Float[Tensor, "batch candidates"], Float[Tensor, "batch slots"]]:
    if view.model is None or view.shown_model is None:
        raise DataError(f"{name} needs a reward model; give one (reward_model: {{name: item_means}})")
    return view.model, view.shown_model
