"""Reward models: what an item would earn, as the direct and the doubly robust estimators guess it."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from pydantic import Field
from torch import Tensor

from recsys.loading import Config
from recsys.offpolicy.feedback import LoggedFeedback


@runtime_checkable
class RewardModel(Protocol):
    def predict(
        self, requests: Int[Tensor, " batch"], slot: int, items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Expected reward of a slate from `slot` down with each of `items` there; `requests` are rows of the log."""
        ...


class ItemMeans(Config):
    """Mean reward of the position plus what the item earns above it, shrunk; a request is predicted from other users.

    Users are dealt into folds and each is predicted from the other folds (cross-fitting): a doubly robust estimate
    stays unbiased, which it would not if the model had seen the rewards that it corrects.
    """

    name: Literal["item_means"] = "item_means"
    smoothing: float = Field(10.0, gt=0)
    """Showings at which an item's own mean counts as much as nothing at all."""
    folds: int = Field(5, ge=2)

    def fit(
        self, log: LoggedFeedback, reward: Float64[np.ndarray, "requests slots"], generator: np.random.Generator
    ) -> "FittedItemMeans":
        users, user = np.unique(log.user, return_inverse=True)
        fold = generator.permutation(len(users))[user] % self.folds
        places = int(log.positions.max()) + 1
        position = np.zeros((self.folds, places))
        extra = np.zeros((self.folds, log.num_items + 1))
        for held_out in range(self.folds):
            train = fold != held_out
            place, item, earned = (array[train].ravel() for array in (log.positions, log.items, reward))
            shown = np.bincount(place, minlength=places)
            position[held_out] = np.bincount(place, earned, places) / np.maximum(shown, 1)
            above = np.bincount(item, earned - position[held_out][place], log.num_items + 1)
            extra[held_out] = above / (np.bincount(item, minlength=log.num_items + 1) + self.smoothing)
        # The slate earns from a slot down what stands there and, on average, what stands below.
        rows = fold[:, None]
        below = position[rows, log.positions][:, ::-1].cumsum(1)[:, ::-1].copy()
        return FittedItemMeans(torch.from_numpy(fold), torch.from_numpy(below), torch.from_numpy(extra))


@dataclass(frozen=True)
class FittedItemMeans:
    fold: Int[Tensor, " requests"]
    below: Float[Tensor, "requests slots"]
    """Mean reward from each slot down."""
    extra: Float[Tensor, "folds items"]
    """What each item earns above the mean of its position."""

    def predict(
        self, requests: Int[Tensor, " batch"], slot: int, items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        return self.extra[:, items][self.fold[requests]] + self.below[requests, slot, None]
