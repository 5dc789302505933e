import pytest
import torch
from evaluation_world import Rows, make_world
from torch import Tensor, nn

from recsys.evaluation.evaluate import EvalConfig, evaluate
from recsys.evaluation.metrics import ndcg
from recsys.evaluation.rank import rank
from recsys.evaluation.scorer import DotScorer
from recsys.types import Batch


class Attention(nn.Module):
    """A model whose sums run over padded positions, so that shapes show in the last bits."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(num_items + 1, 32, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.5, batch_first=True)

    def forward(self, batch: Batch) -> Tensor:
        length = batch.items.shape[1]
        mask = batch.mask[:, None, :].expand(-1, length, -1).repeat_interleave(2, 0) | torch.eye(length).bool()
        return self.layer(self.table(batch.items), src_mask=~mask)

    def item_embeddings(self) -> Tensor:
        return self.table.weight


WORLD = make_world((120, 90), users=150, seed=5)


def model() -> Attention:
    return Attention(WORLD.catalog.num_items).eval()


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_ranks_do_not_depend_on_batch_size_or_order(size: int):
    scorer = DotScorer(model(), max_len=7, rows=32)
    expected = evaluate(
        scorer,
        WORLD.batches(50, max_len=7),
        WORLD.catalog,
        EvalConfig(protocols=("full", "all")),
        split="test",
        split_hash="",
    )
    order = torch.randperm(len(WORLD.users), generator=torch.Generator().manual_seed(size)).tolist()
    other = evaluate(
        scorer,
        WORLD.batches(size, order, max_len=7),
        WORLD.catalog,
        EvalConfig(protocols=("full", "all")),
        split="test",
        split_hash="",
    )
    assert other.ranks.equals(expected.ranks)
    assert other.coverage == expected.coverage


def test_scores_do_not_depend_on_the_other_rows_to_the_last_bit():
    scorer = DotScorer(model(), max_len=7, rows=32)
    items = WORLD.catalog.items_of(0)
    with torch.no_grad():
        (whole,) = (rows for rows in WORLD.batches(150, max_len=7) if int(rows.batch.target_domains[0, -1]) == 0)
        together = scorer.scores(whole.batch, items)
        alone = torch.cat(
            [scorer.scores(whole.batch.map(lambda tensor, row=row: tensor[row : row + 1]), items) for row in range(40)]
        )
    assert torch.equal(alone, together[:40])
    assert together.dtype == torch.float32


def test_a_model_sees_one_shape_only():
    shapes = set()

    class Watched(Attention):
        def forward(self, batch: Batch) -> Tensor:
            shapes.add(tuple(batch.items.shape))
            return super().forward(batch)

    scorer = DotScorer(Watched(WORLD.catalog.num_items).eval(), max_len=9, rows=32)
    with torch.no_grad():
        for size in (1, 31, 32, 33, 150):
            rows = next(WORLD.batches(size, max_len=7))
            assert scorer.scores(rows.batch, WORLD.catalog.items_of(0)).shape == (min(size, 150), 120)
    assert shapes == {(32, 9)}


def test_the_item_vectors_are_read_once():
    class Counted(Attention):
        reads = 0

        def item_embeddings(self) -> Tensor:
            self.reads += 1
            return super().item_embeddings()

    counted = Counted(WORLD.catalog.num_items).eval()
    scorer, (first, second) = DotScorer(counted), (WORLD.catalog.items_of(k) for k in range(2))
    rows = next(WORLD.batches(3)).batch
    with torch.no_grad():
        for items, reads in ((first, 1), (first, 1), (second, 2), (first, 3)):
            scores = scorer.scores(rows, items)
            assert torch.equal(scores, DotScorer(model()).scores(rows, items))
            assert counted.reads == reads


def test_a_model_that_still_drops_out_is_refused():
    rows = next(WORLD.batches(3))
    with pytest.raises(AssertionError, match="eval"):
        DotScorer(model().train()).scores(rows.batch, WORLD.catalog.items_of(0))


class Gaussian(nn.Module):
    """Random states and items; the first item of the history names the row."""

    def __init__(self, num_items: int, d_model: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(num_items + 1, d_model, generator=generator).to(dtype)
        self.items = torch.randn(num_items + 1, d_model, generator=generator).to(dtype)

    def forward(self, batch: Batch) -> Tensor:
        return self.states[batch.items]

    def item_embeddings(self) -> Tensor:
        return self.items


def random_rows(count: int, num_items: int) -> Rows:
    items = torch.arange(1, count + 1)[:, None]
    zeros = torch.zeros_like(items)
    return Rows(Batch(items[:, 0], items, zeros, zeros, zeros, zeros), items, torch.ones(count).long())


def test_products_of_bf16_would_tie_and_those_of_the_scorer_do_not():
    count, num_items = 200, 12_000
    batch = random_rows(count, num_items).batch
    gaussian = Gaussian(num_items, 64, torch.bfloat16).eval()
    items = torch.arange(1, num_items + 1)
    low = gaussian(batch)[:, -1] @ gaussian.items[items].T
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        high = DotScorer(gaussian).scores(batch, items)
    target = high.topk(30).indices[:, 20]
    tied = rank(low.float(), target)
    exact = rank(high, target)
    assert (tied.ties > 0).double().mean() > 0.5
    assert (exact.ties > 0).sum() == 0
    assert (exact.greater == 20).all()
    gap = ndcg(tied.settle("optimistic"), 20).mean() - ndcg(tied.settle("pessimistic"), 20).mean()
    assert gap > 0.01
