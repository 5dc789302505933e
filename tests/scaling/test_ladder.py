"""Two arms whose laws are known: what the ladder, rho and the verdicts say of them."""

from itertools import pairwise

import numpy as np
import pytest

from recsys.scaling.compare import (
    Arm,
    Extrapolation,
    NoVerdict,
    compare_laws,
    conclusion,
    hold_out_largest,
    interpolated_ratio,
    ratio_curve,
)
from recsys.scaling.ladder import Estimate, Ladder, f_test
from recsys.scaling.laws import TooFewPoints
from recsys.scaling.pooling import pool_ratios

SIZES = np.geomspace(1e4, 1e7, 7)


def loss(sizes: np.ndarray, exponent: float = 0.25) -> np.ndarray:
    return 4 + 20 * sizes**-exponent


def ladder(rho: float, noise: float, rng: np.random.Generator) -> Ladder:
    """Size means: seven sizes over three decades, each with an error of its own."""
    sizes = np.concatenate([SIZES, SIZES])
    challenger = np.repeat([False, True], 7)
    values = loss(np.where(challenger, rho, 1.0) * sizes) + rng.normal(0, noise, 14)
    return Ladder(sizes, values, challenger)


def arms(rho: float, noise: float, exponent: float = 0.25, seeds: int = 3, share: float = 1.0) -> tuple[Arm, Arm]:
    rng = np.random.default_rng(0)
    sizes = np.repeat(SIZES, seeds)
    baseline = Arm("plain", sizes, loss(sizes) + rng.normal(0, noise, len(sizes)))
    sizes = sizes * share
    return baseline, Arm("crossed", sizes, loss(rho * sizes, exponent) + rng.normal(0, noise, len(sizes)))


@pytest.mark.slow
def test_under_the_null_the_f_test_rejects_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        one = ladder(1.0, 0.005, rng)
        p.append(f_test(one.shared, one.ratio).p)
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07


@pytest.mark.slow
def test_the_interval_of_rho_covers_it():
    rng = np.random.default_rng(0)
    found = [ladder(1.5, 0.005, rng).rho() for _ in range(300)]
    assert 0.93 <= np.mean([one.low <= 1.5 <= one.high for one in found]) <= 0.97
    assert np.median([one.value for one in found]) == pytest.approx(1.5, abs=0.01)


@pytest.mark.slow
def test_seeds_taken_as_independent_reject_far_too_often():
    # The reason for size means: an error that all seeds of a size share, three times that of a seed.
    rng = np.random.default_rng(0)
    sizes, challenger = np.tile(np.repeat(SIZES, 3), 2), np.repeat([False, True], 21)
    p_runs, p_means = [], []
    for _ in range(60):
        values = loss(sizes) + np.repeat(rng.normal(0, 0.015, 14), 3) + rng.normal(0, 0.005, 42)
        one = Ladder(sizes, values, challenger)
        p_runs.append(f_test(one.shared, one.ratio).p)
        means = Ladder(sizes[::3], values.reshape(14, 3).mean(1), challenger[::3])
        p_means.append(f_test(means.shared, means.ratio).p)
    assert np.mean(np.array(p_runs) < 0.05) > 0.15
    assert np.mean(np.array(p_means) < 0.05) < 0.15


def test_the_ladder_without_noise():
    one = ladder(1.5, 0.0, np.random.default_rng(0))
    assert one.rho().value == pytest.approx(1.5, rel=1e-6)
    assert one.exponent_difference().value == pytest.approx(0, abs=1e-6)
    assert one.separate.baseline.exponent == pytest.approx(0.25, rel=1e-6)
    assert one.separate.challenger.floor == pytest.approx(4, rel=1e-6)


def test_every_rung_explains_at_least_as_much():
    one = ladder(1.3, 0.02, np.random.default_rng(3))
    rungs = list(one.fitted().values())
    assert [rung.parameters for rung in rungs] == [3, 4, 5, 6]
    assert all(richer.rss <= simpler.rss * (1 + 1e-9) for simpler, richer in pairwise(rungs))


def test_f_and_aicc_by_hand():
    one = ladder(1.5, 0.01, np.random.default_rng(0))
    simple, rich = one.shared, one.ratio
    test = f_test(simple, rich)
    assert test.freedom == (1, 10)
    assert test.statistic == pytest.approx((simple.rss - rich.rss) / (rich.rss / 10))
    # 4 parameters and a variance: k = 5, n = 14.
    assert rich.aicc == pytest.approx(14 * np.log(rich.rss / 14) + 10 + 2 * 5 * 6 / 8)
    assert one.ratio.aicc < one.shared.aicc


