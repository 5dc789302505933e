"""A stand-in for propensities that were not logged."""

from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field

from recsys.loading import Config


class ItemFrequency(Config):
    """The share of an item among all that was shown in its domain at its position, smoothed.

    It knows nothing of the user: right for a policy that ignores the history, and only for one.
    """

    name: Literal["item_frequency"] = "item_frequency"
    smoothing: float = Field(1.0, ge=0)
    """Added to the count of every item that was shown in the domain."""

    def fit(
        self,
        item: Int64[np.ndarray, " rows"],
        domain: Int64[np.ndarray, " rows"],
        position: Int64[np.ndarray, " rows"],
    ) -> Float64[np.ndarray, " rows"]:
        """The fitted probability of every row's item."""
        cell = _index(np.stack([domain, position]))
        kinds = np.bincount(_index(np.unique(np.stack([domain, item]), axis=1)[:1]))[_index(domain[None])]
        both = _index(np.stack([cell, item]))
        total = np.bincount(cell)[cell] + self.smoothing * kinds
        return (np.bincount(both)[both] + self.smoothing) / total


def _index(keys: Int64[np.ndarray, "keys rows"]) -> Int64[np.ndarray, " rows"]:
    """The number of each column among the distinct columns."""
    return np.unique(keys, axis=1, return_inverse=True)[1].astype(np.int64).ravel()
