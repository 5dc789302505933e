"""Metrics of one target's rank, as expectations over the order of tied candidates.

A target with `g` candidates above it and `t` tied with it has each of the ranks `g+1 ... g+1+t` with probability
`1/(t+1)`. A metric `f(rank)` therefore has the value `(F(g+1+t) - F(g)) / (t+1)` with `F(n) = f(1) + ... + f(n)`,
which needs no sorting and no drawing. Other tie rules come before: see `RankInterval.settle`.

In the examples `interval` makes a RankInterval of lists, with 100 candidates unless it says otherwise.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from recsys.errors import UserError
from recsys.evaluation.rank import RankInterval


class UnknownMetric(UserError):
    """A metric name that does not exist."""


def hit_rate(ranks: RankInterval, k: int) -> Float[Tensor, " batch"]:
    """HR@k: 1 if rank <= k, else 0 (with one target, also Recall@k).

    >>> hit_rate(interval(greater=[0, 9, 10, 9], ties=[0, 0, 0, 3]), k=10)  # the last one: rank 10, 11, 12 or 13
    tensor([1.0000, 1.0000, 0.0000, 0.2500], dtype=torch.float64)
    """
    return _expectation(ranks, torch.ones(k, dtype=torch.float64))


def ndcg(ranks: RankInterval, k: int) -> Float[Tensor, " batch"]:
    """NDCG@k: 1 / log2(1 + rank) if rank <= k, else 0 (with one target the ideal DCG is 1).

    >>> ndcg(interval(greater=[0, 2, 10, 0], ties=[0, 0, 0, 1]), k=10)  # the last one: mean of 1 and 1 / log2(3)
    tensor([1.0000, 0.5000, 0.0000, 0.8155], dtype=torch.float64)
    """
    return _expectation(ranks, 1 / torch.arange(2, k + 2, dtype=torch.float64).log2())


def reciprocal_rank(ranks: RankInterval) -> Float[Tensor, " batch"]:
    """MRR, not cut off: 1 / rank; over ties a difference of harmonic numbers, H(n) = digamma(n + 1) + const.

    >>> reciprocal_rank(interval(greater=[0, 3, 0], ties=[0, 0, 2]))  # the last one: (1 + 1/2 + 1/3) / 3
    tensor([1.0000, 0.2500, 0.6111], dtype=torch.float64)
    """
    first = ranks.greater.double() + 1
    size = ranks.ties.double() + 1
    tied = (torch.digamma(first + size) - torch.digamma(first)) / size
    return torch.where(ranks.ties == 0, 1 / first, tied)  # exact where nothing ties


def auc(ranks: RankInterval) -> Float[Tensor, " batch"]:
    """AUC: share of the negatives that score below the target, a tie counting one half.

    NaN for a target without negatives: it is undefined there, and averages leave it out.

    >>> auc(interval(greater=[0, 9, 3, 0], ties=[0, 0, 4, 0], candidates=[10, 10, 11, 1]))
    tensor([1.0000, 0.0000, 0.5000,    nan], dtype=torch.float64)
    """
    negatives = ranks.candidates.double() - 1
    return (negatives - ranks.greater - ranks.ties / 2) / negatives


AT_K: dict[str, Callable[[RankInterval, int], Tensor]] = {"hr": hit_rate, "ndcg": ndcg}
"""Metrics that look at the first k places."""

OVERALL: dict[str, Callable[[RankInterval], Tensor]] = {"mrr": reciprocal_rank, "auc": auc}
"""Metrics of the whole ranking."""


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Names of all metrics of a rank, in table order.

    >>> metric_names([5, 10])
    ('hr@5', 'hr@10', 'ndcg@5', 'ndcg@10', 'mrr', 'auc')
    """
    return (*(f"{name}@{k}" for name in AT_K for k in ks), *OVERALL)


def measure(ranks: RankInterval, metric: str) -> Float[Tensor, " batch"]:
    """The named metric of every target; raises UnknownMetric, saying what exists.

    >>> measure(interval(greater=[1], ties=[0]), "hr@2")
    tensor([1.], dtype=torch.float64)
    """
    name, _, k = metric.partition("@")
    if name in AT_K and k.isdecimal() and int(k) > 0:
        return AT_K[name](ranks, int(k))
    if metric in OVERALL:
        return OVERALL[metric](ranks)
    known = ", ".join([*(f"{known}@<k>" for known in AT_K), *OVERALL])
    raise UnknownMetric(f"there is no metric {metric!r}; there are {known}")


def metric_key(split: str, group: str, metric: str, protocol: str) -> str:
    """`group` is a domain's name, `macro` (mean over domains) or `micro` (mean over targets).

    >>> metric_key("test", "food", "ndcg@10", "abxi_999"), metric_key("validation", "macro", "mrr", "full")
    ('test/food/ndcg@10[abxi_999]', 'validation/macro/mrr')
    """
    return f"{split}/{group}/{metric}" + ("" if protocol == "full" else f"[{protocol}]")


def _expectation(ranks: RankInterval, gains: Float[Tensor, " k"]) -> Float[Tensor, " batch"]:
    """Mean of `gains[rank - 1]` (0 beyond the end) over the ranks of each interval."""
    total = torch.cat([gains.new_zeros(1), gains.cumsum(0)]).to(ranks.greater.device)
    beyond, before = ranks.greater + ranks.ties + 1, ranks.greater
    return (total[beyond.clamp(max=len(gains))] - total[before.clamp(max=len(gains))]) / (ranks.ties + 1)
