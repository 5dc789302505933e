"""Which users and items are frequent enough to stay."""

from typing import Annotated, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from pydantic import Field

from recsys.loading import Config

Count = Annotated[int, Field(ge=1)]


class KCore(Config):
    """Items with fewer than `min_item` events and users with fewer than `min_user` go, again and again until all
    that is left has enough. With `per_domain` a user's events in a domain go where there are fewer than `min_user`
    of them in that domain."""

    name: Literal["k_core"] = "k_core"
    min_user: Count = 1
    min_item: Count = 1
    per_domain: bool = False

    def keep(self, frame: pd.DataFrame, num_domains: int) -> Bool[np.ndarray, " events"]:
        """Which events stay."""
        item = frame["item"].to_numpy()
        user = frame["user"].to_numpy(dtype=np.int64)
        owner = user * num_domains + frame["domain"].to_numpy() if self.per_domain else user
        kept = np.ones(len(frame), dtype=bool)
        while True:
            enough = kept & (_count(item, kept) >= self.min_item)
            enough &= _count(owner, enough) >= self.min_user
            if (enough == kept).all():
                return kept
            kept = enough


class AbxiFilter(Config):
    """The published preparation of ABXI (WWW 2025), once through in this order: users with events in every domain;
    items with at least `min_item` events among those; the last `max_events` events of each user; users with at
    least `min_user` events in every domain. Its first step, dropping items of two domains, is
    `items_in_two_domains: drop`."""

    name: Literal["abxi"] = "abxi"
    min_item: Count = 10
    max_events: Count = 50
    min_user: Count = 5

    def keep(self, frame: pd.DataFrame, num_domains: int) -> Bool[np.ndarray, " events"]:
        """Which events stay. `frame` is sorted by user and time."""
        item, domain = frame["item"].to_numpy(), frame["domain"].to_numpy()
        user = frame["user"].to_numpy(dtype=np.int64)
        kept = _in_every_domain(user, domain, np.ones(len(frame), dtype=bool), num_domains, 1)
        kept &= _count(item, kept) >= self.min_item
        from_end = _count(user, kept) - _rank(user, kept)
        kept &= from_end <= self.max_events
        return _in_every_domain(user, domain, kept, num_domains, self.min_user)


Filter = Annotated[KCore | AbxiFilter, Field(discriminator="name")]


def _count(group: Int[np.ndarray, " events"], kept: Bool[np.ndarray, " events"]) -> Int[np.ndarray, " events"]:
    """How many kept events the group of each event has."""
    return np.bincount(group, weights=kept).astype(np.int64)[group]


def _rank(group: Int[np.ndarray, " events"], kept: Bool[np.ndarray, " events"]) -> Int[np.ndarray, " events"]:
    """How many kept events of its group come before each event; `group` is ascending."""
    before = np.cumsum(kept) - kept
    return before - before[np.searchsorted(group, group, side="left")]


def _in_every_domain(
    user: Int[np.ndarray, " events"],
    domain: Int[np.ndarray, " events"],
    kept: Bool[np.ndarray, " events"],
    num_domains: int,
    least: int,
) -> Bool[np.ndarray, " events"]:
    """Kept events of the users who have at least `least` of them in every domain."""
    if not len(user):
        return kept
    counts = np.bincount(user * num_domains + domain, weights=kept, minlength=(user.max() + 1) * num_domains)
    enough = np.asarray(counts.reshape(-1, num_domains).min(axis=1) >= least)
    return kept & enough[user]
