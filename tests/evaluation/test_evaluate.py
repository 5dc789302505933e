import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_world import Constant, Oracle, Vectors, make_world
from pydantic import ValidationError
from torch import Tensor

from recsys.evaluation import EvalConfig, NonFiniteScores, RanksInfo, evaluate, rank_full, summarize
from recsys.evaluation.coverage import Coverage
from recsys.evaluation.evaluate import Evaluation
from recsys.evaluation.protocols import PROTOCOLS
from recsys.evaluation.rank import RankInterval
from recsys.evaluation.ranks import RANKS_SCHEMA
from recsys.evaluation.running import RankingMetrics
from recsys.evaluation.search import cached_rows, largest
from recsys.types import Batch, Catalog, Scorer

WORLD = make_world()
ANY_MODEL = {name: protocol for name, protocol in PROTOCOLS.items() if not protocol.by_thread}
EVERY = EvalConfig(protocols=tuple(ANY_MODEL), bootstrap_samples=50)
POOL = {"full": (1100, 1300), "all": (2400, 2400)}
COUNT = {"abxi_999": 1000, "abxi_999_compat": 1000, "c2dsr_999": 1000, "uni_100": 101, "pop_100": 101}
DCG = {k: sum(1 / math.log2(1 + place) for place in range(1, k + 1)) for k in (5, 10, 20)}


def harmonic(n: int) -> float:
    return sum(1 / place for place in range(1, n + 1))


def values(evaluation: Evaluation, config: EvalConfig = EVERY) -> dict[str, float]:
    return {key: interval.value for key, interval in summarize(evaluation.ranks, config).items()}


def test_the_table_of_ranks():
    ranks = WORLD.evaluate(Vectors(2400), EVERY).ranks
    assert ranks.schema.equals(RANKS_SCHEMA)
    assert len(ranks) == 80 * len(ANY_MODEL)
    frame = ranks.to_pandas()
    full = frame[frame.protocol == "full"]
    assert full[["user", "history", "target"]].apply(tuple, axis=1).tolist() == sorted(
        zip(WORLD.users, map(len, WORLD.histories), WORLD.targets, strict=True)
    )
    assert frame.groupby("protocol").cross_entropy.count().to_dict() == {
        name: 80 if name in POOL else 0 for name in ANY_MODEL
    }
    sampled = frame[frame.protocol == "abxi_999"]
    assert set(sampled.candidates) == {1000}


def test_what_the_table_was_computed_on_stays_with_its_file(tmp_path):
    ranks = WORLD.evaluate(Vectors(2400), EVERY).ranks
    pq.write_table(ranks, tmp_path / "ranks.parquet")
    info = RanksInfo.of(pq.read_table(tmp_path / "ranks.parquet"))
    assert (info.split, info.split_hash, info.seen) == ("test", "5917", "history")
    assert set(info.negatives) == set(COUNT)
    assert all(set(hashes) == {"food", "kitchen"} for hashes in info.negatives.values())
    with pytest.raises(ValueError, match="does not say which split"):
        RanksInfo.of(pa.table({"user": [1]}))


@pytest.mark.parametrize("seen", ["none", "history"])
def test_a_constant_scorer_gets_the_random_expectation(seen):
    config = EvalConfig(protocols=tuple(ANY_MODEL), seen=seen, bootstrap_samples=10)
    evaluation = WORLD.evaluate(Constant(), config)
    found = values(evaluation, config)
    frame = evaluation.ranks.to_pandas()
    for domain, index in (("food", 0), ("kitchen", 1)):
        for name, protocol in ANY_MODEL.items():
            suffix = "" if name == "full" else f"[{name}]"
            rows = frame[(frame.protocol == name) & (frame.domain == domain)]
            if name in COUNT:
                assert set(rows.candidates) == {COUNT[name]}
            elif seen == "none":
                assert set(rows.candidates) == {POOL[name][index]}
            else:
                assert POOL[name][index] - 13 < rows.candidates.mean() < POOL[name][index]
            if protocol.ties == "optimistic":
                expected = {f"ndcg@{k}": 1.0 for k in DCG} | {"mrr": 1.0, "auc": 1.0}
            else:
                expected = {f"ndcg@{k}": (dcg / rows.candidates).mean() for k, dcg in DCG.items()}
                expected |= {f"hr@{k}": (k / rows.candidates).mean() for k in DCG}
                expected |= {"auc": 0.5, "mrr": rows.candidates.map(lambda n: harmonic(n) / n).mean()}
            for metric, value in expected.items():
                assert found[f"test/{domain}/{metric}{suffix}"] == pytest.approx(value, rel=1e-9), (name, metric)
    assert found["test/food/ndcg@10[abxi_999]"] == pytest.approx(0.0045, abs=5e-5)
    assert found["test/food/ndcg@10[c2dsr_999]"] == 1.0, "as published: every tie is won"


