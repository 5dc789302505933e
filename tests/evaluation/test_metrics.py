import doctest
import itertools
import math
from typing import get_args

import ir_measures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Qrel, ScoredDoc, Success, nDCG

from recsys.evaluation import coverage, inference, metrics
from recsys.evaluation.metrics import AT_K, OVERALL, UnknownMetric, auc, hit_rate, measure, metric_names, ndcg
from recsys.evaluation.metrics import reciprocal_rank as mrr
from recsys.evaluation.rank import RankInterval, Ties, rank


def interval(greater: list[int], ties: list[int], candidates: list[int] | None = None) -> RankInterval:
    columns = greater, ties, candidates or [100] * len(greater)
    return RankInterval(*(torch.tensor(column, dtype=torch.int64) for column in columns))


@pytest.mark.parametrize("module", [metrics, coverage, inference])
def test_examples_in_docstrings(module):
    names = {"interval": interval, "torch": torch}
    result = doctest.testmod(module, extraglobs=names, report=True)
    assert result.attempted > 0
    assert result.failed == 0


def plain(name: str, place: int, candidates: int) -> float:
    """The textbook definition at one rank."""
    return {
        "hr@3": float(place <= 3),
        "ndcg@3": 1 / math.log2(1 + place) if place <= 3 else 0.0,
        "mrr": 1 / place,
        "auc": (candidates - place) / (candidates - 1),
    }[name]


NAMES = metric_names([3])


def test_every_metric_is_in_the_tests():
    assert {name.split("@")[0] for name in NAMES} == {*AT_K, *OVERALL}


@pytest.mark.parametrize("name", NAMES)
def test_average_is_the_mean_over_all_orders_of_the_tied(name: str):
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 3.0]])
    target = 2
    values = []
    for order in itertools.permutations(range(6)):  # every order of the candidates, sorted stably
        ranked = sorted(order, key=lambda item: -scores[0, item].item())
        values.append(plain(name, ranked.index(target) + 1, 6))
    ranks = rank(scores, torch.tensor([target]))
    assert measure(ranks, name).item() == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_optimistic_and_pessimistic_are_the_ends_of_the_interval(name: str):
    ranks = interval([1], [3], [9])
    assert measure(ranks.settle("optimistic"), name).item() == pytest.approx(plain(name, 2, 9))
    assert measure(ranks.settle("pessimistic"), name).item() == pytest.approx(plain(name, 5, 9))
    assert ranks.settle("average") is ranks


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10), st.sampled_from(NAMES))
def test_bounds_and_the_order_of_tie_rules(greater: int, ties: int, lower: int, name: str):
    ranks = interval([greater], [ties], [greater + ties + lower + 2])
    values = {rule: measure(ranks.settle(rule), name).item() for rule in get_args(Ties)}
    assert 0 <= values["pessimistic"] <= values["average"] + 1e-12
    assert values["average"] <= values["optimistic"] + 1e-12
    assert values["optimistic"] <= 1


def test_a_better_rank_is_never_worth_less():
    ranks = interval(list(range(30)), [0] * 30)
    for name in metric_names([1, 10]):
        values = measure(ranks, name)
        assert bool((values[1:] <= values[:-1]).all()), name
        assert values[0] == 1


def test_no_negatives_leave_auc_undefined_and_the_rest_at_one():
    alone = interval([0], [0], [1])
    assert auc(alone).isnan().all()
    assert hit_rate(alone, 1) == ndcg(alone, 5) == mrr(alone) == 1


def test_k_beyond_the_candidates():
    assert hit_rate(interval([4], [0], [5]), 100).item() == 1
    assert hit_rate(interval([0], [4], [5]), 100).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["hr", "ndcg@", "ndcg@0", "mrr@10", "hr@-1", "map@10"])
def test_an_unknown_metric_says_what_there_is(name: str):
    with pytest.raises(UnknownMetric, match=r"hr@<k>, ndcg@<k>, mrr, auc"):
        measure(interval([0], [0]), name)


def test_values_agree_with_ir_measures():
    scores = torch.rand(200, 50, generator=torch.Generator().manual_seed(3))
    target = torch.randint(50, (200,), generator=torch.Generator().manual_seed(4))
    assert all(len(set(row)) == 50 for row in scores.tolist()), "without ties"
    qrels = [Qrel(str(row), str(item), 1) for row, item in enumerate(target.tolist())]
    run = [
        ScoredDoc(str(row), str(item), score)
        for row, row_scores in enumerate(scores.tolist())
        for item, score in enumerate(row_scores)
    ]
    ranks = rank(scores, target)
    pairs = {nDCG @ 10: "ndcg@10", nDCG @ 5: "ndcg@5", Success @ 10: "hr@10", Success @ 1: "hr@1", RR: "mrr"}
    for found in ir_measures.iter_calc(list(pairs), qrels, run):
        value = measure(ranks, pairs[found.measure])[int(found.query_id)].item()
        assert value == pytest.approx(found.value, abs=1e-9), found
