"""How sure a number is: bootstrap intervals over users, paired tests, correction for many of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from recsys.evaluation.evaluate import EvalConfig
from recsys.evaluation.metrics import measure, metric_key, metric_names
from recsys.evaluation.protocols import PROTOCOLS
from recsys.evaluation.rank import RankInterval, Ties
from recsys.evaluation.ranks import RanksInfo

_CELLS = 4_000_000
"""Numbers held at a time while resampling."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile-bootstrap interval; `n` is the number of users behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class UserSums:
    """Metrics of one protocol, added up per user: the user is what is resampled, all of their targets at once.

    Means are taken over targets, so a mean is a ratio of two sums, and both follow from these.
    """

    groups: tuple[str, ...]
    """The domains, then `macro` (mean over domains) and `micro` (mean over targets)."""
    sums: Float[ndarray, "users domains metrics"]
    counts: Float[ndarray, "users domains metrics"]
    """Targets on which the metric is defined."""

    def means(self) -> Float[ndarray, "groups metrics"]:
        return self._means(self.sums.sum(0), self.counts.sum(0))

    def users(self) -> Int[ndarray, "groups metrics"]:
        """Users with a value in each group."""
        present = self.counts > 0
        overall = present.any(1).sum(0)
        return np.concatenate([present.sum(0), [overall, overall]])

    def contributions(self) -> Float[ndarray, "users groups metrics"]:
        """Each user's share in each mean: these add up to `means()`. NaN for a user without a value in the group."""
        present = self.counts > 0
        totals = np.maximum(self.counts.sum(0), 1)
        domains = np.where(present, self.sums / totals, np.nan)
        macro = np.nansum(domains, axis=1) / np.maximum((self.counts.sum(0) > 0).sum(0), 1)
        micro = self.sums.sum(1) / np.maximum(self.counts.sum((0, 1)), 1)
        overall = np.where(present.any(1, keepdims=True), np.stack([macro, micro], axis=1), np.nan)
        return np.concatenate([domains, overall], axis=1)

    def bootstrap(self, samples: int, seed: int) -> Float[ndarray, "samples groups metrics"]:
        """The means of `samples` sets of users drawn with replacement; NaN where a draw leaves a domain empty."""
        users, domains, metrics = self.sums.shape
        flat = np.concatenate([self.sums, self.counts], axis=1).reshape(users, -1)
        drawn = np.concatenate([weights @ flat for weights in _resamples(users, samples, seed)])
        sums, counts = np.split(drawn.reshape(samples, 2 * domains, metrics), 2, axis=1)
        return self._means(sums, counts)

    def _means(
        self, sums: Float[ndarray, "*samples domains metrics"], counts: Float[ndarray, "*samples domains metrics"]
    ) -> Float[ndarray, "*samples groups metrics"]:
        """The means of resampled sums; a domain in which a metric is defined for nobody takes no part in macro."""
        defined = self.counts.sum(0) > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            domains = sums / counts
            macro = np.where(defined, domains, 0).sum(-2, keepdims=True) / defined.sum(0)
            micro = sums.sum(-2, keepdims=True) / counts.sum(-2, keepdims=True)
        return np.concatenate([domains, macro, micro], axis=-2)


def user_sums(ranks: pa.Table, protocol: str, metrics: Sequence[str], ties: Ties) -> UserSums:
    """`metrics` of one protocol's rows (names of `measure`, or `cross_entropy`), under the protocol's own tie rule."""
    rows = ranks.filter(pc.equal(ranks["protocol"], protocol))
    ranked = RankInterval(
        *(torch.from_numpy(rows[name].to_numpy().astype(np.int64)) for name in ("greater", "ties", "candidates"))
    ).settle(PROTOCOLS[protocol].ties or ties)
    loss = rows["cross_entropy"].to_numpy().astype(np.float64)
    values = np.stack([loss if name == "cross_entropy" else measure(ranked, name).numpy() for name in metrics], axis=1)
    users, user = np.unique(rows["user"].to_numpy(), return_inverse=True)
    names, domain = np.unique(rows["domain"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    cell = user * len(names) + domain
    shape = (len(users), len(names), len(metrics))
    sums, counts = np.zeros((2, shape[0] * shape[1], shape[2]))
    np.add.at(sums, cell, np.nan_to_num(values))
    np.add.at(counts, cell, ~np.isnan(values))
    return UserSums((*names.tolist(), "macro", "micro"), sums.reshape(shape), counts.reshape(shape))


def summarize(ranks: pa.Table, config: EvalConfig) -> dict[str, Interval]:
    """Every metric at every k, per domain, macro and micro, under every protocol of the table; keys as `metric_key`."""
    split = RanksInfo.of(ranks).split
    found: dict[str, Interval] = {}
    for protocol in pc.unique(ranks["protocol"]).to_pylist():
        metrics = (*metric_names(config.ks), "cross_entropy")
        table = user_sums(ranks, protocol, metrics, config.ties)
        means, users = table.means(), table.users()
        draws = table.bootstrap(config.bootstrap_samples, config.seed)
        for row, group in enumerate(table.groups):
            for column, metric in enumerate(metrics):
                if users[row, column] > 0:
                    found[metric_key(split, group, metric, protocol)] = percentile_interval(
                        means[row, column], draws[:, row, column], int(users[row, column])
                    )
    return found


def percentile_interval(value: float, draws: Float[ndarray, " samples"], n: int) -> Interval:
    """The middle 95 % of the draws, those left out in which the value is undefined."""
    defined = draws[~np.isnan(draws)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (value, value)
    return Interval(float(value), float(low), float(high), n)


def permutation_test(differences: Float[ndarray, " users"], permutations: int, seed: int) -> float:
    """Two-sided p-value of paired differences: the share of sign patterns whose sum is at least as far from 0.

    All patterns are gone through where they are no more than `permutations`; else that many are drawn, and the
    observed one counts among them, so that p is never 0.
    """
    users = len(differences)
    bound = abs(differences.sum()) * (1 - 1e-12)  # equal sums that differ in rounding count as equal
    if 2**users <= permutations:
        patterns = np.arange(2**users)[:, None] >> np.arange(users) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ differences) >= bound))
    generator = np.random.default_rng(seed)
    extreme = 0
    for count in _chunks(permutations, users):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(count, users), dtype=np.int8)
        extreme += int((np.abs(signs @ differences) >= bound).sum())
    return (1 + extreme) / (1 + permutations)


def wilcoxon_test(differences: Float[ndarray, " users"]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, users without a difference left out; 1 if none has one."""
    from scipy.stats import wilcoxon  # takes most of a second to import

    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, which bound the chance of any false finding in the whole family.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def _resamples(users: int, samples: int, seed: int) -> Iterator[Float[ndarray, "chunk users"]]:
    """How often each user occurs in each of `samples` draws with replacement, some draws at a time."""
    generator = np.random.default_rng(seed)
    for count in _chunks(samples, users):
        drawn = generator.integers(users, size=(count, users)) + users * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users).astype(np.float64)


def _chunks(rows: int, width: int) -> Iterator[int]:
    """`rows` in parts that hold about `_CELLS` numbers each."""
    step = max(1, _CELLS // max(width, 1))
    for start in range(0, rows, step):
        yield min(step, rows - start)
