"""Item-kNN: items that share users with the items of the history (Sarwar et al., 2001)."""

from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.sparse import SparseRows
from recsys.types import Batch, Catalog, TrainingEvents

_BACKOFF = 1e-4
"""Score of the most popular item, were popularity all there is: far below a similarity that matters."""

_BLOCK = 2048
"""Items whose similarities are held at a time."""


class ItemKNNConfig(Config):
    name: Literal["item_knn"] = "item_knn"
    neighbors: Annotated[int, Field(ge=1)] = 100
    """Most similar items kept per item."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of an event relative to the one after it; 1: all events of the history weigh the same."""

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "ItemKNN":
        """`max_len` and `generator` are not used: nothing is cut and nothing is drawn."""
        return ItemKNN(catalog.num_items, self.neighbors, self.decay)


class ItemKNN(nn.Module):
    """score(j) = sum over the history of decay^age * sim(i, j) + a little popularity; the last event has age 0.

    sim(i, j) = |U_i and U_j| / sqrt(|U_i| |U_j|) over the sets of training users, for the nearest neighbours j of i
    (other than i; of equals the smaller id), over all domains. Popularity is the training events of j over
    those of the most popular item; it orders what has no neighbour in the history.
    """

    popularity: Tensor

    def __init__(self, num_items: int, neighbors: int, decay: float) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.decay = decay
        self.register_buffer("popularity", torch.zeros(num_items + 1))
        self.similar = SparseRows()

    def fit(self, events: TrainingEvents) -> None:
        """Counts the users' training streams."""
        items, offsets = events.items, events.offsets
        counts = torch.bincount(items, minlength=len(self.popularity))
        self.popularity.copy_(counts / counts.max().clamp(min=1))

        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets.cpu().numpy()))
        seen = csr_array(
            (np.ones(len(user)), (user, items.cpu().numpy())), shape=(len(offsets) - 1, len(self.popularity))
        )
        seen.sum_duplicates()
        seen.data[:] = 1
        users_of = np.bincount(seen.indices, minlength=seen.shape[1])
        seen.data /= np.sqrt(users_of[seen.indices])
        by_item = seen.T.tocsr()
        blocks = [
            _nearest(by_item[start : start + _BLOCK] @ seen, start, self.neighbors)
            for start in range(0, by_item.shape[0], _BLOCK)
        ]
        self.similar.fill(vstack(blocks, format="csr"))

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        row, step = batch.mask.nonzero(as_tuple=True)
        weights = self.popularity.new_tensor(self.decay) ** (batch.items.shape[1] - 1 - step)
        scores = (_BACKOFF * self.popularity).repeat(len(batch.items), 1)
        self.similar.add_rows(scores, row, batch.items[row, step].long(), weights)
        return scores[:, items]


def _nearest(similar: csr_array, start: int, neighbors: int) -> csr_array:
    """The largest entries of each row, without the item itself; row 0 is item `start`."""
    row = np.repeat(np.arange(similar.shape[0]), np.diff(similar.indptr))
    other = similar.indices != row + start
    row, column, value = row[other], similar.indices[other], similar.data[other]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    length = np.bincount(row, minlength=similar.shape[0])
    rank = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    kept = rank < neighbors
    return csr_array((value[kept], (row[kept], column[kept])), shape=similar.shape)
