"""The negatives of sampled protocols: drawn for all targets of a batch, each by a generator of its own."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from recsys.evaluation.protocols import Negatives, positions
from recsys.evaluation.seeds import generators
from recsys.evaluation.targets import Targets
from recsys.types import Catalog

_MANY = 100
"""Among more places than this one searches, fewer are gone through one by one."""


def draw_negatives(
    negatives: Negatives,
    pool: Int[Tensor, " pool"],
    catalog: Catalog,
    targets: Targets,
    seed: int,
    thread: int = 0,
) -> Int[Tensor, "batch negatives"]:
    """Positions in `pool` of every row's negatives; a row that has fewer is filled with its target's position.

    Each row has a generator of its own, seeded by (seed, user, target): the draw does not depend on the batch, on
    other users or on the model, it is the same at every evaluation, and a run on one domain meets the negatives of
    a run on all. The draws of different threads are independent; that of the first is that of a model without.
    """
    place = positions(pool, catalog).cpu().numpy()
    weights = catalog.train_counts.cpu().numpy()[pool.cpu().numpy()].astype(np.float64)
    drawable = weights.nonzero()[0] if negatives.by_popularity else np.arange(len(pool))
    weights = weights[drawable]
    number = np.full(len(pool) + 1, len(drawable))  # of a place among the drawable ones; this one is no number
    number[drawable] = np.arange(len(drawable))
    own = place[targets.target.cpu().numpy()]
    left_out = own[:, None]
    if negatives.unseen:
        left_out = np.concatenate([left_out, place[targets.seen.cpu().numpy()]], axis=1)
    barred, bars = _distinct(number[left_out], len(drawable))
    order = np.argsort(-bars)  # rows are drawn for in this order, see `_skip`
    barred, bars = barred[order], bars[order]

    choices = len(drawable) - bars
    counts = np.where(choices > 0, negatives.count, 0) if negatives.replace else choices.clip(max=negatives.count)
    drawn = np.zeros((len(own), negatives.count), dtype=np.int32)
    streams = generators(_seeds(seed, targets, thread)[order])
    for row, (generator, free, count) in enumerate(zip(streams, choices.tolist(), counts.tolist(), strict=True)):
        if not count:
            continue
        odds = None
        if negatives.by_popularity:
            odds = np.delete(weights, barred[row, : bars[row]])
            odds /= odds.sum()
        drawn[row, :count] = generator.choice(free, count, negatives.replace, odds, shuffle=False)
    _skip(torch.from_numpy(drawn), torch.from_numpy(barred.astype(np.int32)), bars)

    found = np.empty(drawn.shape, dtype=np.int64)
    found[order] = drawn if len(drawable) == len(pool) else drawable[drawn]
    for short in np.nonzero(counts < negatives.count)[0]:
        found[order[short], counts[short] :] = own[order[short]]
    return torch.from_numpy(found).to(pool.device)


def _distinct(numbers: npt.NDArray[np.int64], end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each row's numbers below `end`, ascending and each once, filled up with `end`; and how many they are."""
    numbers = np.sort(numbers, axis=1)
    numbers[:, 1:][numbers[:, 1:] == numbers[:, :-1]] = end
    numbers.sort(axis=1)
    return numbers, (numbers < end).sum(axis=1)


def _skip(drawn: Int[Tensor, "rows draws"], barred: Int[Tensor, "rows some"], bars: npt.NDArray[np.int64]) -> None:
    """Turns numbers among what is not barred into numbers among all. Each row has `bars` barred ones, in ascending
    order and then larger ones; rows with more of them come first."""
    many = int((bars > _MANY).sum())
    place, long = torch.arange(barred.shape[1], dtype=torch.int32), barred[:many]
    unbarred_before = torch.where(place < torch.from_numpy(bars)[:many, None], long - place, long)
    drawn[:many] += torch.searchsorted(unbarred_before, drawn[:many], right=True, out_int32=True)
    above = torch.empty_like(drawn)  # ones and zeros, which are made faster than booleans
    for column in range(bars[many:].max(initial=0)):
        rows = slice(many, int((bars > column).sum()))
        part = drawn[rows]
        part += torch.ge(part, barred[rows, column, None], out=above[rows])


def _seeds(seed: int, targets: Targets, thread: int) -> npt.NDArray[np.uint32]:
    """The 32-bit words that NumPy makes of (seed, user, target), and of a further (thread) where that is not 0, as a
    seed: a row per target."""
    parts = [targets.user.cpu().numpy(), targets.target.cpu().numpy()]
    shifts = range(0, max(1, seed.bit_length()), 32)
    parts = [*(np.full_like(parts[0], seed >> shift & 0xFFFFFFFF) for shift in shifts), *parts]
    if thread:
        parts.append(np.full_like(parts[0], thread))
    return np.stack(parts, axis=1).astype(np.uint32)


class NegativesHash:
    """sha256 over the negatives of all targets, whatever the order they come in."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, bytes]] = []

    def update(self, targets: Targets, items: Int[Tensor, "batch negatives"]) -> None:
        """`items`: the ids of the negatives, in the order they were drawn."""
        contents = items.cpu().numpy().astype("<i8", copy=False)
        digests = [hashlib.sha256(row).digest() for row in contents]
        self._rows += zip(targets.user.tolist(), targets.target.tolist(), digests, strict=True)

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for user, target, digest in sorted(self._rows):
            total.update(f"{user} {target} ".encode() + digest)
        return total.hexdigest()
