import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recsys.evaluation.evaluate import EvalConfig
from recsys.evaluation.inference import holm, permutation_test, summarize, user_sums, wilcoxon_test
from recsys.evaluation.ranks import RANKS_SCHEMA, RanksInfo, ranks_table

CONFIG = EvalConfig(ks=(1, 10), bootstrap_samples=400)


def table(
    rows: list[tuple[int, str, int]], protocol: str = "full", ties: int = 0, candidates: dict[int, int] | None = None
) -> pa.Table:
    """Ranks of (user, domain, rank) among 101 candidates, or as many as `candidates` says for a user."""
    records = [
        {
            "protocol": protocol,
            "user": user,
            "domain": domain,
            "target": number + 1,
            "history": 5,
            "greater": place - 1,
            "ties": ties,
            "candidates": (candidates or {}).get(user, 101),
            "cross_entropy": None,
        }
        for number, (user, domain, place) in enumerate(rows)
    ]
    return ranks_table([pa.Table.from_pylist(records, schema=RANKS_SCHEMA)], RanksInfo("test", "abc", "none", {}))


def test_values_by_hand():
    found = summarize(table([(0, "food", 1), (1, "food", 3), (2, "food", 2), (0, "kitchen", 4)]), CONFIG)
    assert found["test/food/hr@1"].value == pytest.approx(1 / 3)
    assert found["test/food/mrr"].value == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found["test/kitchen/mrr"].value == 0.25
    assert found["test/macro/mrr"].value == pytest.approx(((1 + 1 / 3 + 1 / 2) / 3 + 0.25) / 2)
    assert found["test/micro/mrr"].value == pytest.approx((1 + 1 / 3 + 1 / 2 + 0.25) / 4)
    assert found["test/food/auc"].value == pytest.approx((1 + 0.98 + 0.99) / 3)
    assert [found[f"test/{group}/mrr"].n for group in ("food", "kitchen", "macro", "micro")] == [3, 1, 3, 3]
    assert "test/food/cross_entropy" not in found, "all null"


def test_the_tie_rule_is_the_config_s_but_for_protocols_that_have_their_own():
    rows = [(0, "food", 1)]
    config = EvalConfig(ks=(1,), ties="pessimistic", bootstrap_samples=1)
    assert summarize(table(rows, ties=3), config)["test/food/hr@1"].value == 0
    assert summarize(table(rows, ties=3), CONFIG)["test/food/hr@1"].value == 0.25
    for protocol in ("c2dsr_999", "abxi_999_compat"):
        assert summarize(table(rows, protocol, ties=3), config)[f"test/food/hr@1[{protocol}]"].value == 1


def test_one_user_has_an_interval_of_no_width():
    found = summarize(table([(0, "food", 3)]), CONFIG)["test/food/mrr"]
    assert (found.value, found.low, found.high, found.n) == (1 / 3, 1 / 3, 1 / 3, 1)


def test_intervals_are_repeatable_and_hold_their_value():
    generator = np.random.default_rng(0)
    rows = [(user, "food", int(generator.integers(1, 50))) for user in range(200)]
    first, second = summarize(table(rows), CONFIG), summarize(table(rows[::-1]), CONFIG)
    assert first["test/food/mrr"] == second["test/food/mrr"]
    for found in first.values():
        assert found.low <= found.value <= found.high
    other = summarize(table(rows), CONFIG.model_copy(update={"seed": 1}))
    assert other["test/food/mrr"] != first["test/food/mrr"]


def test_a_user_with_several_targets_is_one_cluster():
    """Ten copies of each user's target must not make the interval narrower."""
    generator = np.random.default_rng(1)
    rows = [(user, "food", int(generator.integers(1, 30))) for user in range(100)]
    once, often = summarize(table(rows), CONFIG), summarize(table([row for row in rows for _ in range(10)]), CONFIG)
    assert often["test/food/mrr"].n == 100
    for key, found in once.items():
        assert (often[key].low, often[key].high) == pytest.approx((found.low, found.high))