def test_a_constant_scorer_has_the_cross_entropy_of_a_blind_guess():
    found = values(WORLD.evaluate(Constant(), EvalConfig(seen="none")))
    assert found["test/food/cross_entropy"] == pytest.approx(math.log(1100), rel=1e-6)
    assert "test/food/cross_entropy[abxi_999]" not in values(WORLD.evaluate(Constant(), EVERY))


def test_an_oracle_gets_one():
    found = values(WORLD.evaluate(Oracle(), EVERY))
    metrics = {key: value for key, value in found.items() if "cross_entropy" not in key}
    assert len(metrics) == 7 * 4 * 8
    assert all(value == 1 for value in metrics.values()), metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("protocol", ANY_MODEL)
def test_scores_that_are_not_finite_stop_the_evaluation(protocol: str, bad: float):
    class Diverged(Vectors):
        def scores(self, batch: Batch, items: Tensor) -> Tensor:
            return torch.where(batch.user[:, None] == 17, bad, super().scores(batch, items))

    with pytest.raises(NonFiniteScores, match="users 17"):
        WORLD.evaluate(Diverged(2400), EvalConfig(protocols=(protocol,)))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batch_size_and_the_order_of_users_change_nothing(size: int):
    scorer = Vectors(2400)
    expected = WORLD.evaluate(scorer, EVERY)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(size)).tolist()
    other = evaluate(scorer, WORLD.batches(size, order), WORLD.catalog, EVERY, split="test", split_hash="5917")
    assert other.ranks.equals(expected.ranks, check_metadata=True)
    assert (other.coverage, other.counts) == (expected.coverage, expected.counts)
    assert summarize(other.ranks, EVERY) == summarize(expected.ranks, EVERY)


@pytest.mark.parametrize("scorer", [Vectors(2400), Constant()])
def test_ranking_in_parts_is_ranking_the_whole(scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
    whole = WORLD.evaluate(scorer, EVERY)
    monkeypatch.setattr("recsys.evaluation.search._CELLS", 1)
    parts = cached_rows(torch.zeros(40, 1100))
    assert [len(range(40)[part]) for part in parts] == [16, 16, 8]
    found = WORLD.evaluate(scorer, EVERY)
    assert found.ranks.equals(whole.ranks, check_metadata=True)
    assert found.coverage == whole.coverage


def test_ranking_in_bf16_makes_ties():
    """What `scores: bf16` is there to show; in fp32 these scores have none."""
    exact = WORLD.evaluate(Vectors(2400)).ranks["ties"].to_numpy()
    rounded = WORLD.evaluate(Vectors(2400), EvalConfig(scores="bf16")).ranks["ties"].to_numpy()
    assert exact.sum() == 0
    assert (rounded > 0).mean() > 0.5


def test_coverage_of_ties_does_not_depend_on_batches_either():
    ours = WORLD.evaluate(Constant(), size=3).coverage
    assert ours == WORLD.evaluate(Constant(), size=80).coverage


@pytest.mark.parametrize("seen", ["none", "history"])
def test_permuting_item_ids_changes_nothing(seen):
    config = EvalConfig(protocols=("full", "all"), seen=seen)
    names = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(2400, generator=torch.Generator().manual_seed(0))])
    scorer = Vectors(2400)
    ours, theirs = WORLD.evaluate(scorer, config), WORLD.renamed(names).evaluate(scorer.renamed(names), config)
    columns = ["protocol", "user", "domain", "history", "greater", "ties", "candidates"]
    order = [(name, "ascending") for name in ("protocol", "user", "history", "domain")]
    assert ours.ranks.select(columns).sort_by(order).equals(theirs.ranks.select(columns).sort_by(order))
    assert ours.coverage == theirs.coverage
    assert ours.counts == theirs.counts


def test_constant_and_oracle_do_not_care_about_item_ids_under_sampled_protocols():
    names = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(2400, generator=torch.Generator().manual_seed(0))])
    config = EvalConfig(protocols=("abxi_999", "c2dsr_999", "uni_100", "pop_100"), bootstrap_samples=2)
    for scorer in (Constant(), Oracle()):
        theirs = WORLD.renamed(names).evaluate(scorer, config)
        assert values(theirs, config) == pytest.approx(values(WORLD.evaluate(scorer, config), config))


