"""Catalogue coverage: which share of the candidates anybody is recommended."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from recsys.evaluation.search import largest


class Coverage:
    """Coverage@k of one pool: the share of its items that occur in at least one list of the k best.

    Where several items tie for the last places of a list, each is in it with the same probability, and the value is
    the expectation over independent draws of these lists. So it depends on scores only, not on ids or batches.

    >>> coverage = Coverage(num_items=4, ks=(1, 2))
    >>> coverage.update(torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 2.0, -torch.inf]]))
    >>> coverage.shares()  # at 2: the first two items, and the third with probability 1/2
    (0.25, 0.625)
    """

    def __init__(self, num_items: int, ks: Sequence[int]) -> None:
        self.ks = tuple(ks)
        self._log_missed = torch.zeros(len(self.ks), num_items + 1, dtype=torch.float64)  # the last is no item

    def update(self, scores: Float[Tensor, "batch candidates"]) -> None:
        """Add lists; a score of -inf marks an item that may not be recommended."""
        self._log_missed = self._log_missed.to(scores.device)
        width = scores.shape[1]
        best, items = largest(scores, min(max(self.ks) + 1, width))
        items = items.where(best.isfinite(), width)
        for missed, k in zip(self._log_missed, self.ks, strict=True):
            places = min(k, width)
            last = best[:, places - 1]
            tied = (best[:, places] == last) & last.isfinite() if places < width else torch.zeros_like(last).bool()
            missed[items[:, :places].where(~tied[:, None], width).flatten()] = -torch.inf
            if tied.any():
                above, level = scores[tied] > last[tied, None], scores[tied] == last[tied, None]
                chance = (places - above.sum(1)).double() / level.sum(1)
                missed[:-1] += torch.log1p(-chance) @ level.double()
                missed[:-1][above.any(0)] = -torch.inf

    def shares(self) -> tuple[float, ...]:
        """Coverage at each k. Rounded, because sums of fp64 logarithms depend on their order in the last digits."""
        return tuple(round(float(-torch.expm1(missed).mean()), 12) for missed in self._log_missed[:, :-1])
