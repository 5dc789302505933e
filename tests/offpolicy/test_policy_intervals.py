"""Intervals cover the truth as often as they say, and are not given where they would not."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from offpolicy_world import Bandit, make_evidence

from recsys.offpolicy.estimators import IPS, SNDR, SNIPS, DirectMethod, DoublyRobust, ExponentialSmoothing, Terms
from recsys.offpolicy.evidence import Evidence, Smoothed
from recsys.offpolicy.intervals import Bootstrap, Delta, EmpiricalBernstein, Interval, Sums


def sums(terms: Terms, user: np.ndarray) -> Sums:
    return Sums.of(user, terms.influence, terms.added, terms.numerator, terms.denominator)


def covers(interval: Interval | str, value: float) -> bool:
    assert isinstance(interval, Interval)
    return interval.low <= value <= interval.high


@pytest.mark.parametrize("estimator", [IPS(), SNIPS(), DoublyRobust(), SNDR()], ids=str)
def test_coverage_of_the_delta_method(estimator: IPS) -> None:
    bandit = Bandit()
    assert bandit.largest_weight < 12
    generator = np.random.default_rng(11)
    hits = [
        covers(Delta().interval(sums(estimator.terms(evidence), evidence.user)), bandit.value)
        for evidence in (bandit.evidence(2000, generator) for _ in range(1000))
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


def correlated(bandit: Bandit, users: int, requests: int, generator: np.random.Generator) -> Evidence:
    """Every user makes many requests with one taste: a shift of all their rewards."""
    evidence = bandit.evidence(users * requests, generator)
    user = np.repeat(np.arange(users), requests)
    taste = generator.normal(size=users)[user]
    return replace(evidence, user=user, reward=evidence.reward + taste[:, None])


@pytest.mark.parametrize("method", [Delta(), Bootstrap(samples=200)], ids=str)
def test_coverage_with_users_that_come_back(method: Delta) -> None:
    bandit = Bandit(sharpness=0.5)
    generator = np.random.default_rng(12)
    hits, naive = [], []
    for _ in range(500):
        evidence = correlated(bandit, 200, 5, generator)
        terms = SNIPS().terms(evidence)
        hits.append(covers(method.interval(sums(terms, evidence.user)), bandit.value))
        naive.append(covers(Delta().interval(sums(terms, np.arange(1000))), bandit.value))
    assert 0.92 <= np.mean(hits) <= 0.98
    assert np.mean(naive) < 0.87


def test_bernstein_covers_more_than_it_says() -> None:
    bandit = Bandit(sharpness=0.5)
    generator = np.random.default_rng(13)
    method = EmpiricalBernstein(range=bandit.largest_weight)
    draws = [bandit.evidence(1000, generator) for _ in range(300)]
    assert np.mean([covers(method.interval(sums(IPS().terms(e), e.user)), bandit.value) for e in draws]) > 0.98


def test_the_direct_method_would_cover_nothing() -> None:
    """Why a biased estimator gets no interval."""
    bandit = Bandit()
    generator = np.random.default_rng(14)
    draws = [bandit.evidence(2000, generator) for _ in range(50)]
    assert not any(covers(Delta().interval(sums(DirectMethod().terms(e), e.user)), bandit.value) for e in draws)


def test_delta_by_hand() -> None:
    evidence = make_evidence(np.full(4, 0.5), np.full(4, 0.5), np.array([0.0, 0.0, 1.0, 1.0]))
    found = Delta().interval(sums(IPS().terms(evidence), evidence.user))
    half = 1.959963984540054 * np.sqrt(1 / 3 / 4)  # sd of 0 0 1 1 over √4
    assert isinstance(found, Interval)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    clustered = Delta().interval(sums(IPS().terms(evidence), np.array([7, 7, 9, 9])))
    assert isinstance(clustered, Interval)
    assert clustered.high - 0.5 == pytest.approx(1.959963984540054 * np.sqrt(2 * (1 + 1)) / 4)


def test_bootstrap_reproduces_itself_and_nearly_the_delta_method() -> None:
    evidence = Bandit().evidence(2000, np.random.default_rng(1))
    found = sums(SNDR().terms(evidence), evidence.user)
    first, delta = Bootstrap(samples=2000).interval(found), Delta().interval(found)
    assert first == Bootstrap(samples=2000).interval(found)
    assert first != Bootstrap(samples=2000, seed=1).interval(found)
    assert isinstance(first, Interval)
    assert isinstance(delta, Interval)
    assert (first.low, first.high) == pytest.approx((delta.low, delta.high), abs=0.1 * (delta.high - delta.low))


@pytest.mark.parametrize(
    ("method", "estimator", "user", "reason"),
    [
        (Delta(), IPS(), [1, 1, 1], "two users"),
        (Bootstrap(), IPS(), [1, 1, 1], "two users"),
        (Bootstrap(), SNIPS(), [1, 2, 3], "nothing that the target policy would show"),
        (EmpiricalBernstein(range=10.0), SNIPS(), [1, 2, 3], "is a ratio"),
        (EmpiricalBernstein(range=10.0), IPS(), [1, 1, 2], "different users"),
        (EmpiricalBernstein(range=0.5), IPS(), [1, 2, 3], "more than the range"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_no_interval_and_why(method: Delta, estimator: IPS, user: list[int], reason: str) -> None:
    evidence = make_evidence(np.array([1.0, 0.0, 0.0]), np.full(3, 0.5), np.ones(3))
    found = method.interval(sums(estimator.terms(evidence), np.array(user)))
    assert isinstance(found, str)
    assert reason in found


@pytest.fixture
def bounded() -> Callable[[int, np.random.Generator], Evidence]:
    bandit = Bandit(floor=0.05, sharpness=1.5)
    alpha = 0.95
    overlap = (bandit.target * bandit.log ** (1 - alpha)).sum(1)
    spread = (bandit.target * bandit.log ** (1 - 2 * alpha)).sum(1)

    def draw(n: int, generator: np.random.Generator) -> Evidence:
        # All contexts share one sum here, which keeps the bound valid: it is the sums' mean that enters.
        evidence = bandit.evidence(n, generator)
        sums = Smoothed(np.full(n, overlap.mean()), np.full(n, spread.mean()))
        return replace(evidence, smoothed={alpha: sums})

    return draw


def test_the_bound_of_exponential_smoothing_holds(bounded: Callable[[int, np.random.Generator], Evidence]) -> None:
    value = Bandit(floor=0.05, sharpness=1.5).value
    generator = np.random.default_rng(15)
    estimator = ExponentialSmoothing(alpha=0.95)
    bounds = [estimator.terms(bounded(2000, generator)).bound for _ in range(500)]
    assert np.mean([covers(bound or "", value) for bound in bounds]) >= 0.95
    few, many = (estimator.terms(bounded(n, generator)).bound for n in (2000, 200_000))
    assert few is not None
    assert many is not None
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_the_bound_is_not_given_where_it_does_not_hold(bounded: Callable[[int, np.random.Generator], Evidence]) -> None:
    evidence = bounded(50, np.random.default_rng(0))
    assert ExponentialSmoothing(alpha=0.95).terms(evidence).bound is not None
    assert ExponentialSmoothing(alpha=0.7).terms(evidence).bound is None
    assert ExponentialSmoothing(alpha=0.95).terms(replace(evidence, reward=3 * evidence.reward)).bound is None
    assert ExponentialSmoothing(alpha=0.95).terms(replace(evidence, user=np.zeros(50, dtype=np.int64))).bound is None
