"""Sequences of many lengths laid out for attention: the short ones together and the long ones together."""

import torch
from jaxtyping import Int
from torch import Tensor

from recsys.sizes import may_count

_GROUPS = 8
"""Kinds of length: more save less padding than their calls cost."""


def may_be_sorted(lengths: Int[Tensor, " lines"], events: int) -> bool:
    """Whether there is a layout by length: on a CPU the lengths are known, elsewhere (and to a compiled step) it would
    have to wait for them. A batch that is filled up to a fixed size has more events than its lines."""
    known = events > 0 and may_count(lengths) and not torch.compiler.is_compiling()
    return known and int(lengths.sum()) == events


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
