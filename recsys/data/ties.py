"""Events of one user with the same timestamp: how their order is decided, and how much it decides.

Day-granular sources leave a third of adjacent events tied, and the order inside a tie then picks the test item
(Woolridge et al. 2021, "Sequence or Pseudo-Sequence?"). A policy settles the order of every tie group, the events
of one user at one time:

- `file_order`: as the source has them, which is what published numbers rest on;
- `seeded_random`: shuffled;
- `domain_random`: the events of each domain stay in file order, but how the domains interleave is shuffled;
- `drop`: events that share their time with another event of their user are left out.

What a shuffle does to a user depends on the seed, the raw user id and the user's own events, not on other users.
"""

from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, UInt64

TiePolicy = Literal["file_order", "seeded_random", "domain_random", "drop"]


def settle_ties(policy: TiePolicy, frame: pd.DataFrame, user_names: np.ndarray, seed: int) -> pd.DataFrame:
    """The events in their final order. `frame` is sorted by user and time, in file order within a tie."""
    group = _tie_groups(frame)
    match policy:
        case "file_order":
            return frame
        case "seeded_random":
            return frame.iloc[np.lexsort((_keys(frame, user_names, seed), group))]
        case "domain_random":
            domain = frame["domain"].to_numpy()
            keys = _keys(frame, user_names, seed)
            # Each domain of a group draws as many places as it has events, and fills them in file order.
            places = keys[np.lexsort((keys, domain, group))]
            keys[np.lexsort((domain, group))] = places
            return frame.iloc[np.lexsort((keys, group))]
        case "drop":
            size = np.bincount(group)
            return frame[size[group] == 1]


def tie_report(frame: pd.DataFrame) -> dict[str, Any]:
    """How many adjacent events of one user share their timestamp.

    `tied_share` is over adjacent pairs; `across_domains_share` counts the tied pairs of two domains, over the same
    pairs; `by_domain_index_share` says how many of those have the lower domain first: 0.5 in a fair order, 1 where
    the source was sorted domain by domain. None where there is nothing to divide by.
    """
    user, time, domain = (frame[name].to_numpy() for name in ("user", "timestamp", "domain"))
    pair = user[1:] == user[:-1]
    tied = pair & (time[1:] == time[:-1])
    crossing = tied & (domain[1:] != domain[:-1])
    ascending = crossing & (domain[1:] > domain[:-1])
    return {
        "adjacent_pairs": int(pair.sum()),
        "tied": int(tied.sum()),
        "tied_share": _share(tied, pair),
        "across_domains": int(crossing.sum()),
        "across_domains_share": _share(crossing, pair),
        "by_domain_index_share": _share(ascending, crossing),
    }


def _share(part: Bool[np.ndarray, " pairs"], whole: Bool[np.ndarray, " pairs"]) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _tie_groups(frame: pd.DataFrame) -> Int[np.ndarray, " events"]:
    """The number of each event's tie group, ascending."""
    user, time = frame["user"].to_numpy(), frame["timestamp"].to_numpy()
    return np.cumsum((np.diff(user, prepend=user[:1]) != 0) | (np.diff(time, prepend=time[:1]) != 0))


def _keys(frame: pd.DataFrame, user_names: np.ndarray, seed: int) -> UInt64[np.ndarray, " events"]:
    """A random number per event that depends on the seed, the raw user id and the position within the user."""
    user = frame["user"].to_numpy()
    starts = np.flatnonzero(np.diff(user, prepend=-1) != 0)
    position = np.arange(len(user)) - np.repeat(starts, np.diff([*starts, len(user)]))
    salt = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    of_user = _mix(pd.util.hash_array(user_names, categorize=False) ^ salt)
    return _mix(of_user[user] + position.astype(np.uint64))


def _mix(state: UInt64[np.ndarray, " states"]) -> UInt64[np.ndarray, " states"]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): consecutive states give unrelated numbers."""
    state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
