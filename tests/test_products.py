"""Products by the library that makes them faster are the same products."""

import pytest
import torch

from recsys import products
from recsys.losses import SoftmaxConfig, chunked_cross_entropy, shared_cross_entropy
from recsys.products import ProductSum, product, recurring, whole_lines

WIDTH = 24
ROWS = (64, 512, 700, 3, 0)
"""Such as come again and again, and others."""


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["as it is here", "without oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without oneDNN":
        monkeypatch.setattr(products, "_knows_better", lambda: False)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [96, 97])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_fp64(dtype: torch.dtype, columns: int, turned: bool) -> None:
    b = (matrix(WIDTH, columns, 0).t() if turned else matrix(columns, WIDTH, 0)).to(dtype)
    total = ProductSum(b)
    expected = torch.zeros(columns, WIDTH, dtype=torch.float64)
    for rows in ROWS:
        a = matrix(rows, WIDTH, rows).to(dtype)
        made = product(a, b)
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), a.double() @ b.double().t(), rtol=0, atol=2e-5)
        total.add(made, a)
        expected += made.double().t() @ a.double()
    assert total.total().dtype == dtype
    torch.testing.assert_close(total.total().double(), expected, rtol=1e-5, atol=1e-3)


def test_autocast_decides_the_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert product(matrix(64, WIDTH, 0), matrix(3, WIDTH, 1)).dtype == torch.bfloat16


def test_rows_are_filled_up_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    monkeypatch.setattr(products, "_knows_better", lambda: True)
    assert [recurring(rows, like) for rows in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert recurring(65, like.double()) == 65
    monkeypatch.setattr(products, "_knows_better", lambda: False)
    assert recurring(65, like) == 65


@pytest.mark.parametrize(("dtype", "line"), [(torch.float32, 16), (torch.float64, 8)])
def test_whole_lines(dtype: torch.dtype, line: int) -> None:
    few = matrix(line + 1, 3, 0).to(dtype)
    filled = whole_lines(few)
    assert len(filled) == 2 * line
    assert torch.equal(filled[: line + 1], few)
    assert not filled[line + 1 :].any()
    assert whole_lines(filled) is filled


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("chunk", [SoftmaxConfig().chunk_positions, 7])
def test_a_cross_entropy_of_whole_chunks_and_a_rest_is_that_of_torch(scale: float, chunk: int) -> None:
    """The chunks of 512 positions that a step on real data has, as the golden losses' few have none, with logits whose
    exponentials fp32 holds and with others."""
    hidden, weight = (scale * matrix(600, WIDTH, 1)).requires_grad_(), matrix(1003, WIDTH, 2).requires_grad_()
    targets = torch.randint(1003, (len(hidden),), generator=torch.Generator().manual_seed(3))
    loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    found = loss, *torch.autograd.grad(loss, (hidden, weight))
    plain = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    expected = plain, *torch.autograd.grad(plain, (hidden, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_shared_negatives_in_whole_chunks_and_a_rest() -> None:
    hidden, weight = matrix(600, WIDTH, 1).requires_grad_(), matrix(100, WIDTH, 2).requires_grad_()
    logits = matrix(600, 1, 3)[:, 0].requires_grad_()
    log_q, targets = matrix(100, 1, 4)[:, 0] - 3, torch.arange(600)
    negatives = torch.arange(100) * 5  # each is the target of one position
    inputs = (hidden, logits, weight)
    loss = shared_cross_entropy(hidden, logits, targets, weight, negatives, log_q)
    found = loss, *torch.autograd.grad(loss, inputs)
    scores = hidden.double() @ weight.double().t() - log_q
    scores = scores.masked_fill(negatives == targets[:, None], -torch.inf)
    every = torch.cat([logits.double()[:, None], scores], dim=1)
    plain = torch.nn.functional.cross_entropy(every, torch.zeros_like(targets), reduction="sum")
    expected = plain, *torch.autograd.grad(plain, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)
