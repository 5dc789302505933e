"""Fits that a few bad runs do not move: Huber's loss and least absolute deviations of the log residuals.

Published laws differ by more than their intervals because optimizers with default tolerances stop early, and because
the losses differ: Huber's threshold is a parameter of the result (Besiroglu et al., 2024). So every fit says how many
starts agreed and how long the gradient is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from recsys.scaling.laws import Form, Law, check_points, make_law
from recsys.scaling.projection import Search, project

_RESTARTS = 5
"""L-BFGS may stop at a kink because of what it remembers; it begins anew from there, at most so often."""


def fit_huber(form: Form, x: Float[ndarray, "points axes"], y: Float[ndarray, " points"], delta: float = 1e-3) -> Law:
    """Smallest sum of Huber's loss of log y - log law: r^2 / 2 up to `delta`, linear beyond (Hoffmann et al., 2022)."""
    problem = _Problem.of(form, x, y)
    return problem.best([problem.descend(start, delta) for start in problem.starts()], lambda r: _huber(r, delta).sum())


def fit_lad(form: Form, x: Float[ndarray, "points axes"], y: Float[ndarray, " points"]) -> Law:
    """Smallest sum of |log y - log law|, reached through Huber's loss with an ever smaller threshold."""
    problem = _Problem.of(form, x, y)
    ends = []
    for start in problem.starts():
        end = _End(start, float("inf"))
        for delta in 10.0 ** -np.arange(3, 10):
            end = problem.descend(end.theta, float(delta))
        ends.append(end)
    return problem.best(ends, lambda r: np.abs(r).sum())


def _huber(residual: ndarray, delta: float) -> ndarray:
    clipped = np.clip(residual, -delta, delta)
    return clipped * (residual - clipped / 2)


@dataclass(frozen=True)
class _End:
    """Where a descent ended: the logarithms of the terms at the reference point and of the shape."""

    theta: Float[ndarray, " parameters"]
    gradient: float


@dataclass(frozen=True)
class _Problem:
    form: Form
    x: Float[ndarray, "points axes"]
    y: Float[ndarray, " points"]
    reference: Float[ndarray, " axes"]

    @classmethod
    def of(cls, form: Form, x: Float[ndarray, "points axes"], y: Float[ndarray, " points"]) -> "_Problem":
        check_points(form, x, y)
        if not (y > 0).all():
            raise ValueError("log residuals need responses above 0; use least squares for these")
        return cls(form, x, y, np.exp(np.log(x).mean(0)))

    def starts(self) -> list[Float[ndarray, " parameters"]]:
        """Three values of each shape parameter, with the least-squares terms that go with them."""
        places = ([one.low ** (1 - at) * one.high**at for at in (0.3, 0.5, 0.7)] for one in self.form.ranges)
        found = []
        for shape in map(np.array, product(*places)):
            terms = project(self.form.columns(self.x, shape, self.reference), self.y).coefficients
            found.append(np.log(np.concatenate([np.maximum(terms, 1e-3 * self.y.mean()), shape])))
        return found

    def residual(
        self, theta: Float[ndarray, " parameters"]
    ) -> tuple[Float[ndarray, " points"], Float[ndarray, "points parameters"]]:
        """log y - log law and its derivatives."""
        terms = len(self.form.coefficients)
        shape = np.exp(theta[terms:])
        # A derivative by a step along the imaginary axis has no cancellation: it is exact to rounding.
        steps = shape * np.concatenate([np.ones((1, len(shape))), 1 + 1e-30j * np.eye(len(shape))])
        columns = self.form.log_columns(self.x, steps) - self.form.log_columns(self.reference[None], steps)
        logs = theta[:terms] + columns[0].real
        top = logs.max(-1, keepdims=True)
        shares = np.exp(logs - top)
        total = shares.sum(-1, keepdims=True)
        shares = shares / total
        by_shape = np.einsum("pt,kpt->pk", shares, columns[1:].imag / 1e-30)
        return np.log(self.y) - (top + np.log(total))[:, 0], -np.concatenate([shares, by_shape], axis=1)

    def descend(self, start: Float[ndarray, " parameters"], delta: float) -> _End:
        """L-BFGS on Huber's loss over `delta`, which tends to the sum of |r| with it."""
        from scipy.optimize import Bounds, minimize  # takes most of a second to import

        scale = 10 / delta  # an objective of the order of 10: the tolerances are reached before rounding is

        def objective(theta: ndarray) -> tuple[float, ndarray]:
            residual, slopes = self.residual(theta)
            return scale * float(_huber(residual, delta).sum()), scale * (np.clip(residual, -delta, delta) @ slopes)

        terms = len(self.form.coefficients)  # at -30 a term is as good as 0
        low = [-30.0] * terms + [float(np.log(one.low)) for one in self.form.ranges]
        high = [np.inf] * terms + [float(np.log(one.high)) for one in self.form.ranges]
        options: Any = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-12, "maxcor": 30}
        theta = start
        for _ in range(_RESTARTS):
            found = minimize(objective, theta, jac=True, method="L-BFGS-B", bounds=Bounds(low, high), options=options)
            if np.abs(found.x - theta).max() < 1e-12:
                break
            theta = found.x
        return _End(theta, float(np.linalg.norm(found.jac)) / scale)

    def best(self, ends: list[_End], objective: Callable[[ndarray], float]) -> Law:
        values = [float(objective(self.residual(end.theta)[0])) for end in ends]
        lowest = min(values)
        end = ends[values.index(lowest)]
        terms = len(self.form.coefficients)
        log_shape = end.theta[terms:]
        return make_law(
            self.form,
            self.x,
            self.y,
            shape=np.exp(log_shape),
            reference=self.reference,
            at_reference=np.where(end.theta[:terms] > -29, np.exp(end.theta[:terms]), 0),
            objective=lowest,
            search=Search(
                starts=len(ends),
                agreeing=sum(value <= lowest + max(1e-6 * lowest, 1e-14 * len(self.y)) for value in values),
                gradient=end.gradient,
                at_bounds=tuple(
                    one.name
                    for one, value in zip(self.form.ranges, log_shape, strict=True)
                    if min(value - np.log(one.low), np.log(one.high) - value) < 1e-6
                ),
            ),
        )
