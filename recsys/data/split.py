"""Which event is trained on, validated on and tested on; and what a split leaks.

A split gives every event one role. The training stream of a user is its TRAIN events in order; the history of a
VALID target is every earlier event of the user that is not TEST; the history of a TEST target is every earlier
event. Earlier means by position, and truncation to a maximum length comes after the split.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8
from pydantic import Field, model_validator

from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.loading import Config

TRAIN = 0
VALID = 1
TEST = 2
CONTEXT = 3
"""History only: never a target."""


@dataclass(frozen=True)
class Split:
    """One role per event, aligned with the packed arrays."""

    name: str
    role: UInt8[np.ndarray, " events"]
    hash: str
    """sha256 over the roles, the items and the offsets: two runs with the same hash are tested on the same events."""


class LeaveOneOut(Config):
    """The published protocol: the last event of the merged sequence is TEST, the one before it VALID.

    Users with fewer than three events are trained on and not evaluated.
    """

    name: Literal["leave_one_out"] = "leave_one_out"

    def roles(self, sequences: Sequences) -> UInt8[np.ndarray, " events"]:
        return _last_two(sequences, sequences.event_users())


class PerDomainLast(Config):
    """In every domain where a user has three events or more, the last is TEST and the one before it VALID.

    Every user is so evaluated in every domain that can be, and no domain's test set depends on another domain.
    """

    name: Literal["per_domain_last"] = "per_domain_last"

    def roles(self, sequences: Sequences) -> UInt8[np.ndarray, " events"]:
        return _last_two(sequences, sequences.event_users() * sequences.num_domains + sequences.domains)


Cutoff = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(gt=1)] | date
"""A quantile of the event times, unix seconds, or a date (its midnight in UTC)."""


class GlobalTime(Config):
    """One timeline for all users: TRAIN before `valid_from`, validation window up to `test_from`, test window after it.

    In each window `target` says which of a user's events are scored; the others are CONTEXT, and so is a target
    without any earlier event of its user. With both windows built the same way, no model sees the future
    (Ji et al. 2023; Gusak et al. 2025).
    """

    name: Literal["global_time"] = "global_time"
    valid_from: Cutoff = 0.8
    test_from: Cutoff = 0.9
    target: Literal["first", "last", "all"] = "last"

    @model_validator(mode="after")
    def _ordered(self) -> "GlobalTime":
        if type(self.valid_from) is type(self.test_from) and self.valid_from >= self.test_from:  # type: ignore[operator]
            raise ValueError(f"valid_from ({self.valid_from}) must come before test_from ({self.test_from})")
        return self

    def roles(self, sequences: Sequences) -> UInt8[np.ndarray, " events"]:
        if sequences.time_unit == "order":
            raise DataError(
                "the split global_time needs times, and this dataset keeps only the order of each user's events; "
                "use leave_one_out or per_domain_last"
            )
        valid_from, test_from = (_seconds(cutoff, sequences.times) for cutoff in (self.valid_from, self.test_from))
        if valid_from >= test_from:
            raise DataError(
                f"the split global_time needs valid_from before test_from, but they fall on {_day(valid_from)} and "
                f"{_day(test_from)}; move them apart"
            )
        window = np.searchsorted([valid_from, test_from], sequences.times, side="right")  # 0 train, 1 valid, 2 test
        users = sequences.event_users()
        group = users * 3 + window
        first, last = _starts(group), _ends(group)
        chosen = {"first": first, "last": last, "all": np.ones_like(first)}[self.target]
        target = chosen & ~_starts(users)
        return np.where(window == 0, TRAIN, np.where(target, window, CONTEXT)).astype(np.uint8)


SplitConfig = Annotated[LeaveOneOut | PerDomainLast | GlobalTime, Field(discriminator="name")]


def make_split(
    sequences: Sequences, config: LeaveOneOut | PerDomainLast | GlobalTime, train_users: float | None = None
) -> Split:
    """The roles of all events: a pure function of the packed arrays and the config.

    With `train_users`, that share of the users is trained on (at least one); the TRAIN events of the others become
    CONTEXT. What is validated and tested on stays, with its histories, and a smaller share is part of a larger one.
    """
    role = config.roles(sequences)
    if train_users is not None:
        order = np.random.default_rng(0).permutation(sequences.num_users)
        left_out = order[max(1, round(train_users * len(order))) :]
        role[(role == TRAIN) & np.isin(sequences.event_users(), left_out)] = CONTEXT
    digest = hashlib.sha256(role.tobytes())
    digest.update(sequences.items.tobytes())
    digest.update(sequences.offsets.tobytes())
    return Split(config.name, role, digest.hexdigest())


def train_counts(sequences: Sequences, split: Split) -> Int64[np.ndarray, " items"]:
    """TRAIN events per item id, length `num_items + 1`."""
    return np.bincount(sequences.items[split.role == TRAIN], minlength=sequences.num_items + 1)


def split_report(sequences: Sequences, split: Split) -> dict[str, Any]:
    """Sizes of a split, and the two faults to know before its numbers are read.

    `tied_test_share`: share of test events with the timestamp of the user's event before them, so that nothing but
    the tie policy made them the test event; `tied_across_domains_share`: the same where that event is of another
    domain. `later_train_share`: share of the training events of all users that are later than a test event, averaged
    over test events (0 under a timeline that all users share). None where nothing is tested or time is only an order.
    """
    test = split.role == TEST
    evaluated = np.unique(sequences.event_users()[test])
    previous = np.flatnonzero(test) - 1  # a test event is never the first of its user
    tied = sequences.times[previous] == sequences.times[test]
    crossing = sequences.domains[previous] != sequences.domains[test]
    timed = sequences.time_unit == "seconds" and bool(test.any())
    train_times = np.sort(sequences.times[split.role == TRAIN])
    later = len(train_times) - np.searchsorted(train_times, sequences.times[test], side="right")
    return {
        "hash": split.hash,
        "train": int((split.role == TRAIN).sum()),
        "validation": _per_domain(sequences, split.role == VALID),
        "test": _per_domain(sequences, test),
        "context": int((split.role == CONTEXT).sum()),
        "users_not_evaluated": sequences.num_users - len(evaluated),
        "tied_test_share": float(tied.mean()) if timed else None,
        "tied_across_domains_share": float((tied & crossing).mean()) if timed else None,
        "later_train_share": float(later.mean() / len(train_times)) if timed and len(train_times) else None,
    }


def _per_domain(sequences: Sequences, chosen: Bool[np.ndarray, " events"]) -> dict[str, int]:
    counts = np.bincount(sequences.domains[chosen], minlength=sequences.num_domains)
    return dict(zip(sequences.domain_names, counts.tolist(), strict=True))


def _last_two(sequences: Sequences, group: Int[np.ndarray, " events"]) -> UInt8[np.ndarray, " events"]:
    """TEST for the last event of every group of three or more, VALID for the one before it, TRAIN elsewhere."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    end = np.searchsorted(ordered, ordered, side="right")
    size = end - np.searchsorted(ordered, ordered, side="left")
    from_end = end - 1 - np.arange(len(ordered))
    role = np.full(len(ordered), TRAIN, dtype=np.uint8)
    role[order[(size >= 3) & (from_end == 0)]] = TEST
    role[order[(size >= 3) & (from_end == 1)]] = VALID
    return role


def _starts(group: Int[np.ndarray, " events"]) -> Bool[np.ndarray, " events"]:
    """True where a run of equal values begins."""
    return np.concatenate([np.ones(min(1, len(group)), dtype=bool), group[1:] != group[:-1]])


def _ends(group: Int[np.ndarray, " events"]) -> Bool[np.ndarray, " events"]:
    return np.concatenate([group[1:] != group[:-1], np.ones(min(1, len(group)), dtype=bool)])


def _seconds(cutoff: float | int | date, times: Int64[np.ndarray, " events"]) -> int:
    match cutoff:
        case float():
            return int(np.quantile(times, cutoff, method="higher"))
        case int():
            return cutoff
        case date():
            return int(datetime(cutoff.year, cutoff.month, cutoff.day, tzinfo=UTC).timestamp())


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
