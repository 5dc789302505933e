"""Intervals for a policy's value. Each says nothing of bias: only consistent estimators may be given one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field

from recsys.loading import Config

Column = Float64[np.ndarray, " requests"]

_CELLS = 4_000_000
"""Numbers held at a time while resampling."""


@dataclass(frozen=True)
class Interval:
    """Where the value lies, and how sure that is."""

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True)
class Sums:
    """What an estimate is made of, added up per user: users are independent of one another, their requests are not."""

    requests: Int64[np.ndarray, " users"]
    influence: Float64[np.ndarray, " users"]
    """Sum over the user's requests of influence - value."""
    added: Float64[np.ndarray, " users"]
    numerator: Float64[np.ndarray, "users ratios"]
    denominator: Float64[np.ndarray, "users ratios"]

    @classmethod
    def of(
        cls,
        user: Int64[np.ndarray, " requests"],
        influence: Column,
        added: Column,
        numerator: Float64[np.ndarray, "requests ratios"],
        denominator: Float64[np.ndarray, "requests ratios"],
    ) -> "Sums":
        users, index = np.unique(user, return_inverse=True)
        columns = np.column_stack([influence - influence.mean(), added, numerator, denominator])
        sums = np.zeros((len(users), columns.shape[1]))
        np.add.at(sums, index, columns)
        ratios = numerator.shape[1]
        counts = np.bincount(index).astype(np.int64)
        return cls(counts, sums[:, 0], sums[:, 1], sums[:, 2 : 2 + ratios], sums[:, 2 + ratios :])

    @property
    def value(self) -> float:
        ratios = self.numerator.sum(0) / self.denominator.sum(0)
        return float(self.added.sum() / self.requests.sum() + ratios.sum())


class Delta(Config):
    """Normal interval from the influence function, which for a ratio is the delta method; robust to users' repeats."""

    name: Literal["delta"] = "delta"
    level: float = Field(0.95, gt=0, lt=1)

    def interval(self, sums: Sums) -> Interval | str:
        from scipy.stats import norm  # takes most of a second to import

        users = len(sums.requests)
        if users < 2:
            return "an interval needs two users at least"
        error = math.sqrt(users / (users - 1) * float((sums.influence**2).sum())) / int(sums.requests.sum())
        half = float(norm.ppf((1 + self.level) / 2)) * error
        return Interval(sums.value - half, sums.value + half, self.level, self.name)


class Bootstrap(Config):
    """Percentile bootstrap over users, all requests of a user at once; ratios are taken anew in every draw."""

    name: Literal["bootstrap"] = "bootstrap"
    level: float = Field(0.95, gt=0, lt=1)
    samples: int = Field(1000, ge=100)
    seed: int = 0

    def interval(self, sums: Sums) -> Interval | str:
        users = len(sums.requests)
        if users < 2:
            return "an interval needs two users at least"
        flat = np.column_stack([sums.requests, sums.added, sums.numerator, sums.denominator])
        drawn = np.concatenate([weights @ flat for weights in self._resamples(users)])
        ratios = sums.numerator.shape[1]
        below = drawn[:, 2 + ratios :]
        if (below == 0).any():
            return "some resamples hold nothing that the target policy would show"
        values = drawn[:, 1] / drawn[:, 0] + (drawn[:, 2 : 2 + ratios] / below).sum(1)
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(float(low), float(high), self.level, self.name)

    def _resamples(self, users: int) -> Iterator[Float64[np.ndarray, "draws users"]]:
        """How often each user occurs in draws with replacement, some draws at a time."""
        generator = np.random.default_rng(self.seed)
        step = max(1, _CELLS // users)
        for start in range(0, self.samples, step):
            count = min(step, self.samples - start)
            drawn = generator.integers(users, size=(count, users)) + users * np.arange(count)[:, None]
            yield np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users).astype(np.float64)


class EmpiricalBernstein(Config):
    """Holds for every n, given the range of a request's term (Maurer and Pontil 2009, theorem 4, both sides)."""

    name: Literal["empirical_bernstein"] = "empirical_bernstein"
    level: float = Field(0.95, gt=0, lt=1)
    range: float = Field(gt=0)
    """Largest possible w·r minus the smallest, known before the log is seen: K/ε for rewards in [0, 1] and a log
    that explores K items uniformly with probability ε."""

    def interval(self, sums: Sums) -> Interval | str:
        n = len(sums.requests)
        if sums.numerator.shape[1]:
            return "the empirical Bernstein bound is for means, and this estimator is a ratio; take delta or bootstrap"
        if n < 2 or (sums.requests > 1).any():
            return "the empirical Bernstein bound needs requests of different users; take bootstrap"
        if np.ptp(sums.added) > self.range:
            return f"terms differ by {np.ptp(sums.added):.3g}, more than the range {self.range:g} that was given"
        log = math.log(4 / (1 - self.level))
        half = math.sqrt(2 * float(sums.added.var(ddof=1)) * log / n) + 7 * self.range * log / (3 * (n - 1))
        return Interval(sums.value - half, sums.value + half, self.level, self.name)


IntervalConfig = Annotated[Delta | Bootstrap | EmpiricalBernstein, Field(discriminator="name")]


def smoothing_bound(values: Column, overlap: Column, spread: Column, delta: float) -> Interval:
    """PAC-Bayes bound of exponential smoothing for a policy fixed before the log was seen (so its KL terms are 0).

    |V - V̂_α| ≤ √(KL1 / 2n) + B + KL2 / (nλ) + λ S / 2 with KL1 = ln(4√n/δ), B = 1 - mean overlap, S = mean spread
    (Aouali et al. 2023, theorem 1), the smallest over a grid of λ that δ is shared by. Independent requests, rewards in
    [0, 1].
    """
    n = len(values)
    grid = np.geomspace(1e-4, 10, 30)
    kl1 = math.log(4 * math.sqrt(n) / delta)
    kl2 = math.log(4 * len(grid) / delta)
    half = math.sqrt(kl1 / (2 * n)) + 1 - overlap.mean() + (kl2 / (n * grid) + grid / 2 * spread.mean()).min()
    value = float(values.mean())
    return Interval(value - float(half), value + float(half), 1 - delta, "pac_bayes")
