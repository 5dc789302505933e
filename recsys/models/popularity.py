"""Popularity: every user gets the items that were seen most often in training."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys.loading import Config
from recsys.types import Batch, Catalog, TrainingEvents


class PopularityConfig(Config):
    name: Literal["popularity"] = "popularity"

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "Popularity":
        """`max_len` and `generator` are not used: nothing is cut and nothing is drawn."""
        return Popularity(catalog.num_items)


class Popularity(nn.Module):
    """score(item) = its number of training events, whatever the history."""

    counts: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_items + 1))

    def fit(self, events: TrainingEvents) -> None:
        """Counts the users' training streams."""
        self.counts.copy_(torch.bincount(events.items, minlength=len(self.counts)))

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        return self.counts[items].expand(len(batch.items), -1)
