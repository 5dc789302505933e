"""The published evaluation of LLM4CDSR, which adds up the scores of different items, and by how much it inflates."""

import numpy as np
import pytest
import torch
from evaluation_world import Constant, make_world
from torch import Tensor, nn

from recsys.evaluation import DotScorer, EvalConfig, NonFiniteScores, RanksInfo, evaluate, summarize
from recsys.evaluation.draws import draw_negatives
from recsys.evaluation.protocols import PROTOCOLS
from recsys.evaluation.targets import Targets
from recsys.loading import ConfigError
from recsys.types import Batch

NAME = "llm4cdsr_100_compat"
WORLD = make_world((300, 250), users=30)


class OneThread(nn.Module):
    """An item's vector is its score in two threads, the second one in two halves; the state reads off both."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.table = torch.stack([first, second, second], dim=1)

    def forward(self, batch: Batch) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.5], dtype=self.table.dtype).expand(*batch.items.shape, 3)

    def item_embeddings(self) -> Tensor:
        return self.table


class TwoThreads(OneThread):
    threads = (1, 2)


def scorer(seed: int = 0) -> DotScorer:
    generator = torch.Generator().manual_seed(seed)
    return DotScorer(TwoThreads(*torch.randn(2, WORLD.catalog.num_items + 1, generator=generator)).eval())


def targets(domain: int) -> Targets:
    (rows,) = (rows for rows in WORLD.batches(1000) if int(rows.batch.target_domains[0, -1]) == domain)
    return Targets(rows.batch, rows.seen, rows.history)


def test_threads_add_up_to_the_scores():
    rows, items = targets(1), WORLD.catalog.items_of(1)
    parts = scorer().thread_scores(rows.batch, items)
    assert parts.shape == (2, 30, 250)
    torch.testing.assert_close(parts.sum(0), scorer().scores(rows.batch, items))
    table = scorer().model.item_embeddings()[items]
    torch.testing.assert_close(parts[1], table[:, 1].expand(30, -1))


@pytest.mark.parametrize("domain", [0, 1])
def test_a_negative_is_one_item_to_each_thread(domain: int):
    """Ranks counted by hand: the target's scores are of one item, the j-th negative's of the j-th of each draw."""
    model = scorer().model
    ranks = WORLD.evaluate(scorer(), EvalConfig(protocols=(NAME,), bootstrap_samples=2)).ranks.to_pandas()
    rows, pool = targets(domain), WORLD.catalog.items_of(domain)
    first, second = (
        pool[draw_negatives(PROTOCOLS[NAME].negatives, pool, WORLD.catalog, rows, 0, thread)] for thread in (0, 1)
    )
    assert not torch.equal(first, second)
    table = model.item_embeddings()
    found = ranks[ranks.domain == WORLD.catalog.domain_names[domain]].set_index("user")
    assert (found.candidates == 101).all()
    for row, user in enumerate(rows.user.tolist()):
        target = table[rows.target[row], :2].sum()
        expected = int((table[first[row], 0] + table[second[row], 1] > target).sum())
        assert found.greater[user] == expected


def test_the_first_thread_meets_the_negatives_of_a_model_without_threads():
    rows, pool = targets(0), WORLD.catalog.items_of(0)
    plain, compatible = PROTOCOLS["uni_100"].negatives, PROTOCOLS[NAME].negatives
    assert torch.equal(
        draw_negatives(plain, pool, WORLD.catalog, rows, 3), draw_negatives(compatible, pool, WORLD.catalog, rows, 3, 0)
    )


def test_the_hash_covers_the_draws_of_all_threads():
    config = EvalConfig(protocols=("uni_100", NAME), bootstrap_samples=2)
    hashes = RanksInfo.of(WORLD.evaluate(scorer(), config).ranks).negatives
    assert hashes[NAME].keys() == hashes["uni_100"].keys()
    assert all(hashes[NAME][domain] != hashes["uni_100"][domain] for domain in hashes[NAME])


def test_batches_and_their_order_change_nothing():
    config = EvalConfig(protocols=(NAME, "full"), bootstrap_samples=2)
    expected = WORLD.evaluate(scorer(), config)
    order = np.random.default_rng(0).permutation(len(WORLD.users)).tolist()
    other = evaluate(scorer(), WORLD.batches(7, order), WORLD.catalog, config, split="test", split_hash="5917")
    assert other.ranks.equals(expected.ranks)


def test_a_domain_with_few_items_is_used_up():
    """The same number of negatives in each draw, and none is the target."""
    small = make_world((9, 40), users=12)
    model = TwoThreads(torch.zeros(50), torch.zeros(50)).eval()
    ranks = small.evaluate(DotScorer(model), EvalConfig(protocols=(NAME,), bootstrap_samples=2)).ranks.to_pandas()
    food = ranks[ranks.domain == "food"]
    unseen = [
        sum(item <= 9 for item in set(range(1, 50)) - set(history) - {target})
        for history, target in zip(small.histories, small.targets, strict=True)
        if target <= 9
    ]
    assert sorted(food.candidates - 1) == sorted(unseen)
    assert (food.ties == food.candidates - 1).all()


@pytest.mark.parametrize("other", [Constant(), DotScorer(OneThread(torch.zeros(551), torch.zeros(551)).eval())])
def test_a_model_with_one_thread_is_refused(other):
    with pytest.raises(ConfigError, match="single thread; use uni_100"):
        WORLD.evaluate(other, EvalConfig(protocols=("full", NAME)))


def test_scores_that_are_not_finite_are_refused():
    first = torch.zeros(WORLD.catalog.num_items + 1)
    first[5:100] = torch.nan
    with pytest.raises(NonFiniteScores):
        WORLD.evaluate(DotScorer(TwoThreads(first, first).eval()), EvalConfig(protocols=(NAME,)))


def test_inflation_grows_with_the_agreement_of_the_threads():
    """NDCG@10 under the protocol against 100 candidates that are scored as one item each, by the same model.

    The threads' scores of an item are normal with a correlation, and those of the targets are better by 2: enough for
    an NDCG@10 of about .3, in the middle of what tables of the field show. The bands are the documented ones.
    """
    size, users = 6000, 1200
    catalog = make_world((size,), users=1).catalog
    target = 1 + torch.arange(users) // 8  # few items, so that they are hardly ever anybody's negatives
    history = torch.full((users, 1), size)
    batch = Batch(
        torch.arange(users), history, torch.zeros_like(history), history, target[:, None], torch.zeros_like(history)
    )
    rows = Targets(batch, history, torch.ones(users, dtype=torch.int64))
    config = EvalConfig(protocols=("uni_100", NAME), bootstrap_samples=2)
    draws = torch.randn(2, size + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inflation = []
    for agreement, low, high in [(0.0, -0.06, 0.06), (0.3, 0.17, 0.33), (0.6, 0.34, 0.63), (0.9, 0.49, 0.90)]:
        second = agreement * draws[0] + (1 - agreement**2) ** 0.5 * draws[1]
        first = draws[0].index_add(0, target.unique(), torch.full((users // 8,), 2.0, dtype=torch.float64))
        ranks = evaluate(
            DotScorer(TwoThreads(first, second).eval()), [rows], catalog, config, split="test", split_hash=""
        ).ranks
        found = {key: interval.value for key, interval in summarize(ranks, config).items()}
        inflation.append(found[f"test/food/ndcg@10[{NAME}]"] / found["test/food/ndcg@10[uni_100]"] - 1)
        assert low < inflation[-1] < high
    assert inflation == sorted(inflation)
