"""The verdict on a log, and what it is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offpolicy_world import Bandit, make_evidence, make_log, single_domain

from recsys.offpolicy.diagnostics import Diagnostics, diagnose, log_quality
from recsys.offpolicy.evidence import Evidence
from recsys.types import Catalog


def of_weights(weights: np.ndarray, gap: float = 0.0, known: bool = True) -> Diagnostics:
    n = len(weights)
    evidence = make_evidence(weights * 0.01, np.full(n, 0.01), np.ones(n))
    evidence = Evidence(**{**vars(evidence), "unsupported": np.full(n, gap), "support_known": known})
    return diagnose(evidence.weights[:, None], evidence)


def test_by_hand() -> None:
    found = of_weights(np.array([2.0, 0.0, 1.0, 1.0]))
    assert found.ess == pytest.approx(16 / 6)
    assert (found.requests, found.largest, found.mean) == (4, pytest.approx(2.0), pytest.approx(1.0))
    assert found.mean_error == pytest.approx(np.sqrt(0.5) / 2)
    assert found.quantiles[0.5] == pytest.approx(1.0)


def weights_with(ess: float, n: int = 10_000) -> np.ndarray:
    """n weights of mean 1 with this share effective, none of them large."""
    return np.repeat([1 + np.sqrt(1 / ess - 1), 1 - np.sqrt(1 / ess - 1)], n // 2)


@pytest.mark.parametrize(
    ("weights", "verdict", "reason"),
    [
        (np.ones(1000), "trust", ""),
        (weights_with(0.501), "trust", ""),
        (np.r_[np.full(1990, 4000 / 1990), np.zeros(2010)], "widen", "1,990 effective of 4,000"),
        (np.r_[np.ones(999), 15.0], "widen", "one request weighs 15.0, 1.5% of all"),
        (np.r_[np.ones(999), 41.0], "do not use", "one request weighs 41.0, 4.1% of all"),
        (np.r_[np.full(49, 1000 / 49), np.zeros(951)], "do not use", "49 effective of 1,000"),
        (np.zeros(100), "do not use", "0 effective of 100"),
        (np.full(1000, 0.8), "do not use", "a part of the target policy is never shown"),
        (np.full(1000, 1.2), "do not use", "the propensities are too low"),
    ],
)
def test_the_rule(weights: np.ndarray, verdict: str, reason: str) -> None:
    found = of_weights(weights)
    assert found.verdict == verdict
    assert reason in " ".join(found.reasons)
    assert (found.reasons == ()) == (verdict == "trust")


@pytest.mark.parametrize(
    ("gap", "known", "verdict"),
    [(0.009, True, "trust"), (0.02, True, "do not use"), (0.009, False, "trust"), (0.02, False, "widen")],
)
def test_a_gap_in_the_support(gap: float, known: bool, verdict: str) -> None:
    found = of_weights(np.ones(1000), gap, known)
    assert found.verdict == verdict
    if verdict != "trust":
        assert f"{gap:.1%} of the target policy" in found.reasons[0]


def test_the_worst_position_counts() -> None:
    good, bad = np.ones(1000), np.r_[np.full(20, 50.0), np.zeros(980)]
    evidence = make_evidence(np.full(1000, 0.5), np.full(1000, 0.5), np.ones(1000))
    found = diagnose(np.stack([good, bad], axis=1), evidence)
    assert found.verdict == "do not use"
    assert found.ess == pytest.approx(20)


def verdicts(bandit: Bandit, logs: int, n: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    draws = (bandit.evidence(n, generator) for _ in range(logs))
    return [diagnose(evidence.weights[:, None], evidence).verdict for evidence in draws]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_well_behaved_logs_are_trusted_and_heavy_tailed_ones_are_not(seed: int) -> None:
    good = verdicts(Bandit(floor=0.3, sharpness=0.5, seed=seed), 400, 2000, seed)
    assert np.mean([verdict == "trust" for verdict in good]) >= 0.95
    heavy = Bandit(floor=0.0, sharpness=1.5, seed=seed)
    assert heavy.largest_weight > 100
    assert "trust" not in verdicts(heavy, 400, 2000, seed)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_properties(values: list[float]) -> None:
    weights = np.array(values)
    found = of_weights(weights)
    assert 0 <= found.ess <= len(weights) + 1e-9
    if weights.sum() > 0:
        assert found.ess >= 1 - 1e-9
    assert of_weights(weights[::-1].copy()).ess == pytest.approx(found.ess)


CATALOG = Catalog(("one",), single_domain(4), torch.zeros(5, dtype=torch.int64))


def test_the_quality_of_a_log() -> None:
    reward = np.array([[1.0], [0.0], [1.0], [1.0]])
    log = make_log(np.array([[1], [2], [1], [3]]), np.full((4, 1), 0.25), {"click": reward}, 4)
    known = log_quality(log, CATALOG, reward, random=0.25, best=1.25)
    assert known.tq == pytest.approx(0.5)
    assert known.saco == 0.75
    # Items 1, 2, 3 earn 1, 0, 1, each with one showing at the mean of .75.
    means = [(2 + 0.75) / 3, 0.75 / 2, 1.75 / 2]
    found = log_quality(log, CATALOG, reward)
    assert found.tq == pytest.approx((0.75 - np.mean(means)) / (max(means) - np.mean(means)))


def test_a_log_of_equals_has_no_quality() -> None:
    reward = np.ones((2, 1))
    log = make_log(np.array([[1], [2]]), np.full((2, 1), 0.5), {"click": reward}, 4)
    assert log_quality(log, CATALOG, reward, random=1.0, best=1.0).tq is None
