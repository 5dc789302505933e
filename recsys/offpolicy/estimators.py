"""Estimators of a policy's value from feedback that another policy logged.

An estimator is its config; `terms(evidence)` gives numbers per request from which its value, its influence function and
its bootstrap follow. w is the target's over the log's probability of what was shown, r its reward, q̂ a reward model. On
slates the action is the whole slate and r its sum, so `ips` and `snips` are there what the literature calls standard
(or trajectory) importance sampling; `recsys.offpolicy.slates` has estimators that use the positions.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from recsys.data.schema import DataError
from recsys.loading import Config
from recsys.offpolicy.evidence import Evidence
from recsys.offpolicy.intervals import Interval, smoothing_bound

Column = Float64[np.ndarray, " requests"]


@dataclass(frozen=True)
class Terms:
    """A value as mean(added) + Σ_c Σ_i numerator[i, c] / Σ_i denominator[i, c]."""

    weights: Float64[np.ndarray, "requests columns"]
    """Importance weights that it rests on, before any shrinking: what the diagnostics judge."""
    added: Column
    numerator: Float64[np.ndarray, "requests ratios"]
    denominator: Float64[np.ndarray, "requests ratios"]
    biased: str | None = None
    """Why an interval around the value would not cover the truth; None if the estimator is consistent."""
    assumes: str | None = None
    """What the user must believe about users for that to hold."""
    bound: Interval | None = None
    """An interval that is valid although the value is biased."""

    @property
    def value(self) -> float:
        """Raises DataError where nothing that was logged could come from the target policy."""
        total = self.denominator.sum(0)
        if (total == 0).any():
            raise DataError("the target policy would show nothing of what was logged: nothing can be estimated")
        return float(self.added.mean() + (self.numerator.sum(0) / total).sum())

    @property
    def influence(self) -> Column:
        """Per request, with the value as its mean: the linear part of the estimator, whose spread is its error."""
        total = self.denominator.sum(0)
        ratio = self.numerator.sum(0) / total
        n = len(self.added)
        return self.added + ((self.numerator - ratio * self.denominator) * n / total).sum(1) + ratio.sum()


def mean_terms(
    weights: Float64[np.ndarray, "requests columns"],
    values: Column,
    biased: str | None = None,
    assumes: str | None = None,
    bound: Interval | None = None,
) -> Terms:
    """The mean of a number per request."""
    none = np.empty((len(values), 0))
    return Terms(weights, values, none, none, biased, assumes, bound)


class IPS(Config):
    """n⁻¹ Σ w r: unbiased, and at the mercy of large weights (Horvitz and Thompson 1952)."""

    name: Literal["ips"] = "ips"

    def terms(self, evidence: Evidence) -> Terms:
        return mean_terms(_weights(evidence), evidence.weights * evidence.total)


class SNIPS(Config):
    """Σ w r / Σ w (Swaminathan and Joachims 2015): consistent, inside the range of the rewards."""

    name: Literal["snips"] = "snips"

    def terms(self, evidence: Evidence) -> Terms:
        w = _weights(evidence)
        return Terms(w, np.zeros(len(w)), w * evidence.total[:, None], w)


class DirectMethod(Config):
    """n⁻¹ Σ_i Σ_a π(a|x_i) q̂(x_i, a): the reward model's word for it."""

    name: Literal["dm"] = "dm"

    def terms(self, evidence: Evidence) -> Terms:
        direct, _ = _model(evidence, self.name)
        reason = "its error is the reward model's, and no amount of feedback makes that smaller"
        return mean_terms(_weights(evidence), direct[:, 0].copy(), reason)


class DoublyRobust(Config):
    """DM + n⁻¹ Σ w (r - q̂) (Dudík et al. 2011), for slates of one item (`cascade_dr` for longer ones)."""

    name: Literal["dr"] = "dr"

    def terms(self, evidence: Evidence) -> Terms:
        direct, residual = _corrected(evidence, self.name)
        return mean_terms(_weights(evidence), direct + evidence.weights * residual)


class SNDR(Config):
    """DM + Σ w (r - q̂) / Σ w."""

    name: Literal["sndr"] = "sndr"

    def terms(self, evidence: Evidence) -> Terms:
        direct, residual = _corrected(evidence, self.name)
        w = _weights(evidence)
        return Terms(w, direct, w * residual[:, None], w)


class SwitchDR(Config):
    """DR that trusts the reward model alone where w exceeds the threshold (Wang et al. 2017)."""

    name: Literal["switch_dr"] = "switch_dr"
    threshold: float = Field(10.0, gt=0)

    def terms(self, evidence: Evidence) -> Terms:
        direct, residual = _corrected(evidence, self.name)
        w = evidence.weights
        kept = np.where(w <= self.threshold, w, 0.0)
        reason = f"weights above {self.threshold:g} are dropped, and the reward model's error there stays"
        return mean_terms(_weights(evidence), direct + kept * residual, reason)


class ShrunkDR(Config):
    """DR with weights λ w / (w² + λ), the optimistic shrinkage of Su et al. (2020)."""

    name: Literal["dr_os"] = "dr_os"
    shrinkage: float = Field(10.0, gt=0)

    def terms(self, evidence: Evidence) -> Terms:
        direct, residual = _corrected(evidence, self.name)
        w = evidence.weights
        with np.errstate(over="ignore"):
            shrunk = self.shrinkage * w / (w**2 + self.shrinkage)
        reason = "its weights are shrunk, all of them, and more feedback does not undo that"
        return mean_terms(_weights(evidence), direct + shrunk * residual, reason)


