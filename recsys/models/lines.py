"""Sequences of many lengths laid out for attention: the short ones together and the long ones together."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.sizes import may_count

_GROUPS = 8
"""Kinds of length: more save less padding than their calls cost."""


def line_lengths(
    masks: Sequence[Bool[Tensor, "_ _"]], events: Float[Tensor, "events d_model"]
) -> Int[Tensor, " lines"] | None:
    """How many events the rows of some masks have, mask by mask; None where they cannot be sorted by it.

    On a CPU lengths are known; elsewhere, and in a compiled step, a layout would have to wait for them. A batch that is
    filled up to a fixed size has more `events` than its lines, and one without any has nothing to lay out.
    """
    if not may_count(events) or torch.compiler.is_compiling():
        return None
    lengths = torch.cat([mask.sum(dim=1) for mask in masks])
    return lengths if int(lengths.sum()) == len(events) > 0 else None


def sort_lines(lengths: Int[Tensor, " lines"]) -> tuple[Int[Tensor, " events"], list[tuple[int, int]]]:
    """Where to put the events of lines that lie end to end, and the `rows, length` of the blocks that are made of them.
    At least one line has events.

    The blocks lie end to end as well; each holds lines of about the same length, padded at their ends to the longest.

    >>> place, blocks = sort_lines(torch.tensor([2, 0, 1]))
    >>> blocks, place.tolist()
    ([(1, 1), (1, 2)], [1, 2, 0])
    """
    order = lengths.argsort(stable=True)
    start = torch.zeros_like(lengths)
    blocks, total = [], 0
    for rows in order[lengths[order] > 0].chunk(_GROUPS):
        length = int(lengths[rows[-1]])
        start[rows] = total + length * torch.arange(len(rows))
        blocks.append((len(rows), length))
        total += len(rows) * length
    before = lengths.cumsum(0) - lengths
    return (start - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum())), blocks
