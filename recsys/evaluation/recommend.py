"""The k best items for histories that need not be in any data set."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys.evaluation.protocols import among
from recsys.evaluation.rank import require_finite
from recsys.types import PAD_ID, Batch, Catalog, Scorer


def recommend(
    scorer: Scorer,
    batch: Batch,
    catalog: Catalog,
    domain: int,
    k: int,
    seen: Int[Tensor, "batch seen"] | None,
) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """Items of `domain` that follow each history, best first, with their scores; equal scores by ascending id.

    The whole history is read, its last event included; `batch.targets` is not. `seen` items are left out (usually
    `batch.items`, or more where that was truncated); None leaves out nothing. A row with fewer than k items left
    ends in `PAD_ID` with a score of -inf. Raises NonFiniteScores, and ValueError for a k the domain cannot fill.
    """
    items = catalog.items_of(domain)
    if not 1 <= k <= len(items):
        raise ValueError(f"k must lie between 1 and {len(items)}, the items of {catalog.domain_names[domain]}, not {k}")
    asked = batch.target_domains.clone()
    asked[:, -1] = domain
    with torch.no_grad():
        scores = scorer.scores(replace(batch, targets=torch.zeros_like(batch.targets), target_domains=asked), items)
    require_finite(scores, batch.user)
    if seen is not None:
        scores = scores.masked_fill(among(items, seen, catalog), -torch.inf)
    best, order = scores.sort(dim=1, descending=True, stable=True)
    best, chosen = best[:, :k], items[order[:, :k]]
    return chosen.masked_fill(best == -torch.inf, PAD_ID), best
