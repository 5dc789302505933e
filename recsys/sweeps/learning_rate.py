"""The same number of learning rates for every arm at every size, and what follows from how they did.

A best value at the end of what was tried is no optimum: the search goes on past it while its budget lasts, and what is
still at an end then says so. Trials have a seed of their own, and only validation judges them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from recsys.loading import Config

_FIRST = (0.0, -1.0, 1.0)
"""The steps that are tried whatever comes of them, so that they can run side by side."""


class Tuning(Config):
    """Learning rates `center * ratio^k`: k = 0, -1 and 1, then further out or in between, `trials` of them in all."""

    center: float = Field(gt=0)
    ratio: float = Field(2.0, gt=1)
    trials: int = Field(5, ge=3)
    seed: int = Field(1000, ge=0)
    """Of the trials; none of the seeds of the runs that count."""

    def rate(self, step: float) -> float:
        return float(f"{self.center * self.ratio**step:.4g}")


Tried = Mapping[float, float | None]
"""Step k -> the loss that its learning rate came to; None for a run that failed."""


def next_steps(tuning: Tuning, tried: Tried) -> list[float]:
    """The steps that can be tried now; empty once the budget is spent, or where nothing works."""
    first = [step for step in _FIRST if step not in tried]
    if first:
        return first
    if len(tried) >= tuning.trials or all(loss is None for loss in tried.values()):
        return []
    steps, best = sorted(tried), _best(tried)
    if best == steps[0]:
        return [best - 1]
    if best == steps[-1]:
        return [best + 1]
    below, above = _neighbours(tried, best)
    other = below if _loss(tried[below]) < _loss(tried[above]) else above
    return [(best + other) / 2]


@dataclass(frozen=True)
class Tuned:
    """The learning rate that a cell is run with."""

    rate: float
    interior: bool
    """Whether a smaller and a larger one did worse."""


def choose_rate(tuning: Tuning, tried: Tried) -> Tuned | None:
    """The lowest point of a parabola through the best trial and its neighbours, over the logarithm of the rate.

    The best trial itself where a neighbour failed. None where all trials failed.
    """
    if all(loss is None for loss in tried.values()):
        return None
    best = _best(tried)
    if best in (min(tried), max(tried)):
        return Tuned(tuning.rate(best), interior=False)
    below, above = _neighbours(tried, best)
    return Tuned(tuning.rate(_vertex((below, best, above), tried)), interior=True)


def _vertex(steps: tuple[float, float, float], tried: Tried) -> float:
    losses = [_loss(tried[step]) for step in steps]
    if not np.isfinite(losses).all() or max(losses) == min(losses):
        return steps[1]
    curvature, slope, _ = np.polyfit(steps, losses, 2)
    return float(np.clip(-slope / (2 * curvature), steps[0], steps[2])) if curvature > 0 else steps[1]


def _best(tried: Tried) -> float:
    return min(sorted(tried), key=lambda step: _loss(tried[step]))


def _neighbours(tried: Tried, step: float) -> tuple[float, float]:
    return max(other for other in tried if other < step), min(other for other in tried if other > step)


def _loss(value: float | None) -> float:
    return float("inf") if value is None else value
