"""One ratio from several datasets, and how much the datasets differ: random effects."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recsys.scaling.ladder import Estimate


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot."""

    name: str
    ratio: Estimate
    weight: float
    """Share in the pooled ratio."""


@dataclass(frozen=True)
class Pooled:
    """log ratio = mu + what is special to the dataset + error, the datasets' share with variance tau^2."""

    ratio: Estimate
    """exp(mu): the ratio that a further dataset of the kind is expected to have, on the geometric mean."""
    tau: float
    """Standard deviation of the log ratio over datasets."""
    heterogeneity: float
    """I^2: share of the spread between datasets that is not error."""
    p_heterogeneity: float
    """Cochran's Q test that all datasets have one ratio; with few datasets it finds little."""
    rows: tuple[ForestRow, ...]


def pool_ratios(ratios: Mapping[str, Estimate]) -> Pooled:
    """DerSimonian & Laird (1986), with the interval of Hartung & Knapp (2001), never narrower than the plain one.

    A dataset whose interval is open has no weight. Raises ValueError under two datasets with a closed one, or where
    the levels differ.
    """
    from scipy.stats import chi2, norm, t  # takes most of a second to import

    closed = {name: ratio for name, ratio in ratios.items() if ratio.low > 0 and np.isfinite(ratio.high)}
    if len(closed) < 2:
        raise ValueError(f"{len(closed)} of {len(ratios)} datasets have a closed interval; pooling needs two")
    levels = {ratio.level for ratio in closed.values()}
    if len(levels) > 1:
        raise ValueError(f"the intervals have different levels ({', '.join(map(str, sorted(levels)))})")
    (level,) = levels

    logs = np.log([ratio.value for ratio in closed.values()])
    # A profile-F interval in one direction is that of Student's t.
    quantiles = np.array([t.ppf((1 + level) / 2, ratio.freedom) for ratio in closed.values()])
    errors = np.array([np.log(ratio.high / ratio.low) for ratio in closed.values()]) / (2 * quantiles)

    weights = errors**-2
    fixed = (weights @ logs) / weights.sum()
    q = float(weights @ (logs - fixed) ** 2)
    freedom = len(logs) - 1
    tau_squared = max(0.0, (q - freedom) / (weights.sum() - (weights @ weights) / weights.sum()))

    weights = 1 / (errors**2 + tau_squared)
    shares = weights / weights.sum()
    mu = float(shares @ logs)
    spread = float(weights @ (logs - mu) ** 2) / freedom
    plain = norm.ppf((1 + level) / 2) / np.sqrt(weights.sum())
    half = float(max(t.ppf((1 + level) / 2, freedom) * np.sqrt(spread / weights.sum()), plain))
    share_of = dict(zip(closed, shares.tolist(), strict=True))
    return Pooled(
        ratio=Estimate(float(np.exp(mu)), float(np.exp(mu - half)), float(np.exp(mu + half)), level, freedom),
        tau=float(np.sqrt(tau_squared)),
        heterogeneity=max(0.0, 1 - freedom / q) if q > 0 else 0.0,
        p_heterogeneity=float(chi2.sf(q, freedom)),
        rows=tuple(ForestRow(name, ratio, share_of.get(name, 0.0)) for name, ratio in ratios.items()),
    )
