"""What is evaluated: a policy over the scores that a recommender gives to the requests of a log."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.policies import Policy
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Scorer


@runtime_checkable
class Scores(Protocol):
    """Scores for some requests of a log, one call at a time: a log's scores as a whole fit no memory."""

    def __call__(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """`requests` are rows of the log, all of one domain; `items` the ids of that domain's items."""
        ...


@dataclass(frozen=True)
class Requests:
    """Who asks for what, and when: what a recommender must know before anything is shown."""

    user: Int64[np.ndarray, " requests"]
    domain: Int64[np.ndarray, " requests"]
    time: Int64[np.ndarray, " requests"]


@dataclass(frozen=True)
class Candidate:
    """A policy that might be shown."""

    name: str
    policy: Policy
    scores: Scores


@dataclass(frozen=True)
class ItemScores:
    """The same scores for every request: popularity, a constant, a table."""

    table: Float[Tensor, " items"]
    """By item id; the entry of `PAD_ID` is never read."""

    def __call__(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        return self.table[items].expand(len(requests), -1)


class Kept:
    """Scores that are asked for more than once, in the same chunks, kept as long as they are few enough."""

    def __init__(self, scores: Scores, cells: int = 50_000_000) -> None:
        """`cells` numbers are kept at most; what does not fit is made anew every time."""
        self._scores = scores
        self._room = cells
        self._kept: dict[tuple[int, int], Float[Tensor, "batch candidates"]] = {}

    def __call__(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        chunk = int(requests[0]), len(requests)
        if chunk not in self._kept:
            scores = self._scores(requests, items)
            if scores.numel() > self._room:
                return scores
            self._room -= scores.numel()
            self._kept[chunk] = scores
        return self._kept[chunk]


class HistoryScores:
    """A recommender's scores given what a request's user had done before the request was made.

    Over a large catalogue few requests are asked for at a time: a `DotScorer` wastes no work if its `rows` are as few.
    Requests with one history are scored once.
    """

    def __init__(self, scorer: Scorer, sequences: Sequences, log: LoggedFeedback | Requests, max_len: int) -> None:
        """Raises DataError where a user is unknown or had done nothing yet."""
        if log.user.min() < 0 or log.user.max() >= sequences.num_users:
            raise DataError(f"the log has users outside 0..{sequences.num_users - 1}, those of the histories")
        self._scorer = scorer
        self._max_len = max_len
        self._domain = torch.from_numpy(log.domain)
        self._user = torch.from_numpy(log.user)
        self._events = [torch.from_numpy(np.array(array)) for array in (sequences.items, sequences.domains)]
        self._times = torch.from_numpy(np.array(sequences.times))
        start = sequences.offsets[log.user]
        stop = [
            first + np.searchsorted(sequences.times[first:last], time)
            for first, last, time in zip(start, sequences.offsets[log.user + 1], log.time, strict=True)
        ]
        self._start, self._stop = torch.from_numpy(start), torch.tensor(stop)
        empty = int((self._start == self._stop).sum())
        if empty:
            raise DataError(
                f"{empty:,} requests come before their user's first event, and a recommender reads a history; "
                "leave these requests out of the log"
            )

    def __call__(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        batch = self.batch(requests).to(items.device)
        # a history ends where no other does
        stop, copies = self._stop[requests].unique(return_inverse=True)
        first = torch.empty_like(stop).scatter_(0, copies, torch.arange(len(copies)))
        with torch.no_grad():
            return self._scorer.scores(batch.map(lambda column: column[first]), items)[copies]

    def batch(self, requests: Int[Tensor, " batch"]) -> Batch:
        """The histories of some requests, each asking for the request's domain at its end."""
        start, stop = self._start[requests], self._stop[requests]
        length = min(int((stop - start).max()), self._max_len)
        index = stop[:, None] - torch.arange(length, 0, -1)
        padding = index < start[:, None]
        index = index.clamp(min=0)
        history, domains = (events[index].long() for events in self._events)
        asked = torch.full_like(history, NO_DOMAIN)
        asked[:, -1] = self._domain[requests]
        return Batch(
            user=self._user[requests],
            items=history.masked_fill(padding, PAD_ID),
            domains=domains.masked_fill(padding, NO_DOMAIN),
            times=self._times[index].masked_fill(padding, 0),
            targets=torch.full_like(history, PAD_ID),
            target_domains=asked,
        )
