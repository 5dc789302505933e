"""Published points, and the fits that they must give."""

import numpy as np
import pytest

from recsys.scaling.compare import Arm, Extrapolation, interpolated_ratio
from recsys.scaling.isoflop import fit_power_line, isoflop_parabolas, optimal_sizes
from recsys.scaling.laws import ONE_EXPONENT, SCORE_OF_LOSS, TWO_AXES, fit_law
from recsys.scaling.robust import fit_huber, fit_lad

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def chinchilla(published):
    """Parameters and tokens, loss and compute of the 240 points that Besiroglu et al. keep: all but the 5 worst."""
    table = published("besiroglu2024_svg_extracted_data.csv").nsmallest(240, "loss")
    n, compute = table["Model Size"].to_numpy(), table["Training FLOP"].to_numpy()
    return np.stack([n, compute / 6 / n], axis=1), table["loss"].to_numpy(), compute


def test_besiroglu_by_huber(chinchilla):
    x, y, _ = chinchilla
    law = fit_huber(TWO_AXES, x, y)
    assert law.objective <= 1.018275e-3
    assert law.search.agreeing == law.search.starts
    assert law.search.gradient < 1e-6
    found = law.parameters
    assert (found["A"], found["B"]) == pytest.approx((477.826, 2143.42), rel=1e-5)
    assert (found["E"], found["a"], found["b"]) == pytest.approx((1.817218, 0.347311, 0.367172), abs=1e-6)


def test_besiroglu_by_least_absolute_deviations(chinchilla):
    # What is published as Huber's fit: its scale parameter shrinks until the loss is the absolute value.
    x, y, _ = chinchilla
    law = fit_lad(TWO_AXES, x, y)
    assert law.objective == pytest.approx(1.12949465, abs=1e-7)
    found = law.parameters
    assert (found["A"], found["B"]) == pytest.approx((482.006, 2085.436), abs=2e-3)
    assert (found["E"], found["a"], found["b"]) == pytest.approx((1.816864, 0.347813, 0.365854), abs=1e-6)


@pytest.mark.parametrize(("delta", "a", "b"), [(1e-2, 0.3544, 0.3815), (1.0, 0.36025, 0.40588)])
def test_besiroglu_depends_on_the_threshold(chinchilla, delta, a, b):
    x, y, _ = chinchilla
    found = fit_huber(TWO_AXES, x, y, delta).parameters
    assert (found["a"], found["b"]) == pytest.approx((a, b), abs=1e-4)


def test_least_squares_of_the_loss(chinchilla):
    x, y, compute = chinchilla
    law = fit_law(TWO_AXES, x, y)
    assert law.rss == pytest.approx(0.0832038, abs=1e-7)
    assert law.parameters == pytest.approx(
        {"E": 1.882814, "A": 567.805, "B": 7581.85, "a": 0.357615, "b": 0.427621}, rel=3e-6
    )
    small = compute < 1e21
    assert small.sum() == 217
    law = fit_law(TWO_AXES, x[small] / [1e6, 1e9], y[small])
    assert law.rss == pytest.approx(0.0624143, abs=1e-7)
    assert law.parameters == pytest.approx(
        {"E": 1.90509, "A": 4.00052, "B": 1.05095, "a": 0.351058, "b": 0.458742}, rel=1e-5
    )


def test_porian(published):
    """Fifteen exponents of the best size over compute, from .835 down to .497 as the tuning gets fairer."""
    pairs = published("porian2024_optimal_pairs.csv")
    fits = published("porian2024_published_fits.csv")
    assert len(fits) == 15
    for row in fits.itertuples():
        at = pairs[(pairs["file"] == row.file) & (pairs["dataset"] == row.dataset) & (pairs["label"] == row.label)]
        line = fit_power_line(at["flops"].to_numpy(), at["n_star"].to_numpy(), at["n_star_logstd"].to_numpy() ** -2.0)
        assert line.exponent == pytest.approx(row.n_exponent, abs=5e-4), row.label
    chain = fits[(fits["dataset"] == "rw")]["n_exponent"][:5].round(3).tolist()
    assert chain == [0.835, 0.706, 0.602, 0.571, 0.497]


def test_gadre(published):
    """Five small runs predict the loss of two large ones, and with a sixth their error on seventeen tasks."""
    runs = published("gadre2024_overtraining_104models.csv")
    runs = runs[runs["train_dataset"] == "rpj"]
    single = runs["chinchilla_multiplier"] == 1
    tiny = runs["arch"] == "d=96_l=8_h=4"
    small = runs["arch"].isin(["d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8"])
    few = runs[(small & single) | (tiny & (runs["chinchilla_multiplier"] == 16))]
    assert len(few) == 5
    axes = ["N", "D"]
    law = fit_law(ONE_EXPONENT, few[axes].to_numpy(float), few["loss_c4_val"].to_numpy())

    large = runs[(runs["arch"] == "open_lm_7b") | ((runs["arch"] == "open_lm_1b") & ~single)].sort_values("N")
    loss = law.predict(large[axes].to_numpy(float))
    measured = large["loss_c4_val"].to_numpy()
    assert 100 * np.abs(loss / measured - 1) == pytest.approx([0.7103, 0.7320], abs=1e-4)

    six = runs[runs.index.isin(few.index) | ((runs["arch"] == "open_lm_1b") & single)]
    link = fit_law(SCORE_OF_LOSS, six["loss_c4_val"].to_numpy()[:, None], 1 - six["err_avg17"].to_numpy())
    error, measured = 1 - link.predict(loss[:, None]), large["err_avg17"].to_numpy()
    assert 100 * np.abs(error / measured - 1) == pytest.approx([3.6365, 0.0464], abs=1e-3)


def test_llama_3(published):
    runs = published("openathena_isoflops_llama_3.csv")
    runs = runs[runs["condition"] == "raw_loss"]
    line = optimal_sizes(
        isoflop_parabolas(runs["budget"].to_numpy(float), runs["tokens"].to_numpy(float), runs["loss"].to_numpy())
    )
    assert (line.exponent, line.coefficient) == pytest.approx((0.5368, 0.2994), abs=1e-4)
    assert line.predict(np.array([3.8e25]))[0] == pytest.approx(1.610e13, rel=1e-3)


def arm(table, name: str) -> Arm:
    runs = table[(table["model"] == name) & table["rel_logloss_task1_pct"].notna() & table["note"].ne("LossX")]
    return Arm(name, runs["gflop_per_example"].to_numpy(float), runs["rel_logloss_task1_pct"].to_numpy(float))


def test_wukong(published):
    table = published("wukong_table5.csv")
    wukong = arm(table, "Wukong")
    line = fit_power_line(wukong.sizes, 100 + wukong.values)
    assert (line.coefficient, line.exponent) == pytest.approx((99.560, -0.000707), abs=5e-4)
    assert line.exponent == pytest.approx(-0.000707, abs=5e-7)

    dcn = arm(table, "DCNv2")
    assert interpolated_ratio(dcn, wukong, -0.43) == pytest.approx(41.7, abs=0.05)
    # The fitted line would say 50.5, beyond its own smallest run.
    best = arm(table, "AutoInt+")
    with pytest.raises(Extrapolation, match=r"Wukong is at -0\.35 with its smallest size already"):
        interpolated_ratio(best, wukong, float(best.values.min()))
    with pytest.raises(Extrapolation, match=r"DCNv2 never reaches -0\.7"):
        interpolated_ratio(dcn, wukong, -0.7)
