"""Measures of selection against published numbers and by hand."""

import numpy as np
import pytest

from recsys.data.schema import DataError
from recsys.offpolicy.selection import (
    cvar_at_k,
    ranking,
    regret_at_k,
    select,
    sharpe_ratio_at_k,
    violation_at_k,
)

TRUTH = np.array([1, 1.2, 0.8, 1.5, 0.6, 1.1, 0.9, 1.3])
GOOD = np.array([1, 1.1, 0.9, 1.4, 0.7, 1.05, 0.95, 1.2])
RISKY = np.array([1.4, 0.9, 1.3, 1.2, 1.25, 0.8, 1.0, 1.1])


@pytest.mark.parametrize(
    ("estimates", "golden"),
    [
        (GOOD, [3.535534, 3.273268, 2.9277, 2.599376, 2.31455, 2.074435, 1.737021]),
        (RISKY, [0, 0, 1.294596, 1.371021, 1.509846, 1.612145, 1.737021]),
    ],
)
def test_sharpe_ratio(estimates: np.ndarray, golden: list[float]) -> None:
    found = [sharpe_ratio_at_k(estimates, TRUTH, k, baseline=1.0) for k in range(2, 9)]
    assert found == pytest.approx(golden, abs=1e-6)


def test_sharpe_ratio_is_undefined_without_spread() -> None:
    assert sharpe_ratio_at_k(GOOD, TRUTH, 1, 1.0) is None
    assert sharpe_ratio_at_k(GOOD, np.ones(8), 5, 1.0) is None
    assert sharpe_ratio_at_k(GOOD, TRUTH, 1, 1.0, ddof=0) is None


def test_sharpe_ratio_of_the_population() -> None:
    found = sharpe_ratio_at_k(GOOD, TRUTH, 2, 1.0, ddof=0)
    assert found == pytest.approx(0.5 / 0.1)  # 1.5 and 1.3 around 1.4


def test_others_by_hand() -> None:
    assert ranking(RISKY).tolist() == [0, 2, 4, 3, 7, 6, 1, 5]
    assert regret_at_k(RISKY, TRUTH, 1) == pytest.approx(0.5)
    assert regret_at_k(RISKY, TRUTH, 4) == 0
    assert cvar_at_k(RISKY, TRUTH, 4, 0.5) == pytest.approx((0.6 + 0.8) / 2)
    assert cvar_at_k(RISKY, TRUTH, 4, 0.3) == pytest.approx((0.6 + 0.8) / 2)  # at least the share asked for
    assert cvar_at_k(RISKY, TRUTH, 1, 0.01) == 1.0
    assert cvar_at_k(RISKY, TRUTH, 8, 1.0) == pytest.approx(TRUTH.mean())
    assert violation_at_k(RISKY, TRUTH, 4, 1.0) == 0.5  # .8 and .6, while 1 is not below 1


def test_equal_estimates_keep_their_order() -> None:
    assert ranking(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_the_table() -> None:
    table = select(GOOD, TRUTH, 1.0, [1, 3], safety=1.25)
    assert table["k"].tolist() == [1, 3]
    assert table["regret"].tolist() == [0, 0]
    assert np.isnan(table["sharpe_ratio"][0])
    assert table["sharpe_ratio"][1] == pytest.approx(3.273268, abs=1e-6)
    assert table["violation"].tolist() == pytest.approx([0, 1 / 3])


def test_a_refused_estimate_has_no_rank() -> None:
    with pytest.raises(DataError, match="leave out those that were refused"):
        ranking(np.array([1.0, np.nan]))


@pytest.mark.parametrize("k", [0, 9])
def test_k_beyond_the_policies(k: int) -> None:
    with pytest.raises(DataError, match="between 1 and 8"):
        regret_at_k(GOOD, TRUTH, k)
