"""Laws that are known come out of their own points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.scaling.isoflop import Optimum, fit_power_line, isoflop_parabolas, optimal_sizes, optimum
from recsys.scaling.laws import (
    DATA_CONSTRAINED,
    ONE_EXPONENT,
    POWER_LAW,
    SCORE_OF_LOSS,
    TWO_AXES,
    Form,
    TooFewPoints,
    confidence,
    fit_law,
)
from recsys.scaling.projection import project
from recsys.scaling.robust import fit_huber, fit_lad

SIZES = np.geomspace(1e4, 1e8, 8)
GRID = np.stack([axis.ravel() for axis in np.meshgrid(SIZES, np.geomspace(1e6, 1e9, 6))], axis=1)


def evaluate(form: Form, x: np.ndarray, shape: list[float], coefficients: list[float]) -> np.ndarray:
    return np.exp(form.log_columns(x, np.array(shape))) @ np.array(coefficients)


@pytest.mark.parametrize("fit", [fit_law, fit_huber, fit_lad])
def test_a_power_law_without_noise(fit):
    law = fit(POWER_LAW, SIZES[:, None], 1.7 + 33 * SIZES**-0.31)
    assert law.parameters == pytest.approx({"E": 1.7, "A": 33, "a": 0.31}, rel=1e-6)
    assert law.rss < 1e-15
    assert law.search.at_bounds == ()


@pytest.mark.parametrize("fit", [fit_law, fit_huber, fit_lad])
def test_two_axes_without_noise(fit):
    law = fit(TWO_AXES, GRID, 1.7 + 400 * GRID[:, 0] ** -0.34 + 410 * GRID[:, 1] ** -0.28)
    assert law.parameters == pytest.approx({"E": 1.7, "A": 400, "B": 410, "a": 0.34, "b": 0.28}, rel=1e-6)


def test_one_exponent_for_both_axes_without_noise():
    law = fit_law(ONE_EXPONENT, GRID, 1.7 + 400 * GRID[:, 0] ** -0.3 + 410 * GRID[:, 1] ** -0.3)
    assert law.parameters == pytest.approx({"E": 1.7, "A": 400, "B": 410, "a": 0.3}, rel=1e-6)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(st.floats(0.05, 1.5), st.floats(0.0, 5.0), st.floats(0.1, 10.0))
def test_any_power_law_without_noise(exponent, floor, reducible):
    y = floor + reducible * (SIZES / 1e6) ** -exponent
    law = fit_law(POWER_LAW, SIZES[:, None], y)
    assert law.predict(SIZES[:, None]) == pytest.approx(y, rel=1e-6, abs=1e-8)
    assert law.shape[0] == pytest.approx(exponent, rel=1e-5)


def test_a_score_that_saturates_is_fitted_as_one_minus_itself():
    ndcg = 0.2 - 0.9 * SIZES**-0.25
    law = fit_law(POWER_LAW, SIZES[:, None], 1 - ndcg)
    assert 1 - law.parameters["E"] == pytest.approx(0.2, rel=1e-6)


def test_a_metric_from_the_loss():
    losses = np.linspace(2.4, 6, 8)
    law = fit_law(SCORE_OF_LOSS, losses[:, None], 0.14 + 2.2 * np.exp(-0.7 * losses))
    assert law.parameters == pytest.approx({"E": 0.14, "A": 2.2, "g": 0.7}, rel=1e-6)


REPEATED = {"E": 1.86914, "A": 520.825, "B": 1487.716, "a": 0.3526596, "b": 0.3526596}
"""The coefficients of Muennighoff et al. (2023), to the digits that they print."""


@pytest.mark.parametrize(
    ("n", "d", "unique", "loss"),
    [(8.7e9, 178e9, 25e9, 2.226848), (4.2e9, 84e9, 84e9, 2.288417), (2.8e9, 55e9, 1.25e9, 2.701207)],
)
def test_repeated_data_in_numbers(n, d, unique, loss):
    a = REPEATED["a"]
    fitting = Optimum((REPEATED["A"] / REPEATED["B"]) ** (1 / (2 * a)), a, a).parameters(unique)
    x = np.array([[n, d, unique, fitting]])
    found = evaluate(DATA_CONSTRAINED, x, [a, a, 15.387756, 5.309743], [REPEATED[k] for k in "EAB"])
    assert found[0] == pytest.approx(loss, abs=1e-5)


def test_repeated_data_without_noise():
    rng = np.random.default_rng(0)
    unique = 10 ** rng.uniform(8, 10, 60)
    x = np.stack([10 ** rng.uniform(7, 10, 60), unique * rng.choice([0.5, 1, 2, 4, 10, 40], 60), unique, unique], 1)
    law = fit_law(DATA_CONSTRAINED, x, evaluate(DATA_CONSTRAINED, x, [0.35, 0.3, 15.4, 5.3], [1.9, 520, 1490]))
    truth = {"E": 1.9, "A": 520, "B": 1490, "a": 0.35, "b": 0.3, "R_D": 15.4, "R_N": 5.3}
    assert law.parameters == pytest.approx(truth, rel=1e-6)


def test_epochs_are_worth_less_and_less():
    # D' / U with R_D = 15.39: 2, 4, 16 and 100 epochs count as 1.97, 3.73, 10.6 and 16.4 epochs of new data.
    x = np.stack([np.ones(4), np.array([2.0, 4, 16, 100]), np.ones(4), np.ones(4)], axis=1)
    worth = np.exp(-DATA_CONSTRAINED.log_columns(x, np.array([1.0, 1.0, 15.387756, 5.309743]))[:, 2])
    assert worth == pytest.approx([1.968, 3.726, 10.582, 16.363], abs=5e-4)


def test_robust_fits_shrug_off_a_failed_run():
    y = 1.7 + 33 * SIZES**-0.31
    y[3] *= 1.5
    assert fit_lad(POWER_LAW, SIZES[:, None], y).parameters["a"] == pytest.approx(0.31, rel=1e-6)
    assert fit_huber(POWER_LAW, SIZES[:, None], y).parameters["a"] == pytest.approx(0.31, rel=0.02)
    assert fit_law(POWER_LAW, SIZES[:, None], y).parameters["a"] != pytest.approx(0.31, rel=0.1)


def test_weights_are_inverse_variances():
    x = np.concatenate([SIZES, SIZES])[:, None]
    y = 1.7 + 33 * x[:, 0] ** -0.31 + np.repeat([0.0, 0.3], 8)
    # A point of weight 3 is three points.
    weighted = fit_law(POWER_LAW, x, y, np.repeat([3.0, 1.0], 8))
    repeated = fit_law(POWER_LAW, np.concatenate([x, x[:8], x[:8]]), np.concatenate([y, y[:8], y[:8]]))
    assert weighted.parameters == pytest.approx(repeated.parameters, rel=1e-6)


def test_what_the_data_do_not_determine_is_said():
    flat = fit_law(POWER_LAW, SIZES[:, None], 3.0 + 1e-3 * np.array([1.0, -1, 1, -1, 1, -1, 1, -1]))
    assert flat.search.at_bounds
    no_floor = fit_law(POWER_LAW, SIZES[:, None], 33 * SIZES**-0.31)
    assert no_floor.parameters["E"] == pytest.approx(0, abs=1e-6)


def test_too_few_points_and_failed_runs_are_refused():
    with pytest.raises(TooFewPoints, match="3 parameters and there are 3 points; at least 4"):
        fit_law(POWER_LAW, SIZES[:3, None], np.ones(3))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="leave failed runs out"):
            fit_law(POWER_LAW, SIZES[:, None], np.full(8, bad))
    with pytest.raises(ValueError, match="above 0"):
        fit_huber(POWER_LAW, SIZES[:, None], np.zeros(8))


def test_project_solves_non_negative_least_squares():
    from scipy.optimize import nnls

    rng = np.random.default_rng(0)
    columns, y = rng.normal(size=(40, 9, 3)), rng.normal(size=9)
    found = project(columns, y)
    for matrix, coefficients, rss in zip(columns, found.coefficients, found.rss, strict=True):
        expected, norm = nnls(matrix, y)
        assert coefficients == pytest.approx(expected, abs=1e-10)
        assert rss == pytest.approx(norm**2)
    assert (found.coefficients == 0).any()


def test_columns_that_say_the_same_are_not_both_used():
    same = np.ones((1, 5, 2))
    found = project(same, np.arange(5.0))
    assert sorted(found.coefficients[0]) == pytest.approx([0, 2])


def test_the_band_of_a_law_covers_it():
    rng = np.random.default_rng(0)
    x, truth = SIZES[:, None], 4 + 20 * SIZES**-0.25
    covered = []
    for _ in range(40):
        y = truth + rng.normal(0, 0.01, 8)
        law = fit_law(POWER_LAW, x, y)
        left = confidence(law, x, y)
        low, high = left.band(x)
        assert (low <= law.predict(x) + 1e-9).all()
        assert (law.predict(x) <= high + 1e-9).all()
        a_low, a_high = left.parameter("a")
        e_low, e_high = left.parameter("E")
        covered.append([*(low <= truth) & (truth <= high), a_low <= 0.25 <= a_high, e_low <= 4 <= e_high])
    assert np.mean(covered, axis=0) == pytest.approx(0.95, abs=0.08)


def test_a_profile_interval_is_that_of_a_line_where_the_shape_is_known():
    # With a known exponent the law is a regression line, whose interval has a textbook form.
    rng = np.random.default_rng(1)
    z = SIZES**-0.25
    y = 4 + 20 * z + rng.normal(0, 0.01, 8)
    from scipy.stats import t

    projected = project(np.stack([np.ones(8), z], axis=1)[None], y)
    variance = projected.rss[0] / 6
    expected = t.ppf(0.975, 6) * np.sqrt(variance * (1 / 8 + z.mean() ** 2 / ((z - z.mean()) ** 2).sum()))
    limit = projected.rss[0] + t.ppf(0.975, 6) ** 2 * variance
    assert projected.half_width(np.array([[1.0, 0.0]]), float(limit))[0] == pytest.approx(expected)


# Compute-optimal sizes


@pytest.mark.parametrize(
    ("a", "b", "slope", "ratio"), [(0.31, 0.31, 0.5, 1.0), (0.34, 0.28, 0.451613, 1.0534), (0.465, 0.155, 0.25, 1.2984)]
)
def test_parabolas_are_biased_where_the_exponents_differ(a, b, slope, ratio):
    best = Optimum(((a * 406.4) / (b * 410.7)) ** (1 / (a + b)), a, b)
    budgets, sizes = [], []
    for budget in np.geomspace(1e17, 1e21, 5):
        budgets.append(np.full(15, budget))
        sizes.append(best.for_compute(budget)[0] * 10 ** np.linspace(-1.2, 1.2, 15))
    budgets, sizes = np.concatenate(budgets), np.concatenate(sizes)
    losses = 1.69 + 406.4 * sizes**-a + 410.7 * (budgets / 6 / sizes) ** -b
    parabolas = isoflop_parabolas(budgets, sizes, losses)
    line = optimal_sizes(parabolas)
    assert line.exponent == pytest.approx(slope, abs=1e-6)
    assert line.predict(np.array([1e19]))[0] / best.for_compute(1e19)[0] == pytest.approx(ratio, abs=1e-4)


def test_the_optimum_of_published_laws():
    # Besiroglu et al. (2024) and Hoffmann et al. (2022) at the compute of Chinchilla.
    for (a_, b_, a, b), (n, d, exponent) in (
        ((482.01, 2085.43, 0.3478, 0.3658), (7.2249e10, 1.3287e12, 0.5126)),
        ((406.4, 410.7, 0.34, 0.28), (3.2190e10, 2.9823e12, 0.4516)),
    ):
        best = Optimum(((a * a_) / (b * b_)) ** (1 / (a + b)), a, b)
        assert best.for_compute(5.76e23) == pytest.approx((n, d), rel=2e-3)
        assert b / (a + b) == pytest.approx(exponent, abs=1e-4)
        parameters, examples = best.for_compute(1e20)
        assert best.parameters(examples) == pytest.approx(parameters)


def test_the_optimum_of_a_fit():
    law = fit_law(TWO_AXES, GRID, 1.7 + 400 * GRID[:, 0] ** -0.34 + 410 * GRID[:, 1] ** -0.28)
    expected = Optimum(((0.34 * 400) / (0.28 * 410)) ** (1 / 0.62), 0.34, 0.28)
    assert optimum(law).for_compute(1e20) == pytest.approx(expected.for_compute(1e20), rel=1e-5)


def test_parabolas_without_a_lowest_point_are_refused():
    sizes = np.array([1e6, 1e7, 1e8])
    with pytest.raises(ValueError, match="no lowest point"):
        isoflop_parabolas(np.full(3, 1e18), sizes, np.array([3.0, 3.2, 3.0]))
    with pytest.raises(ValueError, match="fewer than three sizes"):
        isoflop_parabolas(np.full(3, 1e18), np.array([1e6, 1e6, 1e7]), np.ones(3))
    outside = isoflop_parabolas(np.full(3, 1e18), sizes, np.array([3.0, 2.5, 2.2]))
    assert not outside[0].inside
    with pytest.raises(ValueError, match="0 of 1 budgets"):
        optimal_sizes(outside)


def test_a_power_line():
    x = np.array([1.0, 10, 100])
    line = fit_power_line(x, 3 * x**0.5)
    assert (line.coefficient, line.exponent) == pytest.approx((3, 0.5))
    bent = np.array([1.0, 10, 1000])
    assert fit_power_line(x, bent, np.array([1.0, 1, 1e-9])).exponent == pytest.approx(1, abs=1e-6)
