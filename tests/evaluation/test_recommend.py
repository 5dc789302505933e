import pytest
import torch
from evaluation_world import Constant, Vectors, make_world
from torch import Tensor

from recsys.evaluation import NonFiniteScores, recommend
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog

CATALOG = Catalog(("food", "kitchen"), torch.tensor([-1, 0, 1, 0, 1, 1, 0]), torch.zeros(7).long())


def question(*histories: list[int]) -> Batch:
    """Histories of people nobody has met: without targets, and without a domain that is asked for."""
    width = max(map(len, histories))
    items = torch.tensor([[PAD_ID] * (width - len(history)) + history for history in histories])
    nothing = torch.zeros_like(items)
    return Batch(torch.arange(len(histories)), items, CATALOG.item_domain[items], nothing, nothing, nothing + NO_DOMAIN)


class ById:
    """Scores that rise with the id; remembers the question."""

    def __init__(self) -> None:
        self.asked: Tensor | None = None
        self.targets: Tensor | None = None

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        self.asked, self.targets = batch.target_domains, batch.targets
        return items.float().expand(len(batch.user), -1).clone()


def test_the_best_of_a_domain_come_first():
    scorer = ById()
    items, scores = recommend(scorer, question([1, 5], [3]), CATALOG, domain=1, k=2, seen=None)
    assert items.tolist() == [[5, 4], [5, 4]]
    assert scores.tolist() == [[5.0, 4.0], [5.0, 4.0]]
    assert scorer.asked is not None
    assert scorer.asked.tolist() == [[-1, 1], [-1, 1]], "the model is told which domain is asked for"


def test_targets_are_not_read():
    scorer, batch = ById(), question([1, 5], [3])
    batch.targets[:] = 1_000_000
    recommend(scorer, batch, CATALOG, domain=1, k=2, seen=None)
    assert scorer.targets is not None
    assert not scorer.targets.any()
    assert batch.targets.all(), "the caller's batch is left alone"


def test_seen_items_and_padding_never_come_back():
    batch = question([1, 5], [4, 2, 5])
    items, scores = recommend(ById(), batch, CATALOG, domain=1, k=3, seen=batch.items)
    assert items.tolist() == [[4, 2, PAD_ID], [PAD_ID, PAD_ID, PAD_ID]]
    assert scores.isinf().tolist() == [[False, False, True], [True, True, True]]


def test_equal_scores_come_in_the_order_of_ids():
    world = make_world((1100, 1300), users=1)
    items, _ = recommend(Constant(), question([1]), world.catalog, domain=1, k=300, seen=None)
    assert items.tolist() == [list(range(1101, 1401))]


def test_the_list_agrees_with_the_ranks_of_an_evaluation():
    world = make_world((50, 60), users=5)
    ranks = world.evaluate(Vectors(110)).ranks.to_pylist()
    found = {(row["user"], row["target"]): row["greater"] for row in ranks}
    for rows in world.batches(5):
        domain = int(rows.batch.target_domains[0, -1])
        items, _ = recommend(Vectors(110), rows.batch, world.catalog, domain, k=20, seen=rows.seen)
        for user, target, row in zip(
            rows.batch.user.tolist(), rows.batch.targets[:, -1].tolist(), items.tolist(), strict=True
        ):
            place = found[user, target]
            assert row.index(target) == place if place < 20 else target not in row


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_k_the_domain_cannot_fill(k: int):
    with pytest.raises(ValueError, match="between 1 and 3, the items of kitchen"):
        recommend(ById(), question([1]), CATALOG, domain=1, k=k, seen=None)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteScores, match="users 0, 1"):
        recommend(Constant(float("nan")), question([1], [2]), CATALOG, domain=1, k=1, seen=None)
