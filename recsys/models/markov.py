"""First-order Markov chains: what followed the last item in training."""

from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_array
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.sparse import SparseRows
from recsys.types import Batch, Catalog, TrainingEvents


class MarkovConfig(Config):
    name: Literal["markov"] = "markov"
    smoothing: Annotated[float, Field(gt=0)] = 1.0
    """Events of popularity that are added to the successors seen of every item."""

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "Markov":
        """`max_len` and `generator` are not used: nothing is cut and nothing is drawn."""
        return Markov(catalog.item_domain, self.smoothing)


class Markov(nn.Module):
    """score(j) = P(j | last item of any domain) + P(j | last item of the domain asked for).

    P(j | i) = (n(i, j) + s p(j)) / (n(i) + s), with the popularity p(j) = share of j among the training events and
    the smoothing s. In the first chain n(i, j) counts the pairs of neighbours in the users' merged training
    streams; in the second, neighbours after all but one domain's events are left out. Where there is no last item,
    n is 0 and P is p.
    """

    item_domain: Tensor
    popularity: Tensor

    def __init__(self, item_domain: Int[Tensor, " items"], smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("item_domain", item_domain.clone(), persistent=False)  # the catalogue's
        self.register_buffer("popularity", torch.zeros(len(item_domain)))
        self.merged = Chain(len(item_domain))
        self.within = Chain(len(item_domain))

    def fit(self, events: TrainingEvents) -> None:
        """Counts the users' training streams."""
        items, offsets = events.items, events.offsets
        stream = items.cpu().numpy().astype(np.int64)
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets.cpu().numpy()))
        domain = self.item_domain.cpu().numpy()[stream]
        by_domain = np.lexsort((domain, user))  # stable: the order in time stays
        self.popularity.copy_(torch.bincount(items, minlength=len(self.popularity)) / max(len(items), 1))
        self.merged.fit(stream, user, self.smoothing)
        num_domains = int(domain.max(initial=0)) + 1
        self.within.fit(stream[by_domain], (user * num_domains + domain)[by_domain], self.smoothing)

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        """Reads the last event, the last event of the domain asked for, and which domain that is."""
        asked = batch.mask & (batch.domains == batch.target_domains[:, -1:])
        steps = torch.arange(asked.shape[1], device=asked.device)
        newest = torch.where(asked, steps, -1).amax(dim=1, keepdim=True)
        own = batch.items.gather(1, newest.clamp(min=0))[:, 0].where(newest[:, 0] >= 0, 0)

        popularity = self.popularity
        scores = popularity.new_zeros(len(own), len(popularity))
        backoff = self.merged.add(scores, batch.items[:, -1]) + self.within.add(scores, own)
        return scores[:, items] + backoff[:, None] * popularity[items]


class Chain(nn.Module):
    """The transitions of one Markov chain: n(i, j) / (n(i) + s) as a sparse matrix, s / (n(i) + s) beside it."""

    backoff: Tensor

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.register_buffer("backoff", torch.ones(num_rows))
        self.transitions = SparseRows()

    def fit(self, stream: NDArray[np.int64], sequence: NDArray[np.int64], smoothing: float) -> None:
        """`sequence` tells which sequence an event belongs to; neighbours in the same one are a transition."""
        num_rows = len(self.backoff)
        follows = sequence[1:] == sequence[:-1]
        pairs = stream[:-1][follows], stream[1:][follows]
        counts = csr_array((np.ones(len(pairs[0])), pairs), shape=(num_rows, num_rows))
        counts.sum_duplicates()
        total = np.bincount(pairs[0], minlength=num_rows)
        counts.data /= np.repeat(total + smoothing, np.diff(counts.indptr))
        self.transitions.fill(counts)
        self.backoff.copy_(torch.as_tensor(smoothing / (total + smoothing)))

    def add(self, scores: Float[Tensor, "batch items"], last: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Adds each row's transitions from its last item in place; returns the weight left to popularity."""
        lines = torch.arange(len(last), device=last.device)
        self.transitions.add_rows(scores, lines, last.long(), torch.ones_like(lines, dtype=scores.dtype))
        return self.backoff[last.long()]