class SubGaussian(Config):
    """IPS with weights w / (1 - λ + λ w), the harmonic correction of Metelli et al. (2021)."""

    name: Literal["sub_gaussian"] = "sub_gaussian"
    shrinkage: float = Field(0.1, ge=0, le=1)

    def terms(self, evidence: Evidence) -> Terms:
        w = evidence.weights
        shrunk = w / (1 - self.shrinkage + self.shrinkage * w)
        reason = "its weights are shrunk towards 1, which is a bias that stays"
        return mean_terms(_weights(evidence), shrunk * evidence.total, reason)


class ClippedIPS(Config):
    """IPS with weights min(w, cap) (Ionides 2008; Bottou et al. 2013)."""

    name: Literal["clipped"] = "clipped"
    cap: float = Field(10.0, gt=0)

    def terms(self, evidence: Evidence) -> Terms:
        reason = f"weights are cut at {self.cap:g}, and what the cut takes away is not in the value"
        return mean_terms(_weights(evidence), np.minimum(evidence.weights, self.cap) * evidence.total, reason)


class ImplicitExploration(Config):
    """IPS with propensities p + γ (Gabillon et al. 2024): never above the truth in expectation, if rewards are ≥ 0."""

    name: Literal["ix"] = "ix"
    gamma: float = Field(0.1, gt=0)

    def terms(self, evidence: Evidence) -> Terms:
        target, propensity = evidence.target.prod(1), evidence.propensity.prod(1)
        reason = f"it adds {self.gamma:g} to every propensity, so that it is too low on purpose"
        return mean_terms(_weights(evidence), target / (propensity + self.gamma) * evidence.total, reason)


class LogSmoothing(Config):
    """n⁻¹ Σ λ⁻¹ log(1 + λ w r) (Sakhi et al. 2024): large terms count by their logarithm."""

    name: Literal["log_smoothing"] = "log_smoothing"
    smoothing: float = Field(0.1, gt=0)

    def terms(self, evidence: Evidence) -> Terms:
        scaled = self.smoothing * evidence.weights * evidence.total
        if scaled.min() <= -1:
            raise DataError(
                f"log_smoothing is defined while smoothing · w · r stays above -1; it falls to {scaled.min():.3g}. "
                "Lower the smoothing, or shift the rewards so that none is negative"
            )
        reason = "large terms are taken by their logarithm, so that it is too low on purpose"
        return mean_terms(_weights(evidence), np.log1p(scaled) / self.smoothing, reason)


class ExponentialSmoothing(Config):
    """IPS with weights π / π0^α (Aouali et al. 2023): a pessimistic value for learning, with a bound that holds.

    The bound needs rewards in [0, 1], slates of one, and the logging policy, so that its sums are known.
    """

    name: Literal["exp_smoothing"] = "exp_smoothing"
    alpha: float = Field(0.8, ge=0, le=1)
    delta: float = Field(0.05, gt=0, lt=1)
    """The bound holds with probability 1 - delta."""

    def terms(self, evidence: Evidence) -> Terms:
        target, propensity = evidence.target.prod(1), evidence.propensity.prod(1)
        values = target / propensity**self.alpha * evidence.total
        reason = (
            f"propensities are raised to {self.alpha:g}, so that it is too low on purpose" if self.alpha < 1 else None
        )
        bound = None
        sums = evidence.smoothed.get(self.alpha)
        independent = len(np.unique(evidence.user)) == len(values)
        in_range = evidence.total.min() >= 0 and evidence.total.max() <= 1
        if sums is not None and evidence.slots == 1 and independent and in_range:
            spread = sums.spread + target * evidence.total**2 / propensity ** (2 * self.alpha)
            bound = smoothing_bound(values, sums.overlap, spread, self.delta)
        return mean_terms(_weights(evidence), values, reason, bound=bound)


class MarginalizedIPS(Config):
    """IPS over groups of items, w = π(group) / π0(group) (Saito and Joachims 2022), for slates of one."""

    name: Literal["mips"] = "mips"

    def terms(self, evidence: Evidence) -> Terms:
        if evidence.group is None or evidence.target_group is None:
            raise DataError("mips needs the logging policy and the groups of the items; give both, or leave mips out")
        if evidence.slots > 1:
            raise DataError("mips is for requests that show one item; use independent or rips for slates")
        w = evidence.target_group / evidence.group
        assumes = "an item earns what its group earns"
        return mean_terms(w[:, None], w * evidence.total, assumes=assumes)


def _weights(evidence: Evidence) -> Float64[np.ndarray, "requests 1"]:
    return evidence.weights[:, None]


def _model(
    evidence: Evidence, name: str
) -> tuple[Float64[np.ndarray, "requests slots"], Float64[np.ndarray, "requests slots"]]:
    if evidence.direct is None or evidence.predicted is None:
        raise DataError(f"{name} needs a reward model; give one (reward_model: item_means), or leave {name} out")
    return evidence.direct, evidence.predicted


def _corrected(evidence: Evidence, name: str) -> tuple[Column, Column]:
    """The model's value and what the shown item earned above its prediction."""
    direct, predicted = _model(evidence, name)
    if evidence.slots > 1:
        raise DataError(f"{name} is for requests that show one item; use cascade_dr for slates")
    return direct[:, 0].copy(), evidence.total - predicted[:, 0]
