from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from evaluation_world import Vectors, make_world
from scipy import stats

from recsys.evaluation import EvalConfig, IncomparableRuns, RanksInfo, compare
from recsys.evaluation.metrics import UnknownMetric
from recsys.evaluation.ranks import RANKS_SCHEMA, ranks_table

CONFIG = EvalConfig(bootstrap_samples=500, permutations=2000)


def runs(places: dict[str, list[int]], **info: str) -> pa.Table:
    """One target per user and domain, at the given rank among 101."""
    records = [
        {
            "protocol": "full",
            "user": user,
            "domain": domain,
            "target": 1 + user,
            "history": 5,
            "greater": place - 1,
            "ties": 0,
            "candidates": 101,
            "cross_entropy": 1.0,
        }
        for domain, column in places.items()
        for user, place in enumerate(column)
    ]
    about = {"split": "test", "split_hash": "aaaa", "seen": "none", "negatives": {}} | info
    return ranks_table([pa.Table.from_pylist(records, schema=RANKS_SCHEMA)], RanksInfo(**about))


def random_places(users: int, seed: int, top: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(1, top, users).tolist()


def test_a_comparison_by_hand():
    (food,) = compare({"old": [runs({"food": [2, 2, 4, 1]})], "new": [runs({"food": [1, 2, 2, 1]})]}, CONFIG, ["mrr"])
    assert food.key == "test/food/mrr"
    assert (food.baseline, food.treatment) == ("old", "new")
    assert (food.baseline_value, food.treatment_value) == (0.5625, 0.75)
    assert food.difference.value == 0.1875
    assert food.difference.n == 4
    assert food.relative == pytest.approx(1 / 3)
    differences = np.array([0.5, 0, 0.25, 0])
    assert food.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert food.p_permutation == 0.5, "both differences have one sign in half of the patterns"
    assert food.seed_error is None
    assert food.user_error == pytest.approx(differences.std() / 2, rel=0.1)


def test_p_values_and_intervals_of_many_users_agree_with_scipy():
    old, new = random_places(300, 0), random_places(300, 1, top=34)
    (found, *_) = compare({"old": [runs({"food": old})], "new": [runs({"food": new})]}, CONFIG, ["mrr"])
    differences = (1 / np.array(new) - 1 / np.array(old)).round(12)
    assert found.difference.value == pytest.approx(differences.mean())
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert found.p_permutation == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.03)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    )
    assert found.difference.low == pytest.approx(theirs.confidence_interval.low, abs=0.004)
    assert found.difference.high == pytest.approx(theirs.confidence_interval.high, abs=0.004)
    assert found.user_error == pytest.approx(theirs.standard_error, rel=0.1)


def test_a_better_treatment_has_a_positive_difference_and_a_small_p():
    """The tail matters: a worse treatment must not look better."""
    good, bad = random_places(200, 2, top=10), random_places(200, 3, top=60)
    up, *_ = compare({"old": [runs({"food": bad})], "new": [runs({"food": good})]}, CONFIG)
    down, *_ = compare({"old": [runs({"food": good})], "new": [runs({"food": bad})]}, CONFIG)
    assert up.key == "test/food/ndcg@10"
    assert up.difference.low > 0
    assert down.difference.high < 0
    assert up.difference.value == -down.difference.value
    assert max(up.p_permutation, up.p_wilcoxon, down.p_permutation, down.p_wilcoxon) < 0.01


def test_a_run_against_itself_differs_in_nothing():
    run = runs({"food": random_places(50, 4), "kitchen": random_places(50, 5)})
    for found in compare({"old": [run], "new": [run]}, CONFIG, ["ndcg@10", "auc"]):
        assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
        assert (found.effect_size, found.user_error) == (None, 0)
        assert found.p_permutation == found.p_wilcoxon == found.p_permutation_holm == found.p_wilcoxon_holm == 1


def test_a_baseline_of_zero_has_no_relative_difference():
    found, *_ = compare({"old": [runs({"food": [50, 60]})], "new": [runs({"food": [1, 60]})]}, CONFIG)
    assert found.relative is None


def test_holm_spans_all_comparisons_of_a_call():
    arms = {
        name: [runs({"food": random_places(60, seed), "kitchen": random_places(60, seed + 10)})]
        for seed, name in enumerate("abc")
    }
    found = compare(arms, CONFIG, ["ndcg@10", "mrr"])
    assert [(one.treatment, one.key) for one in found] == [
        (treatment, f"test/{group}/{metric}")
        for treatment in "bc"
        for group in ("food", "kitchen", "macro", "micro")
        for metric in ("ndcg@10", "mrr")
    ]
    smallest = min(found, key=lambda one: one.p_wilcoxon)
    assert smallest.p_wilcoxon_holm == pytest.approx(min(1, 16 * smallest.p_wilcoxon))
    smallest = min(found, key=lambda one: one.p_permutation)
    assert smallest.p_permutation_holm == pytest.approx(min(1, 16 * smallest.p_permutation))
    assert smallest.p_permutation_holm > smallest.p_permutation
    assert all(one.p_permutation_holm >= one.p_permutation for one in found)


