"""What preparation does to the events of a source, and what it reports of it."""

import difflib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Int16
from pydantic import Field

from recsys.data.filters import Filter
from recsys.data.raw import RawEvents
from recsys.data.schema import DataError, bad_lines
from recsys.data.sequences import TimeUnit
from recsys.data.ties import TiePolicy, settle_ties, tie_report
from recsys.loading import Config


class PrepareOptions(Config):
    """What is done to the raw events, in the order of these fields (all in the source's own units and ids)."""

    duplicates: Literal["error", "keep_first", "keep_last", "keep_all"] = "keep_first"
    """Which of a user's events with one item stay (under `items_in_two_domains: split`, one item in one domain)."""
    items_in_two_domains: Literal["error", "drop", "first", "split"] = "error"
    """`drop` leaves all events of such an item out; `first` keeps those in the domain of its first event in the
    files; `split` makes an item of each domain of it, for sources whose domains number their items alike."""
    domains: tuple[str, ...] | None = None
    """Only these domains of the card; null means all."""
    ties: TiePolicy = "file_order"
    tie_seed: Annotated[int, Field(ge=0)] = 0
    filter: Filter | None = None


@dataclass(frozen=True)
class PreparedEvents:
    """Events with their final ids, in their final order."""

    frame: pd.DataFrame
    """`user`, `item`, `domain`, `timestamp`, `rating`."""
    users: np.ndarray
    """Raw id of every user."""
    items: np.ndarray
    """Raw id of every item; row 0 belongs to item 1."""
    item_domain: Int16[np.ndarray, " items"]
    """Domain of every item; row 0 belongs to item 1."""
    domain_names: tuple[str, ...]
    time_unit: TimeUnit
    repairs: dict[str, int]
    """What was found and what was taken out, in events unless the key says otherwise."""
    source_ties: dict[str, Any] | None
    """Ties before the policy; None where time is only an order."""


def apply_policies(raw: RawEvents, domains: tuple[str, ...], options: PrepareOptions) -> PreparedEvents:
    """The prepared events of a source. `domains` are the card's; raises DataError where a policy says `error`."""
    chosen = _chosen_domains(domains, options.domains)
    repairs: dict[str, int] = {"read": len(raw.frame)}
    user, time = raw.frame["user"].to_numpy(), raw.frame["timestamp"].to_numpy()
    repairs["out_of_order"] = int(_later_than_next(user, time).sum())
    frame = raw.frame.iloc[np.lexsort((time, user))]  # stable: file order within a user and a time

    same = ["user", "item", "domain", "timestamp", "rating"]
    repairs["exact_duplicates"] = int(frame.duplicated(same).sum())
    repairs["items_in_two_domains"] = len(_shared_items(frame))
    frame = _without_duplicates(raw, frame, options, repairs)
    frame = _one_domain_per_item(raw, frame, domains, options, repairs)
    if len(chosen) < len(domains):
        frame = _taken(frame, frame["domain"].isin(chosen).to_numpy(), "removed_other_domains", repairs)
        frame = frame.assign(domain=np.searchsorted(chosen, frame["domain"]).astype(np.int16))
    names = tuple(domains[index] for index in chosen)

    timed = raw.time_unit == "seconds"
    source_ties = tie_report(frame) if timed else None
    if timed:
        settled = settle_ties(options.ties, frame, raw.users, options.tie_seed)
        repairs["removed_ties"] = len(frame) - len(settled)
        frame = settled
    if options.filter is not None and len(frame):
        frame = _taken(frame, options.filter.keep(frame, len(names)), "removed_by_filter", repairs)
    if not len(frame):
        raise DataError(
            "no event is left after the preparation: "
            + ", ".join(f"{name} {count:,}" for name, count in repairs.items())
            + "; loosen the filter or choose other domains"
        )
    return _numbered(raw, frame, names, repairs, source_ties)


