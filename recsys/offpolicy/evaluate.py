"""What a log says about a candidate policy: estimates, intervals where there is one, and whether to believe them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from recsys.loading import Config
from recsys.offpolicy.candidates import Candidate
from recsys.offpolicy.diagnostics import Diagnostics, LogQuality, diagnose, log_quality
from recsys.offpolicy.estimators import (
    IPS,
    SNDR,
    SNIPS,
    ClippedIPS,
    DirectMethod,
    DoublyRobust,
    ExponentialSmoothing,
    ImplicitExploration,
    LogSmoothing,
    MarginalizedIPS,
    ShrunkDR,
    SubGaussian,
    SwitchDR,
)
from recsys.offpolicy.evidence import Evidence, gather
from recsys.offpolicy.feedback import LOGGED, LoggedFeedback
from recsys.offpolicy.intervals import Delta, Interval, IntervalConfig, Sums
from recsys.offpolicy.rewards import ItemMeans, RewardModel
from recsys.offpolicy.slates import CascadeDR, IndependentIPS, RewardInteractionIPS
from recsys.types import Catalog

EstimatorConfig = Annotated[
    IPS
    | SNIPS
    | DirectMethod
    | DoublyRobust
    | SNDR
    | SwitchDR
    | ShrunkDR
    | SubGaussian
    | ClippedIPS
    | ImplicitExploration
    | LogSmoothing
    | ExponentialSmoothing
    | MarginalizedIPS
    | IndependentIPS
    | RewardInteractionIPS
    | CascadeDR,
    Field(discriminator="name"),
]


class EvaluateConfig(Config):
    """How candidates are evaluated."""

    estimators: tuple[EstimatorConfig, ...] = Field((IPS(), SNIPS()), min_length=1)
    interval: IntervalConfig = Delta()
    reward: dict[str, float] = Field({"click": 1.0}, min_length=1)
    """Weights of the named rewards."""
    reward_model: ItemMeans | None = None
    """For the direct and the doubly robust estimators."""
    marginal_draws: int | None = Field(None, ge=1)
    """Slates drawn per request for the target's probabilities by position, which `independent` needs."""
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """One estimator's word on one candidate."""

    estimator: str
    """Its name, with whatever of its settings is not the default."""
    domain: str | None
    """None for all requests; else those that asked for this domain."""
    value: float | None
    """None where the verdict is `do not use`: what the weights give then is not an estimate."""
    interval: Interval | None
    reason: str | None
    """Why there is no value, or no interval."""
    assumes: str | None
    diagnostics: Diagnostics