def test_the_interval_ends_where_the_f_test_stops_rejecting():
    from scipy.stats import f

    sizes = np.concatenate([SIZES, 1.7 * SIZES[2:]])  # not alike, so that the arms' terms are not equally well known
    challenger = np.repeat([False, True], [7, 5])
    values = loss(np.where(challenger, 1.5, 1.0) * sizes) + np.random.default_rng(5).normal(0, 0.03, 12)
    one = Ladder(sizes, values, challenger)
    found = one.rho()
    for rho in (found.low, found.high):
        # With rho given, the challenger's points are the baseline's at rho times the size.
        given = Ladder(sizes * np.where(challenger, rho, 1.0), values, challenger).shared
        assert (given.rss - one.ratio.rss) / (one.ratio.rss / 8) == pytest.approx(f.ppf(0.95, 1, 8), rel=1e-3)


def test_rho_does_not_depend_on_units_and_turns_over_with_the_arms():
    one = ladder(1.5, 0.01, np.random.default_rng(5))
    found = one.rho()
    scaled = Ladder(one.sizes * 1e6, one.values * 3, one.challenger).rho()
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx((found.value, found.low, found.high), rel=1e-5)
    swapped = Ladder(one.sizes, one.values, ~one.challenger).rho()
    assert (1 / swapped.value, 1 / swapped.high, 1 / swapped.low) == pytest.approx(
        (found.value, found.low, found.high), rel=1e-5
    )


def test_an_interval_that_the_data_do_not_close_is_open():
    rng = np.random.default_rng(0)
    flat = Ladder(np.concatenate([SIZES, SIZES]), 4 + rng.normal(0, 0.1, 14), np.repeat([False, True], 7)).rho()
    assert flat.high == np.inf
    assert flat.low < 0.1


def test_conclusions_name_their_axis():
    dense = compare_laws("dense parameters", *arms(1.5, 0.005))
    # The same runs counted with a table that the challenger has to carry twice.
    baseline, challenger = arms(1.5, 0.005)
    heavier = Arm("crossed", challenger.sizes * 2, challenger.values)
    total = compare_laws("total parameters", baseline, heavier)
    lines = conclusion([dense, total])
    assert lines[0].startswith("Counted in dense parameters, crossed reaches the loss of plain with 1/1.49 of them")
    assert "dense parameters of plain" in lines[0]
    assert lines[1].startswith("Counted in total parameters, crossed needs 1.3")
    assert lines[2] == "crossed needs fewer than plain counted in dense parameters; not shown for total parameters."
    assert total.rho.value == pytest.approx(dense.rho.value / 2, rel=1e-3)


def test_no_difference_is_not_called_one():
    lines = conclusion([compare_laws("training FLOPs", *arms(1.0, 0.005))])
    assert "crossed and plain cannot be told apart" in lines[0]
    assert lines[1] == "That crossed needs fewer than plain is shown for none of training FLOPs."


def test_a_ratio_that_changes_with_size_is_said_to():
    comparison = compare_laws("dense parameters", *arms(1.0, 0.002, exponent=0.28))
    assert comparison.exponent_difference.low > 0
    assert comparison.exponent_difference.low <= 0.03 <= comparison.exponent_difference.high
    assert "But the ratio changes with size" in conclusion([comparison])[0]
    curve = ratio_curve(comparison, points=9)
    assert (np.diff(curve.ratio) > 0).all()
    # A loss of L takes (20 / (L - 4))^4 parameters of the baseline and (20 / (L - 4))^(1 / .28) of the challenger.
    truth = (20 / (curve.losses - 4)) ** (1 / 0.25 - 1 / 0.28)
    assert ((curve.low <= truth) & (truth <= curve.high)).all()
    assert curve.ratio == pytest.approx(truth, rel=0.1)


def test_the_loss_gap_at_equal_size():
    comparison = compare_laws("dense parameters", *arms(1.5, 0.0))
    at = np.array([1e5, 1e6])
    assert comparison.gap(at) == pytest.approx(loss(1.5 * at) - loss(at), rel=1e-4)
    with pytest.raises(Extrapolation, match="not within the sizes of plain"):
        comparison.gap(np.array([1e9]))


@pytest.mark.parametrize(
    ("keep", "message"),
    [(slice(0, 3), "plain has 3 sizes and a verdict needs at least 4"), (slice(0, 4), "no error")],
)
def test_four_sizes_are_needed(keep, message):
    few = np.geomspace(1e4, 1e6, 7)[keep] if keep.stop == 3 else np.geomspace(1e4, 1e6, 4)
    plain, crossed = (Arm(name, few, loss(rho * few)) for name, rho in (("plain", 1.0), ("crossed", 1.2)))
    if keep.stop == 3:
        with pytest.raises(NoVerdict, match=message):
            compare_laws("dense parameters", plain, crossed)
    else:
        assert compare_laws("dense parameters", plain, crossed).rho.value == pytest.approx(1.2, rel=1e-4)


def test_a_decade_is_needed():
    for top, enough in ((9.9e4, False), (1e5, True)):
        sizes = np.geomspace(1e4, top, 5)
        pair = Arm("plain", sizes, loss(sizes)), Arm("crossed", sizes, loss(1.2 * sizes))
        if enough:
            compare_laws("dense parameters", *pair)
        else:
            with pytest.raises(NoVerdict, match=r"plain span 1\.00 decades and a verdict needs 1"):
                compare_laws("dense parameters", *pair)


