"""Whether a log can say anything about a policy, and how good the log itself is."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from recsys.offpolicy.evidence import Evidence
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.types import NO_DOMAIN, Catalog

Verdict = Literal["trust", "widen", "do not use"]

QUANTILES = (0.5, 0.9, 0.99, 0.999)

TRUST_ESS, USE_ESS = 0.5, 0.05
"""Effective sample size, as a share of the requests, below which an interval is too narrow, and below which wrong."""

TRUST_WEIGHT, USE_WEIGHT = 0.01, 0.04
"""Largest weight, as a share of the requests, above which the same is true."""

GAP = 0.01
"""Share of the target policy that a log may fail to show; more is a bias that no weight mends."""

_Z = 3.0


@dataclass(frozen=True)
class Diagnostics:
    """The weights of one estimate; where it has several columns of them (positions), those of the worst one."""

    requests: int
    ess: float
    """(Σw)² / Σw²: as many requests of the target policy's own would say as much."""
    largest: float
    mean: float
    """1 up to chance, if the propensities are right and the log can show all that the target would."""
    mean_error: float
    """Standard error of the mean."""
    quantiles: dict[float, float]
    support_gap: float
    """Share of the target policy on items that the log cannot show."""
    support_known: bool
    """False if the gap is the share on items that the log did not show, for want of the logging policy."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why not `trust`."""


def diagnose(weights: Float64[np.ndarray, "requests columns"], evidence: Evidence) -> Diagnostics:
    """`trust`, `widen` (the interval is too narrow) or `do not use` (there is no telling), with the numbers behind it.

    Trust needs ESS ≥ .5 n and no weight above .01 n; below .05 n or above .04 n the log is no use. A gap in the support
    ends the matter too, where the logging policy shows it or where the weights do: their mean is then not 1.
    """
    n = len(weights)
    largest = float(weights.max())
    scaled = weights / largest if largest > 0 else weights  # squares of weights may be too small or too large to hold
    squares = (scaled**2).sum(0)
    ess = np.divide(scaled.sum(0) ** 2, squares, out=np.zeros(len(squares)), where=squares > 0)
    worst = int(np.argmin(ess))
    w = weights[:, worst]
    mean, error = float(w.mean()), float(w.std() / np.sqrt(n))
    gap = float(evidence.unsupported.mean())

    fatal: list[str] = []
    doubts: list[str] = []
    if ess[worst] < TRUST_ESS * n:
        (fatal if ess[worst] < USE_ESS * n else doubts).append(f"{ess[worst]:,.0f} effective of {n:,} requests")
    if largest > TRUST_WEIGHT * n:
        reason = f"one request weighs {largest:,.1f}, {largest / n:.1%} of all"
        (fatal if largest > USE_WEIGHT * n else doubts).append(reason)
    if gap > GAP:
        what = "the log cannot show" if evidence.support_known else "the log never shows"
        (fatal if evidence.support_known else doubts).append(f"{gap:.1%} of the target policy is on items {what}")
    if abs(mean - 1) > max(_Z * error, GAP):
        cause = "a part of the target policy is never shown" if mean < 1 else "the propensities are too low"
        fatal.append(f"the weights average {mean:.3f} ± {error:.3f} and not 1: {cause}")
    verdict: Verdict = "do not use" if fatal else "widen" if doubts else "trust"
    return Diagnostics(
        requests=n,
        ess=float(ess[worst]),
        largest=largest,
        mean=mean,
        mean_error=error,
        quantiles=dict(zip(QUANTILES, np.quantile(w, QUANTILES).tolist(), strict=True)),
        support_gap=gap,
        support_known=evidence.support_known,
        verdict=verdict,
        reasons=(*fatal, *doubts),
    )


@dataclass(frozen=True)
class LogQuality:
    """How well a log was earned and how widely it looked (Schweighofer et al. 2022, arXiv:2111.04714)."""

    tq: float | None
    """(mean reward - random) / (best - random): 0 as good as chance, 1 as good as can be. None if best is random."""
    saco: float
    """Distinct (domain, item) pairs shown, as a share of those of the catalogue."""


def log_quality(
    log: LoggedFeedback,
    catalog: Catalog,
    reward: Float64[np.ndarray, "requests slots"],
    random: float | None = None,
    best: float | None = None,
) -> LogQuality:
    """TQ and SACo of a log.

    `random` and `best` are the values of a uniform policy and of the best one, where a simulator knows them. Otherwise
    they are the mean over items, and the largest, of what the items earn at a slot, weighted by 1 / propensity and
    shrunk by one showing at the mean: a rough scale for the same log, not to be compared between logs.
    """
    pairs = len(np.unique(np.stack([log.domain.repeat(log.slots), log.items.ravel()]), axis=1).T)
    if random is None or best is None:
        inverse = (1 / log.propensity).ravel()
        mass = np.bincount(log.items.ravel(), inverse)
        earned = np.bincount(log.items.ravel(), inverse * reward.ravel())
        prior = inverse.mean()
        means = (earned[mass > 0] + prior * reward.mean()) / (mass[mass > 0] + prior)
        random = float(means.mean()) * log.slots if random is None else random
        best = float(means.max()) * log.slots if best is None else best
    tq = None if best == random else float((reward.sum(1).mean() - random) / (best - random))
    return LogQuality(tq, pairs / int((catalog.item_domain != NO_DOMAIN).sum()))