def unknown_domain(name: str, domains: tuple[str, ...]) -> DataError:
    near = difflib.get_close_matches(name, domains, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the domains are: {', '.join(domains)}"
    return DataError(f"there is no domain {name!r} in this dataset; {hint}")


def _chosen_domains(domains: tuple[str, ...], subset: tuple[str, ...] | None) -> list[int]:
    """Indices of the domains to keep, ascending."""
    if subset is None:
        return list(range(len(domains)))
    if not subset:
        raise DataError("the option domains names no domain; leave it out to keep all of them")
    for name in subset:
        if name not in domains:
            raise unknown_domain(name, domains)
    return sorted({domains.index(name) for name in subset})


def _later_than_next(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Events of the files whose user's next event in the files is earlier."""
    order = np.argsort(user, kind="stable")
    user, time = user[order], time[order]
    return (user[1:] == user[:-1]) & (time[1:] < time[:-1])


def _taken(frame: pd.DataFrame, keep: np.ndarray, name: str, repairs: dict[str, int]) -> pd.DataFrame:
    """The events to keep; how many go is noted under `name`."""
    repairs[name] = int(len(frame) - keep.sum())
    return frame[keep]


def _without_duplicates(
    raw: RawEvents, frame: pd.DataFrame, options: PrepareOptions, repairs: dict[str, int]
) -> pd.DataFrame:
    same = ["user", "item", "domain"] if options.items_in_two_domains == "split" else ["user", "item"]
    repeated = frame.duplicated(same).to_numpy()
    repairs["duplicates"] = int(repeated.sum())
    match options.duplicates:
        case "error":
            if repeated.any():
                raise bad_lines(
                    "duplicate events",
                    _places(raw, frame[repeated]),
                    int(repeated.sum()),
                    "The user has this item already. Set duplicates to keep_first, keep_last or keep_all.",
                )
            return frame
        case "keep_first":
            return _taken(frame, ~repeated, "removed_duplicates", repairs)
        case "keep_last":
            return _taken(frame, ~frame.duplicated(same, keep="last").to_numpy(), "removed_duplicates", repairs)
        case "keep_all":
            return frame


def _one_domain_per_item(
    raw: RawEvents, frame: pd.DataFrame, domains: tuple[str, ...], options: PrepareOptions, repairs: dict[str, int]
) -> pd.DataFrame:
    shared = _shared_items(frame)
    if not len(shared):
        return frame
    item = frame["item"].to_numpy()
    match options.items_in_two_domains:
        case "error":
            first = frame[np.isin(item, shared)].drop_duplicates(["item", "domain"]).sort_values("item", kind="stable")
            problems = [
                f"{place}, domain {domains[domain]!r}"
                for place, domain in zip(_places(raw, first), first["domain"], strict=False)
            ]
            raise bad_lines(
                f"{len(shared):,} items stand in two domains",
                problems,
                len(first),
                "Set items_in_two_domains to drop (leave them out), first (keep the domain that comes first) or "
                "split (an item per domain).",
            )
        case "drop":
            return _taken(frame, ~np.isin(item, shared), "removed_items_in_two_domains", repairs)
        case "first":
            home = np.zeros(len(raw.items), dtype=np.int16)
            in_file_order = frame.sort_index().drop_duplicates("item")
            home[in_file_order["item"]] = in_file_order["domain"]
            return _taken(frame, home[item] == frame["domain"].to_numpy(), "removed_items_in_two_domains", repairs)
        case "split":
            return frame


def _shared_items(frame: pd.DataFrame) -> np.ndarray:
    """Items with events in more than one domain."""
    num_domains = frame[["item", "domain"]].drop_duplicates()["item"].value_counts()
    return np.sort(num_domains.index[num_domains > 1].to_numpy())


def _places(raw: RawEvents, events: pd.DataFrame) -> list[str]:
    return raw.places(events.index.to_numpy())


def _numbered(
    raw: RawEvents,
    frame: pd.DataFrame,
    names: tuple[str, ...],
    repairs: dict[str, int],
    source_ties: dict[str, Any] | None,
) -> PreparedEvents:
    """Users count from 0 and items from 1, domain by domain, both in the canonical order of their raw ids."""
    users, user = np.unique(frame["user"].to_numpy(), return_inverse=True)
    owner = frame["domain"].to_numpy(dtype=np.int64) * len(raw.items) + frame["item"].to_numpy()
    owners, row = np.unique(owner, return_inverse=True)
    timestamp = frame["timestamp"].to_numpy()
    lengths = np.bincount(user)
    if raw.time_unit == "order":
        timestamp = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    repairs["users_with_one_event"] = int((lengths == 1).sum())
    return PreparedEvents(
        frame=pd.DataFrame(
            {
                "user": user.astype(np.int32),
                "item": (row + 1).astype(np.int32),
                "domain": frame["domain"].to_numpy(dtype=np.int16),
                "timestamp": timestamp.astype(np.int64),
                "rating": frame["rating"].to_numpy(dtype=np.float32),
            }
        ),
        users=raw.users[users],
        items=raw.items[owners % len(raw.items)],
        item_domain=(owners // len(raw.items)).astype(np.int16),
        domain_names=names,
        time_unit=raw.time_unit,
        repairs=repairs,
        source_ties=source_ties,
    )
