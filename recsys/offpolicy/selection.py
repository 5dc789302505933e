"""How well estimates choose among policies, where their true values are known.

Policies are ranked by estimate, the first k are tried, and the best of them is kept. `truth` holds the true values in
the order of `estimates`; equal estimates keep their order. An estimate that was refused has no rank: leave it out.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

from recsys.data.schema import DataError


def ranking(estimates: Float64[np.ndarray, " policies"]) -> Int64[np.ndarray, " policies"]:
    """Indices of the policies, the best estimate first."""
    if not np.isfinite(estimates).all():
        raise DataError("a policy without an estimate cannot be ranked; leave out those that were refused")
    return np.argsort(-estimates, kind="stable")


def regret_at_k(estimates: Float64[np.ndarray, " policies"], truth: Float64[np.ndarray, " policies"], k: int) -> float:
    """What the best policy earns above the best of the first k."""
    return float(truth.max() - _first(estimates, truth, k).max())


def sharpe_ratio_at_k(
    estimates: Float64[np.ndarray, " policies"],
    truth: Float64[np.ndarray, " policies"],
    k: int,
    baseline: float,
    ddof: int = 1,
) -> float | None:
    """(best of the first k - baseline) / their standard deviation (Kiyohara et al. 2023, arXiv:2311.18207).

    Return over risk: how much is gained on the logging policy's value, against how unevenly the tried ones do. `ddof`
    1 divides the variance by k - 1, 0 by k. None for k = 1 and where the first k are all alike.
    """
    first = _first(estimates, truth, k)
    spread = float(first.std(ddof=ddof)) if k > ddof else 0.0
    return float(first.max() - baseline) / spread if spread > 0 else None


def cvar_at_k(
    estimates: Float64[np.ndarray, " policies"], truth: Float64[np.ndarray, " policies"], k: int, alpha: float
) -> float:
    """Mean of the worst share alpha of the first k (one of them at least)."""
    count = max(1, int(np.ceil(alpha * k - 1e-9)))
    return float(np.sort(_first(estimates, truth, k))[:count].mean())


def violation_at_k(
    estimates: Float64[np.ndarray, " policies"], truth: Float64[np.ndarray, " policies"], k: int, floor: float
) -> float:
    """Share of the first k that earn less than the floor: how often trying them would do harm."""
    return float((_first(estimates, truth, k) < floor).mean())


def select(
    estimates: Float64[np.ndarray, " policies"],
    truth: Float64[np.ndarray, " policies"],
    baseline: float,
    ks: Sequence[int],
    *,
    alpha: float = 0.3,
    safety: float = 1.0,
) -> pd.DataFrame:
    """Every measure at every k, a row each; a violation earns less than `safety` times the baseline."""
    rows = [
        {
            "k": k,
            "regret": regret_at_k(estimates, truth, k),
            "sharpe_ratio": sharpe_ratio_at_k(estimates, truth, k, baseline),
            "cvar": cvar_at_k(estimates, truth, k, alpha),
            "violation": violation_at_k(estimates, truth, k, safety * baseline),
        }
        for k in ks
    ]
    return pd.DataFrame(rows).astype({"sharpe_ratio": float})


def _first(
    estimates: Float64[np.ndarray, " policies"], truth: Float64[np.ndarray, " policies"], k: int
) -> Float64[np.ndarray, " first"]:
    if not 1 <= k <= len(estimates):
        raise DataError(f"k must lie between 1 and {len(estimates)}, the number of policies, not {k}")
    return truth[ranking(estimates)[:k]]
