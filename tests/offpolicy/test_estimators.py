"""Estimators of one item per request: by hand, against each other, and in the order theory gives them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offpolicy_world import Bandit, make_evidence

from recsys.data.schema import DataError
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

# w = 2, 1/2, 0; r - q̂ = .5, -.5, .75
EVIDENCE = make_evidence(
    target=np.array([0.5, 0.25, 0.0]),
    propensity=np.array([0.25, 0.5, 0.1]),
    reward=np.array([1.0, 0.0, 1.0]),
    direct=np.array([0.6, 0.3, 0.3]),
    predicted=np.array([0.5, 0.5, 0.25]),
)


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        (IPS(), 2 / 3),
        (SNIPS(), 0.8),
        (DirectMethod(), 0.4),
        (DoublyRobust(), 0.4 + 0.75 / 3),
        (SNDR(), 0.4 + 0.75 / 2.5),
        (SwitchDR(threshold=1.0), 0.4 - 0.25 / 3),
        (SwitchDR(threshold=2.0), 0.4 + 0.75 / 3),
        (ShrunkDR(shrinkage=4.0), 0.4 + (1.0 * 0.5 - 8 / 17 * 0.5) / 3),
        (SubGaussian(shrinkage=0.5), 4 / 3 / 3),
        (SubGaussian(shrinkage=0.0), 2 / 3),
        (ClippedIPS(cap=1.5), 0.5),
        (ImplicitExploration(gamma=0.25), 1 / 3),
        (LogSmoothing(smoothing=0.5), 2 * np.log(2) / 3),
        (ExponentialSmoothing(alpha=0.5), 1 / 3),
        (ExponentialSmoothing(alpha=1.0), 2 / 3),
        (ExponentialSmoothing(alpha=0.0), 0.5 / 3),
    ],
    ids=str,
)
def test_by_hand(estimator: IPS, value: float) -> None:
    terms = estimator.terms(EVIDENCE)
    assert terms.value == pytest.approx(value, abs=1e-15)
    assert terms.influence.mean() == pytest.approx(value, abs=1e-15)
    np.testing.assert_array_equal(terms.weights, [[2.0], [0.5], [0.0]])


def test_marginalized_by_hand() -> None:
    evidence = replace(EVIDENCE, group=np.array([0.5, 0.5, 0.2]), target_group=np.array([0.75, 0.25, 0.4]))
    terms = MarginalizedIPS().terms(evidence)
    assert terms.value == pytest.approx((1.5 + 2) / 3)
    assert terms.weights.tolist() == [[1.5], [0.5], [2.0]]
    assert terms.assumes == "an item earns what its group earns"


def test_influence_by_hand() -> None:
    influence = SNIPS().terms(EVIDENCE).influence  # r = 1, 0, 1 around .8, weighed by w / (2.5 / 3)
    np.testing.assert_allclose(influence - 0.8, np.array([2 * 0.2, 0.5 * -0.8, 0]) / (2.5 / 3))


BIASED = [
    DirectMethod(),
    SwitchDR(),
    ShrunkDR(),
    SubGaussian(),
    ClippedIPS(),
    ImplicitExploration(),
    LogSmoothing(),
    ExponentialSmoothing(),
]


@pytest.mark.parametrize("estimator", BIASED, ids=str)
def test_a_biased_estimator_says_why(estimator: DirectMethod) -> None:
    assert estimator.terms(EVIDENCE).biased


@pytest.mark.parametrize(
    "estimator", [IPS(), SNIPS(), DoublyRobust(), SNDR(), ExponentialSmoothing(alpha=1.0)], ids=str
)
def test_a_consistent_one_does_not(estimator: IPS) -> None:
    assert estimator.terms(EVIDENCE).biased is None


@pytest.mark.parametrize("estimator", [DirectMethod(), DoublyRobust(), SNDR(), SwitchDR(), ShrunkDR()], ids=str)
def test_a_reward_model_is_needed(estimator: DirectMethod) -> None:
    with pytest.raises(DataError, match="needs a reward model"):
        estimator.terms(replace(EVIDENCE, direct=None, predicted=None))


def test_the_logging_policy_is_needed_for_groups() -> None:
    with pytest.raises(DataError, match="needs the logging policy and the groups"):
        MarginalizedIPS().terms(EVIDENCE)


def test_doubly_robust_on_slates_points_to_cascade() -> None:
    two = np.full((3, 2), 0.5)
    names = ("target", "propensity", "reward", "direct", "predicted", "marginal", "target_marginal")
    slates = replace(EVIDENCE, **dict.fromkeys(names, two))
    with pytest.raises(DataError, match="cascade_dr"):
        DoublyRobust().terms(slates)
    grouped = replace(slates, group=two[:, 0].copy(), target_group=two[:, 0].copy())
    with pytest.raises(DataError, match="one item"):
        MarginalizedIPS().terms(grouped)
    assert IPS().terms(slates).value == 1.0  # the slate is the action, its sum the reward


def test_nothing_of_what_was_logged_is_no_estimate() -> None:
    nowhere = replace(EVIDENCE, target=np.zeros((3, 1)))
    with pytest.raises(DataError, match="nothing can be estimated"):
        _ = SNIPS().terms(nowhere).value


def test_log_smoothing_refuses_rewards_it_is_not_defined_for() -> None:
    with pytest.raises(DataError, match=r"above -1; it falls to -2"):
        LogSmoothing(smoothing=1.0).terms(replace(EVIDENCE, reward=-EVIDENCE.reward))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(*[st.floats(0.05, 1.0)] * 2, *[st.floats(0.0, 1.0)] * 3), min_size=2, max_size=12))
def test_properties(rows: list[tuple[float, ...]]) -> None:
    target, propensity, reward, direct, predicted = np.array(rows).T
    evidence = make_evidence(target, propensity, reward, direct, predicted)
    inside = SNIPS().terms(evidence).value
    assert reward.min() - 1e-12 <= inside <= reward.max() + 1e-12
    # shifting rewards shifts what normalises itself
    shifted = make_evidence(target, propensity, reward + 3, direct, predicted)
    assert SNIPS().terms(shifted).value == pytest.approx(inside + 3)
    # the limits of the shrinking estimators are the plain ones
    dr, ips = DoublyRobust().terms(evidence).value, IPS().terms(evidence).value
    assert SwitchDR(threshold=1e9).terms(evidence).value == dr
    assert ShrunkDR(shrinkage=1e12).terms(evidence).value == pytest.approx(dr)
    assert ClippedIPS(cap=1e9).terms(evidence).value == ips
    assert LogSmoothing(smoothing=1e-9).terms(evidence).value == pytest.approx(ips, rel=1e-6)
    # with rewards ≥ 0 the pessimistic ones are below
    for low in (ClippedIPS(cap=2.0), ImplicitExploration(), LogSmoothing(), ExponentialSmoothing()):
        assert low.terms(evidence).value <= ips + 1e-12
    # on-policy, everything is the mean
    same = make_evidence(propensity, propensity, reward, predicted, predicted)
    for estimator in (IPS(), SNIPS(), DoublyRobust(), SNDR()):
        assert estimator.terms(same).value == pytest.approx(reward.mean())


def test_order_of_the_errors() -> None:
    bandit = Bandit()
    generator = np.random.default_rng(5)
    estimators = {"ips": IPS(), "snips": SNIPS(), "dm": DirectMethod(), "dr": DoublyRobust()}
    errors: dict[str, list[float]] = {name: [] for name in [*estimators, "oracle"]}
    for _ in range(400):
        evidence = bandit.evidence(1000, generator)
        for name, estimator in estimators.items():
            errors[name].append(estimator.terms(evidence).value - bandit.value)
        oracle = bandit.evidence(1000, generator, bandit.reward)
        errors["oracle"].append(DoublyRobust().terms(oracle).value - bandit.value)
    mse = {name: float(np.mean(np.square(found))) for name, found in errors.items()}
    assert mse["dr"] < mse["ips"] < mse["dm"]
    assert mse["dr"] <= 0.85 * mse["ips"]
    assert mse["oracle"] < mse["snips"]
    assert abs(np.mean(errors["dm"])) > 0.04


def test_exponential_smoothing_trades_variance_for_bias() -> None:
    bandit = Bandit(floor=0.02, sharpness=2.0)
    generator = np.random.default_rng(3)
    rmse: dict[int, list[float]] = {}
    for n in (100, 10_000):
        draws = [bandit.evidence(n, generator) for _ in range(200)]
        values = np.array(
            [[ExponentialSmoothing(alpha=a).terms(e).value for a in (1, 0.95, 0.9, 0.8, 0.6)] for e in draws]
        )
        assert (np.diff(n * values.var(0)) < 0).all()
        bias = np.abs(values.mean(0) - bandit.value)
        assert (np.diff(bias) > 0).all()
        rmse[n] = np.sqrt(np.mean((values - bandit.value) ** 2, axis=0)).tolist()
    assert rmse[100][1] < rmse[100][0]  # a little smoothing pays while there is little data
    assert rmse[10_000][1] > rmse[10_000][0]
