"""Compute-optimal sizes: parabolas over runs of equal compute, and the optimum of a law in two axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from recsys.scaling.laws import TWO_AXES, Law


@dataclass(frozen=True)
class PowerLine:
    """y = coefficient * x^exponent, a straight line in logarithms."""

    coefficient: float
    exponent: float

    def predict(self, x: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
        return self.coefficient * x**self.exponent


def fit_power_line(
    x: Float[ndarray, " points"], y: Float[ndarray, " points"], weights: Float[ndarray, " points"] | None = None
) -> PowerLine:
    """Least squares of log y on log x; `weights` multiply the squares (one over the variance of log y)."""
    root = np.ones_like(y) if weights is None else np.sqrt(weights)
    middle = np.log(x).mean()  # the line is fitted around it, which keeps intercept and slope apart
    columns = root[:, None] * np.stack([np.ones_like(x), np.log(x) - middle], axis=1)
    (level, slope), *_ = np.linalg.lstsq(columns, root * np.log(y))
    return PowerLine(coefficient=float(np.exp(level - slope * middle)), exponent=float(slope))


@dataclass(frozen=True)
class Parabola:
    """Loss over log10 of the size, among runs of one budget; `curvature` is its second coefficient."""

    budget: float
    size: float
    """Where the loss is lowest."""
    loss: float
    curvature: float
    inside: bool
    """Whether the lowest point lies among the sizes that were run. If not, it is a guess."""

    def predict(self, sizes: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
        return self.loss + self.curvature * (np.log10(sizes) - np.log10(self.size)) ** 2


def isoflop_parabolas(
    budgets: Float[ndarray, " runs"], sizes: Float[ndarray, " runs"], losses: Float[ndarray, " runs"]
) -> list[Parabola]:
    """One parabola per budget (Hoffmann et al., 2022, approach 2). For pictures: unless both axes have the same
    exponent its optima are biased, by more the wider the sizes are spread; take numbers from a law in two axes.

    Raises ValueError for a budget with fewer than three sizes or without a lowest point.
    """
    found = []
    for budget in np.unique(budgets):
        at = budgets == budget
        log_sizes = np.log10(sizes[at])
        if len(np.unique(log_sizes)) < 3:
            raise ValueError(f"the budget {budget:.3g} has fewer than three sizes; a parabola needs three")
        middle = log_sizes.mean()
        curvature, slope, level = np.polyfit(log_sizes - middle, losses[at], 2)
        if curvature <= 0:
            raise ValueError(
                f"the losses at the budget {budget:.3g} have no lowest point; run smaller and larger sizes"
            )
        lowest = -slope / (2 * curvature)
        found.append(
            Parabola(
                budget=float(budget),
                size=float(10 ** (middle + lowest)),
                loss=float(level + slope * lowest / 2),
                curvature=float(curvature),
                inside=bool(log_sizes.min() <= middle + lowest <= log_sizes.max()),
            )
        )
    return found


def optimal_sizes(parabolas: Sequence[Parabola]) -> PowerLine:
    """Best size as a power of the budget, from the parabolas whose lowest point was run around.

    Raises ValueError where there are fewer than two of them.
    """
    usable = [parabola for parabola in parabolas if parabola.inside]
    if len(usable) < 2:
        raise ValueError(
            f"{len(usable)} of {len(parabolas)} budgets have their lowest loss inside the sizes run; two are needed"
        )
    return fit_power_line(np.array([p.budget for p in usable]), np.array([p.size for p in usable]))


@dataclass(frozen=True)
class Optimum:
    """Which parameters and data a law in two axes asks for together (Hoffmann et al., 2022, equation 4)."""

    balance: float
    """G: N = G C'^(b / (a + b)) and D = C'^(a / (a + b)) / G for a budget of C' = N D."""
    a: float
    b: float

    def for_compute(self, flops: float, flops_per_parameter: float = 6.0) -> tuple[float, float]:
        """Parameters and examples for a budget of training FLOPs that an example costs 6 N of."""
        product = flops / flops_per_parameter
        n = self.balance * product ** (self.b / (self.a + self.b))
        return n, product / n

    def parameters(self, examples: float) -> float:
        """The parameters for which so many examples are the optimum."""
        return self.balance * (self.balance * examples) ** (self.b / self.a)


def optimum(law: Law) -> Optimum:
    """Of a fitted `TWO_AXES`."""
    assert law.form is TWO_AXES
    at = law.parameters
    a, b = at["a"], at["b"]
    return Optimum(balance=((a * at["A"]) / (b * at["B"])) ** (1 / (a + b)), a=a, b=b)
