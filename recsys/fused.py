"""Softmax cross-entropy and its gradient in one pass over a chunk of logits, as a Triton kernel.

Needs Triton, which comes with the CUDA builds of torch. Every row of logits is read twice and written once, where
separate operations read and write it six times; with the products in bf16, that traffic is most of the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at once."""


@triton.jit
def _cross_entropy(logits, targets, losses, gradient, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: log sum exp minus the target's logit, and softmax minus one-hot."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    gradient += row * columns
    target = tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    norm = tl.zeros((), tl.float32)
    for start in range(0, columns, block):
        place = start + tl.arange(0, block)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 0))
        norm = norm * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(losses + row, largest + tl.log(norm) - tl.load(logits + target))
    for start in range(0, columns, block):
        place = start + tl.arange(0, block)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf"))
        slope = tl.exp(x - largest) / norm - tl.where(place == target, 1.0, 0.0)
        tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=place < columns)


def cross_entropy_and_gradient(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of each row of fp32 logits, and its gradient in `dtype`; that in fp32 takes the place of the logits."""
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    gradient = logits if dtype == torch.float32 else torch.empty(rows, columns, dtype=dtype, device=logits.device)
    _cross_entropy[(rows,)](logits, targets, losses, gradient, columns, min(BLOCK, triton.next_power_of_2(columns)))
    return losses, gradient