@dataclass(frozen=True)
class Report:
    """All that a log says about one candidate."""

    candidate: str
    requests: int
    users: int
    propensities: str
    """Whether they were logged, or which model they come from."""
    logged_value: float
    """Mean reward of a request in the log: the value of the logging policy."""
    quality: LogQuality
    estimates: tuple[Estimate, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a refused estimate is null."""
        values = asdict(self)
        for estimate in values["estimates"]:
            quantiles = estimate["diagnostics"]["quantiles"]
            estimate["diagnostics"]["quantiles"] = {f"{level:g}": value for level, value in quantiles.items()}
        return values

    def table(self) -> pd.DataFrame:
        """A row per estimator, the diagnostics beside every value."""
        rows = [
            {
                "candidate": self.candidate,
                "domain": estimate.domain or "all",
                "estimator": estimate.estimator,
                "value": estimate.value,
                "low": estimate.interval.low if estimate.interval else None,
                "high": estimate.interval.high if estimate.interval else None,
                "verdict": estimate.diagnostics.verdict,
                "ess": estimate.diagnostics.ess,
                "largest": estimate.diagnostics.largest,
                "support_gap": estimate.diagnostics.support_gap,
                "reason": estimate.reason,
            }
            for estimate in self.estimates
        ]
        return pd.DataFrame(rows).astype({"value": float, "low": float, "high": float})


def evaluate(
    log: LoggedFeedback,
    candidate: Candidate,
    catalog: Catalog,
    config: EvaluateConfig,
    *,
    logging: Candidate | None = None,
    groups: Int[Tensor, " items"] | None = None,
    reward_model: RewardModel | None = None,
) -> Report:
    """The estimates of one candidate. `logging` is the policy that made the log, where it is known; see `gather`.

    `reward_model` takes the place of the config's. Raises DataError for an estimator that lacks what it needs.
    """
    evidence = collect(log, candidate, catalog, config, logging=logging, groups=groups, reward_model=reward_model)
    return report_of(candidate.name, evidence, log, catalog, config)


def collect(
    log: LoggedFeedback,
    candidate: Candidate,
    catalog: Catalog,
    config: EvaluateConfig,
    *,
    logging: Candidate | None = None,
    groups: Int[Tensor, " items"] | None = None,
    reward_model: RewardModel | None = None,
) -> Evidence:
    """The evidence that the estimators of a config need."""
    reward = log.reward(config.reward)
    if reward_model is None and config.reward_model is not None:
        reward_model = config.reward_model.fit(log, reward, np.random.default_rng(config.seed))
    alphas = {estimator.alpha for estimator in config.estimators if isinstance(estimator, ExponentialSmoothing)}
    return gather(
        log,
        candidate,
        catalog,
        reward,
        reward_model=reward_model,
        logging=logging,
        groups=groups if logging is not None else None,
        alphas=tuple(sorted(alphas)) if logging is not None and log.slots == 1 else (),
        marginal_draws=config.marginal_draws,
        generator=torch.Generator().manual_seed(config.seed),
    )


def report_of(name: str, evidence: Evidence, log: LoggedFeedback, catalog: Catalog, config: EvaluateConfig) -> Report:
    """What the evidence about a candidate says."""
    return Report(
        candidate=name,
        requests=len(log),
        users=len(np.unique(log.user)),
        propensities=log.propensities,
        logged_value=float(evidence.total.mean()),
        quality=log_quality(log, catalog, evidence.reward),
        estimates=tuple(
            judge(estimator, part, domain, config.interval, log.propensities)
            for domain, part in _parts(evidence, log)
            for estimator in config.estimators
        ),
    )


def judge(
    estimator: EstimatorConfig, evidence: Evidence, domain: str | None, method: IntervalConfig, propensities: str
) -> Estimate:
    """The value of an estimator, if the weights bear it, and its interval, if there is a valid one."""
    terms = estimator.terms(evidence)
    diagnostics = diagnose(terms.weights, evidence)
    name = label(estimator)
    if diagnostics.verdict == "do not use":
        reason = f"do not use: {'; '.join(diagnostics.reasons)}"
        return Estimate(name, domain, None, None, reason, terms.assumes, diagnostics)
    found: Interval | str
    if propensities != LOGGED:
        found = f"the propensities come from a fitted model ({propensities}), whose error is in no interval"
    elif terms.bound is not None:
        found = terms.bound
    elif terms.biased is not None:
        found = f"biased: {terms.biased}"
    else:
        sums = Sums.of(evidence.user, terms.influence, terms.added, terms.numerator, terms.denominator)
        found = method.interval(sums)
    interval, why = (found, None) if isinstance(found, Interval) else (None, found)
    return Estimate(name, domain, terms.value, interval, why, terms.assumes, diagnostics)


def label(estimator: EstimatorConfig) -> str:
    """The name, with the settings that are not the defaults: `clipped[cap=5]`."""
    settings = estimator.model_dump(exclude={"name"}, exclude_defaults=True)
    inside = ", ".join(f"{key}={float(value):g}" for key, value in settings.items())
    return f"{estimator.name}[{inside}]" if inside else estimator.name


def _parts(evidence: Evidence, log: LoggedFeedback) -> Iterator[tuple[str | None, Evidence]]:
    """All requests, then those of each domain where the log has several."""
    yield None, evidence
    present = np.unique(log.domain)
    if len(present) > 1:
        for domain in present:
            yield log.domain_names[domain], evidence.take(np.flatnonzero(log.domain == domain))