def test_domains_of_one_user_are_resampled_together():
    """Where the two domains' values cancel within every user, the macro mean does not vary at all."""
    hits = np.random.default_rng(2).integers(0, 2, 100)
    rows = [
        (user, domain, 1 if hit else 50)
        for user, hit in enumerate(hits)
        for domain, hit in (("a", hit), ("b", 1 - hit))
    ]
    found = summarize(table(rows), CONFIG)
    assert found["test/a/hr@1"].high - found["test/a/hr@1"].low > 0.1
    assert found["test/macro/hr@1"].low == pytest.approx(found["test/macro/hr@1"].high) == pytest.approx(0.5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    config = EvalConfig(ks=(10,), bootstrap_samples=300)
    covered, simulations = 0, 200
    for simulation in range(simulations):
        hits = generator.random(120) < 0.3
        ranks = table([(user, "food", 1 if hit else 50) for user, hit in enumerate(hits)])
        found = summarize(ranks, config.model_copy(update={"seed": simulation}))["test/food/hr@10"]
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / simulations <= 0.99


def test_an_undefined_value_takes_no_part():
    """AUC of user 1, whose only candidate is the target; in domain b it is defined for nobody."""
    ranks = table([(0, "a", 3), (1, "a", 1), (1, "b", 1)], candidates={1: 1})
    found = summarize(ranks, CONFIG)
    assert [found[f"test/{group}/auc"].value for group in ("a", "macro", "micro")] == [0.98] * 3
    assert [found[f"test/{group}/auc"].n for group in ("a", "macro", "micro")] == [1] * 3
    assert "test/b/auc" not in found
    assert found["test/micro/hr@1"].n == 2
    sums = user_sums(ranks, "full", ("auc",), "average")
    assert np.isnan(sums.contributions()[:, :, 0]).tolist() == [[False, True, False, False], [True] * 4]


def test_contributions_add_up_to_the_means():
    generator = np.random.default_rng(4)
    rows = [
        (int(generator.integers(20)), "ab"[int(generator.integers(2))], int(generator.integers(1, 30)))
        for _ in range(60)
    ]
    sums = user_sums(table(rows), "full", ("mrr", "hr@10"), "average")
    assert np.nansum(sums.contributions(), axis=0) == pytest.approx(sums.means())
    assert (~np.isnan(sums.contributions())).sum(0).tolist() == sums.users().tolist()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_an_enumerated_permutation_test_agrees_with_scipy(values: list[int]):
    differences = np.array(values, dtype=float)
    if len(values) == 1:
        assert permutation_test(differences, 10_000, seed=0) == 1
        return
    theirs = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert permutation_test(differences, 10_000, seed=0) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("seed", range(10))
def test_rounding_does_not_hide_the_observed_pattern(seed: int):
    """Where all differences are positive, only the observed pattern and its mirror are as extreme."""
    assert permutation_test(np.random.default_rng(seed).random(11), 10_000, seed=0) == 2 / 2**11


def test_a_drawn_permutation_test_agrees_with_enumeration():
    differences = np.random.default_rng(5).normal(0.4, 1, 15)
    exact = permutation_test(differences, 2**15, seed=0)
    assert permutation_test(differences, 20_000, seed=0) == pytest.approx(exact, abs=0.01)
    assert permutation_test(differences, 20_000, seed=0) == permutation_test(differences, 20_000, seed=0)


def test_a_drawn_p_value_is_never_zero_and_no_difference_gives_one():
    assert permutation_test(np.full(500, 0.3), 999, seed=0) == 1 / 1000
    assert permutation_test(np.zeros(500), 999, seed=0) == 1
    assert wilcoxon_test(np.zeros(500)) == 1


def test_wilcoxon_agrees_with_scipy_and_leaves_out_zeros():
    differences = np.random.default_rng(6).normal(0.2, 1, 80)
    assert wilcoxon_test(differences) == stats.wilcoxon(differences).pvalue
    padded = np.concatenate([differences, np.zeros(40)])
    assert wilcoxon_test(padded) == pytest.approx(stats.wilcoxon(differences, method="approx").pvalue)


def test_the_null_is_rejected_about_as_often_as_it_should():
    generator = np.random.default_rng(7)
    p_values = [permutation_test(generator.normal(0, 1, 30), 500, seed) for seed in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03, 0.2]) == pytest.approx([0.04, 0.06, 0.06, 0.2])
    assert holm([0.2, 0.005]) == pytest.approx([0.2, 0.01])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
