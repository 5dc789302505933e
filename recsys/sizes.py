"""How many of what a batch holds, known where it is put together, so that nobody waits for the device to be told."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """The stream of one domain, laid out as `rows x length`, a row for each user who has a slot in it."""

    rows: int
    length: int
    slots: int
    """Real ones."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of a batch, the tuples by domain.

    All but `targets` may be larger than what there is, so that batches of one width have the same sizes: then the
    batch ends with a row of padding alone, and so does every block.
    """

    targets: tuple[int, ...]
    events: int
    questions: tuple[int, ...]
    known: tuple[int, ...]
    """Questions for the domain that come after an event of it, or at one."""
    blocks: tuple[Block, ...]
    """A slot where the merged history has an event of the domain or asks for it."""
    event_blocks: tuple[Block, ...]
    """A slot where it has an event of the domain."""


def bounds(rows: int, length: int, targets: tuple[int, ...]) -> Sizes:
    """Sizes that fit every batch of `rows x length` whose last row is padding; only `targets` are those there are."""
    cells = rows * length
    blocks = (Block(rows, length, cells),) * len(targets)
    each = (cells,) * len(targets)
    return Sizes(targets, cells, each, each, blocks, blocks)


def may_count(values: Tensor) -> bool:
    """Whether a shape, or what is done next, may depend on values; a step on a GPU would have to wait for them."""
    return not values.is_cuda


def places(mask: Bool[Tensor, "*shape"], size: int | None) -> Int[Tensor, " places"]:
    """Flat places of what is True, in order. Filled up to a larger `size` with the last place, which must be False
    then; None counts them first, which waits for the device."""
    flat = mask.flatten()
    if size is None:
        return flat.nonzero().flatten()
    # As `nonzero_static`, which is slower on a CPU, and for no stack of masks.
    rank = torch.where(flat, flat.cumsum(0) - 1, size)
    found = flat.new_full((size + 1,), max(len(flat) - 1, 0), dtype=torch.int64)
    return found.scatter(0, rank, torch.arange(len(flat), device=flat.device))[:size]
