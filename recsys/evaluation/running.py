"""Metrics during training: sums and counts that add up over batches and processes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from recsys.evaluation.metrics import measure, metric_key, metric_names
from recsys.evaluation.rank import RankInterval, Ties


class RankingMetrics(Metric):
    """Full-ranking metrics and cross-entropy per domain, with macro and micro means; keys as in `metric_key`.

    A domain without targets has no keys and takes no part in the macro mean.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, split: str, domain_names: Sequence[str], ks: Sequence[int], ties: Ties = "average") -> None:
        super().__init__()
        self.split = split
        self.domain_names = tuple(domain_names)
        self.names = (*metric_names(ks), "cross_entropy")
        self.ties: Ties = ties
        shape = (len(self.domain_names), len(self.names))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        ranks: RankInterval,
        cross_entropy: Float[Tensor, " batch"],
        domains: Int[Tensor, " batch"],
    ) -> None:
        """`domains`: the domain of each target."""
        settled = ranks.settle(self.ties)
        values = torch.stack([*(measure(settled, name) for name in self.names[:-1]), cross_entropy.double()], dim=1)
        self.sums.index_add_(0, domains.long(), values.nan_to_num(nan=0.0))
        self.counts.index_add_(0, domains.long(), (~values.isnan()).double())

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for column, name in enumerate(self.names):
            sums, counts = self.sums[:, column], self.counts[:, column]
            means = {index: sums[index] / counts[index] for index in range(len(sums)) if counts[index] > 0}
            if not means:
                continue
            for index, mean in means.items():
                values[metric_key(self.split, self.domain_names[index], name, "full")] = mean
            values[metric_key(self.split, "macro", name, "full")] = torch.stack(list(means.values())).mean()
            values[metric_key(self.split, "micro", name, "full")] = sums.sum() / counts.sum()
        return values