def test_protocols_do_not_disturb_each_other():
    scorer = Vectors(2400)
    together = WORLD.evaluate(scorer, EVERY).ranks.to_pandas()
    for name in ANY_MODEL:
        alone = WORLD.evaluate(scorer, EvalConfig(protocols=(name,))).ranks.to_pandas()
        rows = together[together.protocol == name].reset_index(drop=True)
        assert alone.drop(columns="cross_entropy").equals(rows.drop(columns="cross_entropy"))


class Favours:
    """Some items first, the target next, the others last."""

    def __init__(self, *items: int) -> None:
        self.items = torch.tensor(items)

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        return 2.0 * torch.isin(items, self.items) + (items == batch.targets[:, -1:]).float()


def tiny(history: list[int], target: int) -> "object":
    item_domain = torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1])
    catalog = Catalog(("food", "kitchen"), item_domain, torch.tensor([0, 1, 0, 2, 1, 0, 0, 1]))
    return replace(WORLD, catalog=catalog, users=[3], histories=[history], targets=[target])


def test_seen_items_leave_full_rankings_only_when_asked():
    world = tiny(history=[4, 5, 1, 4], target=6)
    for seen, greater, candidates in (("none", 1, 4), ("history", 0, 2)):
        (row,) = world.evaluate(Favours(4), EvalConfig(seen=seen)).ranks.to_pylist()
        assert (row["greater"], row["candidates"]) == (greater, candidates)
        assert (row["user"], row["domain"], row["target"], row["history"]) == (3, "kitchen", 6, 4)


def test_c2dsr_lets_a_rival_win_by_a_hair_and_others_do_not():
    class ByAHair(Favours):
        def scores(self, batch: Batch, items: Tensor) -> Tensor:
            return 5e-6 * torch.isin(items, self.items).expand(len(batch.user), -1)

    config = EvalConfig(protocols=("c2dsr_999", "abxi_999"))
    rows = {row["protocol"]: row for row in tiny([1], target=6).evaluate(ByAHair(4, 5, 7), config).ranks.to_pylist()}
    assert (rows["c2dsr_999"]["greater"], rows["c2dsr_999"]["ties"]) == (0, 999)
    assert (rows["abxi_999"]["greater"], rows["abxi_999"]["ties"]) == (3, 0)


def test_a_target_that_was_seen_before_stays_a_candidate_and_is_counted():
    evaluation = tiny(history=[4, 6, 1], target=6).evaluate(Favours(4), EvalConfig(protocols=("full", "all")))
    assert [(row["greater"], row["candidates"]) for row in evaluation.ranks.to_pylist()] == [(0, 5), (0, 3)]
    counts = evaluation.counts["kitchen"]
    assert (counts.users, counts.targets, counts.repeated_targets) == (1, 1, 1)
    assert (counts.candidates, counts.cold_candidates, counts.cold_targets) == (4, 2, 1)
    assert "food" not in evaluation.counts, "no targets there"


def test_cross_entropy_is_taken_over_the_candidates_that_are_ranked():
    world = tiny(history=[4, 5, 1], target=6)
    for seen, loss in (("none", math.log(math.exp(2) + 2 + math.e) - 1), ("history", math.log(1 + math.e) - 1)):
        (row,) = world.evaluate(Favours(4), EvalConfig(seen=seen)).ranks.to_pylist()
        assert row["cross_entropy"] == pytest.approx(loss, rel=1e-6)


def test_the_whole_history_is_left_out_not_only_its_tail():
    world = tiny(history=[4, 1, 2, 3, 1, 2, 3, 1, 2, 3], target=6)
    rows = next(world.batches(1, max_len=2))
    assert 4 not in rows.batch.items
    (row,) = world.evaluate(Favours(4)).ranks.to_pylist()
    assert row["greater"] == 0