def test_users_and_seeds_are_two_sources_of_variance():
    """Arms whose seeds differ much: the interval widens, and the seeds' share is told apart."""

    def arm(shifts: list[int], seed: int) -> list[pa.Table]:
        return [runs({"food": [place + shift for place in random_places(300, seed)]}) for shift in shifts]

    steady, *_ = compare({"old": arm([0, 0, 0], 0), "new": arm([2, 2, 2], 0)}, CONFIG, ["auc"])
    shaky, *_ = compare({"old": arm([0, 0, 0], 0), "new": arm([-8, 2, 12], 0)}, CONFIG, ["auc"])
    assert steady.difference.value == pytest.approx(-0.02)
    assert shaky.difference.value == pytest.approx(-0.02)
    assert steady.seed_error == pytest.approx(0)
    assert shaky.seed_error == pytest.approx(0.1 / np.sqrt(3))
    assert shaky.user_error == pytest.approx(steady.user_error, abs=1e-6)
    width = {one: one.difference.high - one.difference.low for one in (steady, shaky)}
    assert width[shaky] > width[steady] + 0.1
    one_seed, *_ = compare({"old": arm([0], 0), "new": arm([-8, 2, 12], 0)}, CONFIG, ["auc"])
    assert one_seed.seed_error is None


BASE = {"food": [3, 4, 5], "kitchen": [1, 2, 3]}


def change(ranks: pa.Table, column: str, value: int | str, row: int = 0) -> pa.Table:
    records = ranks.to_pylist()
    records[row][column] = value
    return ranks_table([pa.Table.from_pylist(records, schema=RANKS_SCHEMA)], RanksInfo.of(ranks))


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (runs(BASE, split_hash="bbbb"), "the split's hash aaaa against bbbb"),
        (runs(BASE, split="validation"), "the split test against validation"),
        (runs(BASE, seen="history"), "seen items none against history"),
        (runs({"food": [3, 4, 5, 6], "kitchen": [1, 2, 3]}), r"1 users that only one of them ranked \(3\)"),
        (runs({"food": [3, 4, 5]}), "targets in food, kitchen against food; they can be compared within food"),
        (runs({"garden": [3, 4, 5]}), "targets in food, kitchen against garden$"),
        (change(runs(BASE), "target", 77), "other targets in 1 of 6 ranks"),
        (change(runs(BASE), "candidates", 102), "other numbers of candidates in 1 of 6 ranks"),
        (change(runs(BASE), "domain", "kitchen"), "other domains in 1 of 6 ranks"),
        (change(runs(BASE), "protocol", "all"), "protocols full against all, full"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: pa.Table, complaint: str):
    with pytest.raises(IncomparableRuns, match=rf"old \(run 1\) and new \(run 1\) cannot be compared: .*{complaint}"):
        compare({"old": [runs(BASE)], "new": [other]}, CONFIG)
    with pytest.raises(IncomparableRuns, match=r"old \(run 1\) and old \(run 2\)"):
        compare({"old": [runs(BASE), other], "new": [runs(BASE)]}, CONFIG)


def test_other_negatives_are_refused():
    world = make_world((300, 200), users=10)
    tables = [
        world.evaluate(Vectors(500), EvalConfig(protocols=("full", "uni_100"), seed=seed)).ranks for seed in (0, 0, 1)
    ]
    found = compare({"old": [tables[0]], "new": [tables[1]]}, CONFIG)
    assert {one.key for one in found} >= {"test/food/ndcg@10", "test/food/ndcg@10[uni_100]"}
    with pytest.raises(
        IncomparableRuns, match="other negatives for uni_100 in food; other negatives for uni_100 in kitchen"
    ):
        compare({"old": [tables[0]], "new": [tables[2]]}, CONFIG)


def test_a_run_on_one_domain_is_held_against_a_run_on_two_within_that_domain():
    """The single-domain run sees other histories, and still meets the same candidates and negatives."""
    world = make_world((300, 200), users=10)
    config = EvalConfig(protocols=("full", "abxi_999"), permutations=100, bootstrap_samples=50)
    own = [index for index, target in enumerate(world.targets) if target <= 300]
    alone = replace(
        world,
        users=[world.users[row] for row in own],
        histories=[[item for item in world.histories[row] if item <= 300] or [world.targets[row]] for row in own],
        targets=[world.targets[row] for row in own],
    )
    both, one = world.evaluate(Vectors(500), config).ranks, alone.evaluate(Vectors(500, seed=2), config).ranks
    with pytest.raises(IncomparableRuns, match="compared within food"):
        compare({"merged": [both], "single": [one]}, config)
    found = compare({"merged": [both], "single": [one]}, config, domains=["food"])
    assert [comparison.key for comparison in found] == ["test/food/ndcg@10[abxi_999]", "test/food/ndcg@10"]
    assert all(comparison.difference.n == 10 for comparison in found)
    with pytest.raises(ValueError, match="no targets in kitchen; a run has food"):
        compare({"merged": [both], "single": [one]}, config, domains=["kitchen"])


def test_all_problems_are_told_at_once():
    with pytest.raises(IncomparableRuns, match="aaaa against bbbb; other targets in 1 of 6"):
        compare({"old": [runs(BASE)], "new": [change(runs(BASE, split_hash="bbbb"), "target", 77)]}, CONFIG)


def test_one_arm_or_an_empty_one_is_no_comparison():
    for arms in ({"old": [runs(BASE)]}, {"old": [runs(BASE)], "new": []}):
        with pytest.raises(ValueError, match="at least two arms"):
            compare(arms, CONFIG)


def test_an_unknown_metric_is_refused():
    with pytest.raises(UnknownMetric, match="map@10"):
        compare({"old": [runs(BASE)], "new": [runs(BASE)]}, CONFIG, ["map@10"])
