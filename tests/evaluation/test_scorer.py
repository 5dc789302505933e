import pytest
import torch
from evaluation_world import Rows, make_world
from torch import Tensor, nn

from recsys.evaluation.evaluate import EvalConfig, evaluate
from recsys.evaluation.metrics import ndcg
from recsys.evaluation.rank import rank
from recsys.evaluation.scorer import DotScorer
from recsys.evaluation.search import near
from recsys.precision import matmul_precision
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


@pytest.mark.parametrize(("packs", "length"), [(False, 9), (True, 7)])
def test_a_model_sees_one_shape_only(packs: bool, length: int):
    """Of as many rows; and of one length, but where it leaves padding out."""
    shapes = set()

    class Watched(Attention):
        packs_events = packs

        def forward(self, batch: Batch) -> Tensor:
            shapes.add(tuple(batch.items.shape))
            return super().forward(batch)

    scorer = DotScorer(Watched(WORLD.catalog.num_items).eval(), max_len=9, rows=32)
    with torch.no_grad():
        for size in (1, 31, 32, 33, 150):
            rows = next(WORLD.batches(size, max_len=7))
            assert scorer.scores(rows.batch, WORLD.catalog.items_of(0)).shape == (min(size, 150), 120)
    assert shapes == {(32, length)}


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


def exact(gaussian: Gaussian, batch: Batch, items: Tensor) -> Tensor:
    return (gaussian(batch)[:, -1].double() @ gaussian.items[items].double().T).float()


@pytest.mark.parametrize("spread", [1.0, 6e-3, 3e-6])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_where_a_target_stands_is_that_of_fp64(spread: float, precision: str):
    """The smaller the spread, the more alike are all items, and the more of them does an fp32 product misplace."""
    count, num_items = 250, 1003
    batch = random_rows(count, num_items).batch
    batch.targets[:] = torch.randint(1, num_items + 1, (count, 1), generator=torch.Generator().manual_seed(1))
    gaussian = Gaussian(num_items, 64, torch.float32).eval()
    gaussian.items[1:] = gaussian.items[:1] + spread * gaussian.items[1:]
    gaussian.items[500:600] = gaussian.items[600:700]
    items = torch.arange(1, num_items + 1)
    with matmul_precision(precision), torch.autocast("cpu", torch.bfloat16):
        scores = DotScorer(gaussian, rows=32).scores(batch, items)
    target = batch.targets[:, -1] - 1
    expected = rank(exact(gaussian, batch, items), target)
    found = rank(scores, target)
    assert torch.equal(found.greater, expected.greater)
    assert torch.equal(found.ties, expected.ties)
    torch.testing.assert_close(scores, exact(gaussian, batch, items), rtol=1e-5, atol=1e-5)
    if spread < 1:
        plain = rank(gaussian(batch)[:, -1] @ gaussian.items[items].T, target)
        assert (plain.greater != expected.greater).any()


def test_equal_vectors_score_the_same_to_the_last_bit():
    batch = random_rows(40, 300).batch
    gaussian = Gaussian(300, 64, torch.float32).eval()
    gaussian.items[:] = gaussian.items[:1]
    scores = DotScorer(gaussian, rows=16).scores(batch, torch.arange(1, 301))
    assert (scores == scores[:, :1]).all()
    torch.testing.assert_close(scores, exact(gaussian, batch, torch.arange(1, 301)), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 11, 12, 100, 1003])
@pytest.mark.parametrize("cells", [1, 2**21])
def test_near_scores_are_found_by_groups(width: int, cells: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recsys.evaluation.search._CELLS", cells)  # with one, in parts of the rows
    generator = torch.Generator().manual_seed(width)
    scores, centre = torch.randn(20, width, generator=generator), torch.randn(20, generator=generator)
    reach = torch.rand(20, generator=generator)
    row, column = near(scores, centre, reach)
    found = torch.zeros_like(scores)
    found.index_put_((row, column), torch.ones(len(row)), accumulate=True)
    assert torch.equal(found.bool(), (scores - centre[:, None]).abs() <= reach[:, None])
    assert found.max() <= 1


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