def test_coverage_by_hand():
    coverage = tiny(history=[1, 4], target=6).evaluate(Favours(5), EvalConfig(ks=(1, 2, 9))).coverage
    # candidates 4 (seen), 5, 6, 7; first 5, then the target 6
    assert coverage == {
        "test/kitchen/coverage@1": 0.25,
        "test/macro/coverage@1": 0.25,
        "test/kitchen/coverage@2": 0.5,
        "test/macro/coverage@2": 0.5,
        "test/kitchen/coverage@9": 0.75,
        "test/macro/coverage@9": 0.75,
    }


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ([4.0, 2.0, 2.0, 1.0], 0.5),  # the first for sure, one of the next two
        ([4.0, -math.inf, -math.inf, -math.inf], 0.25),  # a list of one: what is left out does not fill it up
        ([2.0, 2.0, 2.0, -math.inf], 0.5),
    ],
)
def test_coverage_of_one_list_of_two(scores: list[float], share: float):
    coverage = Coverage(num_items=4, ks=(2,))
    coverage.update(torch.tensor([scores]))
    assert coverage.shares() == (pytest.approx(share),)


@pytest.mark.parametrize("width", [15, 16, 251, 252, 264, 1237])
@pytest.mark.parametrize("levels", [2, 40, 10_000])
def test_the_largest_scores_are_found_by_groups(width: int, levels: int):
    generator = torch.Generator().manual_seed(width)
    scores = torch.randint(levels, (50, width), generator=generator).float()
    scores[:25, ::3] = -torch.inf
    k = min(21, width)
    best, columns = largest(scores, k)
    assert torch.equal(best, scores.topk(k).values)
    assert torch.equal(scores.gather(1, columns), best)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_coverage_of_tied_lists_is_an_expectation():
    coverage = WORLD.evaluate(Constant(), EvalConfig(ks=(10,), seen="none", protocols=("full", "all"))).coverage
    assert coverage["test/food/coverage@10"] == pytest.approx(1 - (1 - 10 / 1100) ** 40)
    assert coverage["test/kitchen/coverage@10[all]"] == pytest.approx(1 - (1 - 10 / 2400) ** 40)


def test_no_targets_is_an_error():
    with pytest.raises(ValueError, match="validation split has no targets"):
        evaluate(Constant(), [], WORLD.catalog, EvalConfig(), split="validation", split_hash="")


def test_a_domain_may_not_be_called_like_a_mean():
    catalog = Catalog(("macro",), torch.tensor([-1, 0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"'macro'.*rename"):
        evaluate(Constant(), [], catalog, EvalConfig(), split="test", split_hash="")


@pytest.mark.parametrize("bad", [{"ks": (5, 5)}, {"ks": ()}, {"ks": (0,)}, {"protocols": ("full_999",)}, {"seed": -1}])
def test_bad_configs(bad):
    with pytest.raises(ValidationError):
        EvalConfig(**bad)


@pytest.mark.parametrize("inference", [False, True])
def test_running_metrics_agree_with_the_table(inference: bool):
    """Also: what the catalogue caches while validating can be used in training."""
    catalog = Catalog(WORLD.catalog.domain_names, WORLD.catalog.item_domain, WORLD.catalog.train_counts)
    running = [RankingMetrics("test", catalog.domain_names, (5, 10), "average") for _ in range(2)]
    with torch.inference_mode(inference):
        for number, rows in enumerate(WORLD.batches(7)):
            ranks, loss = rank_full(Vectors(2400), rows, catalog, "history")
            running[number % 2].update(ranks, loss, rows.batch.target_domains[:, -1])
    running[0].sums += running[1].sums  # what a sum over processes does
    running[0].counts += running[1].counts
    config = EvalConfig(ks=(5, 10))
    expected = values(WORLD.evaluate(Vectors(2400), config), config)
    assert {key: value.item() for key, value in running[0].compute().items()} == pytest.approx(expected, rel=1e-6)
    weight = torch.ones(3000, requires_grad=True)
    (weight[catalog.items_of(0)] * 2).sum().backward()


def test_running_metrics_skip_a_domain_without_targets():
    running = RankingMetrics("validation", ("food", "kitchen", "garden"), (10,))
    for rows in WORLD.batches(50):
        ranks, loss = rank_full(Oracle(), rows, WORLD.catalog, "none")
        running.update(ranks, loss, rows.batch.target_domains[:, -1])
    found = running.compute()
    assert "validation/garden/ndcg@10" not in found
    assert found["validation/macro/ndcg@10"] == 1


def test_running_metrics_leave_out_what_is_undefined():
    running = RankingMetrics("validation", ("food",), (10,))
    ranks = RankInterval(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 5]))
    running.update(ranks, torch.zeros(2), torch.zeros(2, dtype=torch.long))
    found = running.compute()
    assert found["validation/food/auc"] == 0.75
    assert found["validation/food/mrr"] == 0.75