def test_a_ratio_beyond_the_runs_is_refused():
    with pytest.raises(Extrapolation, match="share no loss within the dense parameters that were run"):
        compare_laws("dense parameters", *arms(1e5, 0.0))


def test_the_overlap_is_where_both_were_run():
    comparison = compare_laws("dense parameters", *arms(10.0, 0.0))
    assert comparison.overlap == pytest.approx((1e5, 1e7), rel=1e-4)


def test_where_the_spread_comes_from():
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.geomspace(1e4, 1e7, 40), 5)
    pair = [
        Arm(name, sizes, loss(sizes) + np.repeat(rng.normal(0, 0.03, 40), 5) + rng.normal(0, 0.01, 200))
        for name in ("plain", "crossed")
    ]
    found = compare_laws("dense parameters", *pair).variances
    assert found.seeds == pytest.approx(1e-4, rel=0.2)
    assert found.ratio == pytest.approx(9, rel=0.4)
    assert compare_laws("dense parameters", *arms(1.5, 0.005, seeds=1)).variances is None


def test_the_largest_size_is_predicted_from_the_others():
    values = loss(SIZES)
    exact = hold_out_largest(Arm("plain", SIZES, values))
    assert exact.size == pytest.approx(1e7)
    assert exact.error == pytest.approx(0, abs=1e-6)
    assert exact.seed_error is None
    values[-1] *= 1.1  # worse than the law: the prediction is too low
    assert hold_out_largest(Arm("plain", SIZES, values)).error == pytest.approx(1 / 1.1 - 1, rel=1e-4)
    with pytest.raises(TooFewPoints):
        hold_out_largest(Arm("plain", SIZES[:4], values[:4]))
    twice = hold_out_largest(Arm("plain", np.append(SIZES, SIZES[-1]), np.append(loss(SIZES), loss(SIZES[-1:]) + 0.2)))
    assert twice.seed_error == pytest.approx(0.1)


def test_interpolated_ratio_by_hand():
    baseline = Arm("plain", np.array([1.0, 100.0]), np.array([3.0, 1.0]))
    challenger = Arm("crossed", np.array([1.0, 10.0]), np.array([2.0, 1.0]))
    assert interpolated_ratio(baseline, challenger, 2.0) == pytest.approx(10)  # half of two decades against the first
    assert interpolated_ratio(baseline, challenger, 1.5) == pytest.approx(10**1.5 / 10**0.5)
    with pytest.raises(Extrapolation, match="crossed is at 2 with its smallest size already"):
        interpolated_ratio(baseline, challenger, 2.5)
    with pytest.raises(Extrapolation, match=r"plain never reaches 0\.5"):
        interpolated_ratio(baseline, challenger, 0.5)


# Over datasets


def estimate(log_ratio: float, error: float, freedom: int = 10) -> Estimate:
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * error
    return Estimate(*np.exp([log_ratio, log_ratio - half, log_ratio + half]).tolist(), 0.95, freedom)


def test_pooling_by_hand():
    # Equal errors of .1, effects 0, .4, .8: Q = 2 * .16 / .01 = 32, C = 300 - 100 = 200, tau^2 = 30 / 200 = .15.
    pooled = pool_ratios({name: estimate(value, 0.1) for name, value in (("a", 0.0), ("b", 0.4), ("c", 0.8))})
    assert np.log(pooled.ratio.value) == pytest.approx(0.4)
    assert pooled.tau == pytest.approx(np.sqrt(0.15))
    assert pooled.heterogeneity == pytest.approx(1 - 2 / 32)
    assert pooled.p_heterogeneity == pytest.approx(np.exp(-16))  # the tail of chi squared with 2 degrees of freedom
    assert [row.weight for row in pooled.rows] == pytest.approx([1 / 3] * 3)
    # Hartung-Knapp: the standard error is sqrt((.16 + 0 + .16) / 2 / 3), with t of 2 degrees of freedom.
    assert np.log(pooled.ratio.high) - 0.4 == pytest.approx(4.302653 * np.sqrt(0.16 / 3), rel=1e-6)


def test_datasets_that_agree_are_averaged_by_their_precision():
    pooled = pool_ratios({"a": estimate(0.4, 0.1), "b": estimate(0.4, 0.2)})
    assert pooled.tau == 0
    assert [row.weight for row in pooled.rows] == pytest.approx([0.8, 0.2])
    # They agree by luck: the interval is not narrower than their errors make it.
    assert np.log(pooled.ratio.high) - 0.4 == pytest.approx(1.959964 / np.sqrt(125), rel=1e-6)


def test_an_open_interval_has_no_weight():
    open_ended = Estimate(2.0, 1.5, float("inf"), 0.95, 10)
    pooled = pool_ratios({"a": estimate(0.4, 0.1), "b": estimate(0.4, 0.2), "c": open_ended})
    assert pooled.rows[2].weight == 0
    with pytest.raises(ValueError, match="1 of 2 datasets have a closed interval"):
        pool_ratios({"a": estimate(0.4, 0.1), "c": open_ended})
