"""Batches, gathered by index from packed arrays that lie on the training device.

The events of a view (the TRAIN events, perhaps of one domain) are packed once, in the narrow types of the files. A
batch is an index computation and a gather per field, widened to int64 on the way: no Python per row, no prefix is ever
copied.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from recsys.data.policies import unknown_domain
from recsys.data.sequences import Sequences
from recsys.data.split import TEST, TRAIN, VALID, Split, train_counts
from recsys.sizes import Block, Sizes, bounds
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, TrainingEvents


class TrainBatches:
    """Training rows of every user in shuffled batches: items = events[:-1], targets = events[1:], TRAIN events only.

    The order of an epoch is a function of (seed, epoch) alone: all rows are shuffled, sorted by length within pools of
    `length_pool` batches so that little padding is left (None does not sort), cut into batches, and the batches are
    shuffled. A batch is trimmed to its longest row. Each iteration runs over the current epoch from its first batch;
    only after `load_state_dict` it goes on where that state was taken.
    """

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        *,
        max_len: int,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        domain: str | None = None,
        windows: Literal["last", "all"] = "last",
        length_pool: int | None = 32,
        width_step: int | None = None,
        prefetch: int | None = None,
    ) -> None:
        """`windows`: a row of a user's last `max_len` targets; or rows of consecutive targets, the last one full, that
        make each TRAIN event but the user's first a target once. `domain` leaves out the events of the others.

        `width_step` gives batches few shapes: a width that is a multiple of it (or `max_len`), rows of padding up to
        one more than `batch_size`, and sizes that fit every batch of that shape. None leaves them as they come.

        `prefetch` leaves the events in the host's memory, where a thread gathers so many batches ahead and sends them
        to the device from pinned memory; None puts all of them on the device.

        Raises DataError for an unknown domain.
        """
        assert max_len >= 1
        assert batch_size >= 1
        assert length_pool is None or length_pool >= 1
        assert width_step is None or width_step >= 1
        assert prefetch is None or prefetch >= 1
        self._device, self._prefetch = torch.device(device), prefetch
        device = device if prefetch is None else "cpu"
        keep = (split.role == TRAIN) & _of_domain(sequences, domain)
        self._events = _Events.pack(sequences, keep, device)
        user, start, stop = _windows(self._events.offsets, max_len, windows)
        self._user, self._start, self._stop = (torch.from_numpy(array).to(device) for array in (user, start, stop))
        self._lengths = torch.from_numpy(stop - start) - 1
        kept = np.asarray(sequences.domains)[keep]
        counts = [_count_rows(kept == k, start, stop) for k in range(sequences.num_domains)]
        self._counts = np.stack(counts, axis=1)
        self._max_len = max_len
        self._width_step = width_step
        self.skipped = sequences.num_users - len(np.unique(user))
        """Users with fewer than two events to train on: they have no row."""
        self._batch_size = batch_size
        self._length_pool = length_pool
        self._seed = seed
        self._epoch = 0
        self._first = self._next = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._lengths) // self._batch_size)

    @property
    def num_rows(self) -> int:
        """Training rows of an epoch."""
        return len(self._lengths)

    @property
    def num_targets(self) -> int:
        """Targets of an epoch, each the question of one valid position."""
        return int(self._lengths.sum())

    def sample(self, count: int) -> list[Batch]:
        """Up to `count` batches spread over the first epoch, its middle where it is one; the others are not made."""
        order = self._order(0)
        places = [(2 * index + 1) * len(order) // (2 * count) for index in range(count)]
        return [self._gather(order[place]) for place in dict.fromkeys(places)]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one is left where it is."""
        if epoch != self._epoch:
            self._epoch, self._first, self._next = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been given out."""
        return {"epoch": self._epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._first, self._next = state["epoch"], state["batch"], state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        first, self._first, self._next = self._first, 0, self._first
        order = self._order(self._epoch)[first:]
        made = map(self._gather, order) if self._prefetch is None else self._ahead(order, self._prefetch)
        for batch in made:
            self._next += 1
            yield batch

    def _ahead(self, order: Iterable[Tensor], count: int) -> Iterator[Batch]:
        """The batches, `count` of them made before they are asked for. Nobody waits for the device."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

        def make(rows: Tensor) -> tuple[Batch, torch.cuda.Event | None]:
            batch = self._gather(rows)
            if stream is None:
                return batch, None
            with torch.cuda.stream(stream):
                sent = replace(batch.map(lambda column: column.pin_memory()), sizes=batch.sizes).to(self._device)
                arrived = torch.cuda.Event()
                arrived.record(stream)
            return sent, arrived

        with ThreadPoolExecutor(max_workers=1) as thread:
            rest = iter(order)
            waiting = deque(thread.submit(make, rows) for rows in islice(rest, count))
            while waiting:
                batch, arrived = waiting.popleft().result()
                waiting.extend(thread.submit(make, rows) for rows in islice(rest, 1))
                if arrived is not None:
                    current = torch.cuda.current_stream(self._device)
                    current.wait_event(arrived)
                    for column in batch.columns().values():
                        column.record_stream(current)  # its memory is not given away while a step reads it
                yield batch

    def _order(self, epoch: int) -> tuple[Int[Tensor, " batch"], ...]:
        """The rows of each batch of an epoch, on the CPU, where the same seed means the same order for any device."""
        mixed = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        rows = torch.randperm(len(self._lengths), generator=generator)
        if self._length_pool is not None and len(rows):
            pool = torch.arange(len(rows)) // (self._length_pool * self._batch_size)
            rows = rows[(pool * (1 + int(self._lengths.max())) + self._lengths[rows]).argsort(stable=True)]
        batches = rows.split(self._batch_size)
        return tuple(batches[index] for index in torch.randperm(len(self), generator=generator).tolist())

    def _gather(self, rows: Int[Tensor, " batch"]) -> Batch:
        width = int(self._lengths[rows].max())
        sizes = self._sizes(rows.numpy())
        device = self._user.device
        filling = 0
        if self._width_step is not None:
            width = min(-(-width // self._width_step) * self._width_step, self._max_len)
            filling = self._batch_size + 1 - len(rows)
            sizes = bounds(self._batch_size + 1, width, sizes.targets)
        rows = F.pad(rows, (0, filling)).to(device, non_blocking=True)
        start, stop = self._start[rows], self._stop[rows]
        if filling:
            stop[-filling:] = start[-filling:] + 1  # no target
        index, real = _left_padded(start, stop - 1, width)
        items, domains, times = self._events.take(index, real)
        targets, target_domains, _ = self._events.take(index + 1, real)
        return Batch(self._user[rows], items, domains, times, targets, target_domains, sizes=sizes)

    def _sizes(self, rows: Int[np.ndarray, " batch"]) -> Sizes:
        counts = self._counts[rows]
        total, users, longest = (each.tolist() for each in (counts.sum(0), (counts > 0).sum(0), counts.max(0)))
        blocks, event_blocks = (
            tuple(Block(users[k][kind], longest[k][kind], total[k][kind]) for k in range(len(total))) for kind in (3, 0)
        )
        targets = tuple(each[1] for each in total)
        return Sizes(
            targets=targets,
            events=sum(each[0] for each in total),
            questions=targets,
            known=tuple(each[2] for each in total),
            blocks=blocks,
            event_blocks=event_blocks,
        )


def _count_rows(
    is_it: Bool[np.ndarray, " events"], start: Int[np.ndarray, " rows"], stop: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, "rows kinds"]:
    """Of one domain in every row: its events; positions that ask for it; those of them at an event of it or later;
    positions with either. A row's positions are its events but the last, which is a target.
    """
    event, asks = np.append(is_it, False), np.append(is_it[1:], [False, False])
    events, asked, either = (
        np.concatenate([[0], np.cumsum(mask, dtype=np.int32)]) for mask in (event, asks, event | asks)
    )
    last = np.maximum(stop - 1, start)
    first = np.where(event, np.arange(len(event)), len(event))
    first = np.minimum(np.minimum.accumulate(first[::-1])[::-1][start], last)  # event at or after the row's start
    counts = [
        events[last] - events[start],
        asked[last] - asked[start],
        asked[last] - asked[first],
        either[last] - either[start],
    ]
    return np.stack(counts, axis=1)


@dataclass(frozen=True)
class EvalBatch:
    """Histories whose last position asks for one target each, all targets of one domain."""

    batch: Batch
    seen: Int[Tensor, "batch seen"]
    """Every item of the untruncated history, filled up with `PAD_ID`; a target that repeats one stands in it too."""
    history: Int[Tensor, " batch"]
    """Events before the target, not truncated."""
    position: Int[Tensor, " batch"]
    """Where the target lies in the packed sequences."""


class EvalBatches:
    """The targets of a stage with their histories, domain by domain, in a fixed order (shorter histories first).

    The history of a validation target is every earlier event of its user but TEST events, that of a test target
    every earlier event; both are cut to `max_len` after that.
    """

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        stage: Literal["validation", "test"],
        *,
        max_len: int,
        batch_size: int,
        device: torch.device | str,
        domain: str | None = None,
    ) -> None:
        """`domain` leaves out the events of the others, as history and as targets. Raises DataError if unknown."""
        assert max_len >= 1
        assert batch_size >= 1
        role = VALID if stage == "validation" else TEST
        keep = _of_domain(sequences, domain)
        if stage == "validation":
            keep &= split.role != TEST
        kept = np.flatnonzero(keep)
        self._events = _Events.pack(sequences, keep, device)
        offsets = self._events.offsets
        target = np.flatnonzero(split.role[kept] == role)
        user = np.searchsorted(offsets, target, side="right") - 1
        history = target - offsets[user]
        self.skipped = int((history == 0).sum())
        """Targets without any history; a model has nothing to be asked about, so they are left out."""
        domains = sequences.domains[kept[target]]
        order = np.lexsort((target, history, domains))
        order = order[history[order] > 0]
        rows = (user, offsets[user], target, kept[target])
        self._user, self._start, self._target, self._position = (
            torch.from_numpy(array[order]).to(device) for array in rows
        )
        self._history = torch.from_numpy(history[order])
        ends = np.searchsorted(domains[order], np.arange(sequences.num_domains), side="right")
        self._batches = [
            slice(first, min(first + batch_size, int(end)))
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
            for first in range(int(begin), int(end), batch_size)
        ]
        self._max_len = max_len

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[EvalBatch]:
        return map(self._gather, self._batches)

    def _gather(self, rows: slice) -> EvalBatch:
        start, target = self._start[rows], self._target[rows]
        longest = int(self._history[rows].max())
        seen, _, _ = self._events.take(*_left_padded(start, target, longest))
        length = min(longest, self._max_len)
        items, domains, times = self._events.take(*_left_padded(torch.maximum(start, target - length), target, length))
        asks = torch.zeros_like(items, dtype=torch.bool)
        asks[:, -1] = True
        targets, target_domains, _ = self._events.take(target[:, None].expand_as(items), asks)
        batch = Batch(self._user[rows], items, domains, times, targets, target_domains)
        return EvalBatch(batch, seen, target - start, self._position[rows])


def make_catalog(sequences: Sequences, split: Split) -> Catalog:
    """The items, with their counts over the TRAIN events of all domains."""
    item_domain = torch.from_numpy(sequences.item_domain.astype(np.int64))
    return Catalog(sequences.domain_names, item_domain, torch.from_numpy(train_counts(sequences, split)))


def training_events(sequences: Sequences, split: Split, domain: str | None = None) -> TrainingEvents:
    """The users' TRAIN events laid end to end, for models that read something off them before training.

    `domain` leaves out the events of the others. Raises DataError for an unknown domain.
    """
    keep = (split.role == TRAIN) & _of_domain(sequences, domain)
    return TrainingEvents(
        items=torch.from_numpy(sequences.items[keep].astype(np.int64)),
        times=torch.from_numpy(sequences.times[keep]),
        offsets=torch.from_numpy(_kept_offsets(sequences, keep)),
    )


@dataclass(frozen=True)
class _Events:
    """Some of the events, packed anew: narrow on the device, with the offsets where the rows are made."""

    items: Int[Tensor, " events"]
    domains: Int[Tensor, " events"]
    times: Int[Tensor, " events"]
    offsets: np.ndarray

    @classmethod
    def pack(cls, sequences: Sequences, keep: Bool[np.ndarray, " events"], device: torch.device | str) -> "_Events":
        arrays = (sequences.items, sequences.domains, sequences.times)
        items, domains, times = (torch.from_numpy(array[keep]).to(device) for array in arrays)
        return cls(items, domains, times, _kept_offsets(sequences, keep))

    def take(
        self, index: Int[Tensor, "batch length"], real: Bool[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
        """Items, domains and times at `index`; padding where it is not `real`."""
        index = index.clamp(0, len(self.items) - 1)
        return (
            self.items[index].long().masked_fill_(~real, PAD_ID),
            self.domains[index].long().masked_fill_(~real, NO_DOMAIN),
            self.times[index].masked_fill_(~real, 0),
        )


def _of_domain(sequences: Sequences, domain: str | None) -> Bool[np.ndarray, " events"]:
    """True at the events of a domain; everywhere for None."""
    if domain is None:
        return np.ones(len(sequences.domains), dtype=bool)
    if domain not in sequences.domain_names:
        raise unknown_domain(domain, sequences.domain_names)
    return np.asarray(sequences.domains == sequences.domain_names.index(domain))


def _kept_offsets(sequences: Sequences, keep: Bool[np.ndarray, " events"]) -> Int[np.ndarray, " boundaries"]:
    """Offsets of the users among the kept events."""
    return np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])[sequences.offsets]


def _windows(
    offsets: Int[np.ndarray, " boundaries"], max_len: int, windows: Literal["last", "all"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, first and last event (exclusive) of every row: windows of `max_len` targets counted from the end."""
    targets = np.maximum(np.diff(offsets) - 1, 0)
    count = np.minimum(targets, 1) if windows == "last" else -(-targets // max_len)
    user = np.repeat(np.arange(len(targets)), count)
    from_end = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    stop = offsets[user + 1] - from_end * max_len
    return user, np.maximum(offsets[user], stop - max_len - 1), stop


def _left_padded(
    start: Int[Tensor, " batch"], stop: Int[Tensor, " batch"], length: int
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Indices of the events `start:stop` of each row, flush right, and which of them are real."""
    index = stop[:, None] - torch.arange(length, 0, -1, device=stop.device)
    return index, index >= start[:, None]
