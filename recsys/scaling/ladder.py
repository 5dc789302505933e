"""Four laws of two architectures, from one law for both to two that share nothing, and the tests between them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from recsys.scaling.laws import POWER_LAW, fit_law, profile_limit
from recsys.scaling.projection import Columns, Range, minimize, region

Rung = Literal["shared", "ratio", "ratio_and_exponent", "separate"]
RUNGS: tuple[Rung, ...] = ("shared", "ratio", "ratio_and_exponent", "separate")

_EXPONENT = POWER_LAW.ranges[0]
_BOTH = (Range("a", _EXPONENT.low, _EXPONENT.high, 30), Range("b/a", 0.1, 10.0, 30))


@dataclass(frozen=True)
class Estimate:
    """A value with its profile-F interval: what an F test of that level would not reject."""

    value: float
    low: float
    high: float
    level: float
    freedom: int
    """Degrees of freedom of the residuals."""


@dataclass(frozen=True)
class Curve:
    """E + A N^-a of one arm."""

    floor: float
    reducible: float
    """A N^-a at the reference size."""
    exponent: float
    reference: float

    def predict(self, sizes: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
        return self.floor + self.reducible * (sizes / self.reference) ** -self.exponent

    def inverse(self, values: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
        """The size at which the curve takes each value; infinite at or below its floor."""
        with np.errstate(divide="ignore"):
            return self.reference * (np.maximum(values - self.floor, 0) / self.reducible) ** (-1 / self.exponent)


@dataclass(frozen=True)
class Fitted:
    """One rung, fitted to both arms at once."""

    baseline: Curve
    challenger: Curve
    parameters: int
    points: int
    rss: float
    at_bounds: tuple[str, ...]

    @property
    def freedom(self) -> int:
        return self.points - self.parameters

    @property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; infinite where they are too few for the correction."""
        k = self.parameters + 1  # the variance is estimated too
        if self.points - k - 1 <= 0:
            return float("inf")
        return self.points * float(np.log(self.rss / self.points)) + 2 * k + 2 * k * (k + 1) / (self.points - k - 1)


@dataclass(frozen=True)
class FTest:
    """Extra sum of squares: does the richer model explain more than its parameters would by chance?"""

    statistic: float
    freedom: tuple[int, int]
    p: float


@dataclass(frozen=True)
class Ladder:
    """The rungs over the points of two arms; `challenger` marks those of the second.

    `shared`: one law. `ratio`: the challenger behaves as the baseline with rho times its size. `ratio_and_exponent`:
    the floor alone is shared. `separate`: nothing is.
    """

    sizes: Float[ndarray, " points"]
    values: Float[ndarray, " points"]
    challenger: ndarray
    level: float = 0.95

    @cached_property
    def _logs(self) -> ndarray:
        return np.log(self.sizes) - np.log(self.sizes).mean()

    @property
    def reference(self) -> float:
        """Geometric mean of all sizes."""
        return float(np.exp(np.log(self.sizes).mean()))

    def _columns(self, exponents: Float[ndarray, "*grid arms"], *, split: bool) -> ndarray:
        """Floor and power law, the latter apart for the two arms or not."""
        exponent = np.where(self.challenger, exponents[..., 1, None], exponents[..., 0, None])
        power = np.exp(-exponent * self._logs)
        parts = [power * ~self.challenger, power * self.challenger] if split else [power]
        return np.stack([np.ones_like(power), *parts], axis=-1)

    def _shared_columns(self, shape: ndarray) -> ndarray:
        return self._columns(shape[..., [0, 0]], split=False)

    def _ratio_columns(self, shape: ndarray) -> ndarray:
        return self._columns(shape[..., [0, 0]], split=True)

    def _exponent_columns(self, shape: ndarray) -> ndarray:
        """Of the baseline's exponent and the factor between it and the challenger's."""
        return self._columns(np.stack([shape[..., 0], shape[..., 0] * shape[..., 1]], axis=-1), split=True)

    @cached_property
    def shared(self) -> Fitted:
        return self._fit(self._shared_columns, (_EXPONENT,))

    @cached_property
    def ratio(self) -> Fitted:
        return self._fit(self._ratio_columns, (_EXPONENT,))

    @cached_property
    def ratio_and_exponent(self) -> Fitted:
        return self._fit(self._exponent_columns, _BOTH)

    @cached_property
    def separate(self) -> Fitted:
        laws = [
            fit_law(POWER_LAW, self.sizes[of][:, None], self.values[of]) for of in (~self.challenger, self.challenger)
        ]
        curves = [
            Curve(float(floor), float(reducible), float(law.shape[0]), float(law.reference[0]))
            for law in laws
            for floor, reducible in [law.at_reference]
        ]
        bounds = tuple(name for law in laws for name in law.search.at_bounds)
        return Fitted(curves[0], curves[1], 6, len(self.values), sum(law.rss for law in laws), bounds)

    def _fit(self, columns: Columns, ranges: tuple[Range, ...]) -> Fitted:
        found = minimize(columns, self.values, ranges)
        floor, *reducible = found.projected.coefficients.tolist()
        a = float(found.shape[0])
        b = a * float(found.shape[1]) if len(ranges) > 1 else a
        return Fitted(
            baseline=Curve(floor, reducible[0], a, self.reference),
            challenger=Curve(floor, reducible[-1], b, self.reference),
            parameters=1 + len(reducible) + len(ranges),
            points=len(self.values),
            rss=float(found.projected.rss),
            at_bounds=(*(["E"] if floor == 0 else []), *found.search.at_bounds),
        )

    def fitted(self) -> dict[Rung, Fitted]:
        return dict(zip(RUNGS, (self.shared, self.ratio, self.ratio_and_exponent, self.separate), strict=True))

    def rho(self) -> Estimate:
        """How many of the baseline's parameters one of the challenger's is worth, with one exponent for both.

        At a given exponent a the terms of the arms have a ratio of rho^a, and that the residuals allow a ratio is a
        quadratic inequality (Fieller, 1954); the interval joins what every possible a allows.
        """
        best = self.ratio
        limit = profile_limit(best.rss, best.points, best.parameters, self.level)
        shapes, projected = region(self._ratio_columns, self.values, (_EXPONENT,), limit)
        k_a, k_b = projected.coefficients[:, 1], projected.coefficients[:, 2]
        spare = np.maximum(limit - projected.rss, 0)
        h = spare[:, None, None] * projected.inverse
        square, middle, constant = k_b**2 - h[:, 2, 2], k_a * k_b - h[:, 1, 2], k_a**2 - h[:, 1, 1]
        far = middle + np.sqrt(np.maximum(middle**2 - square * constant, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(constant > 0, constant / far, 0)
            high = np.where(square > 0, far / square, np.inf)
            a = shapes[:, 0]
            value = (best.baseline.reducible / best.challenger.reducible) ** (1 / best.baseline.exponent)
            return Estimate(
                float(value),
                min(float(value), float(np.nanmin(low ** (1 / a)))),
                max(float(value), float(np.nanmax(high ** (1 / a)))),
                self.level,
                best.freedom,
            )

    def exponent_difference(self) -> Estimate:
        """Challenger's exponent minus the baseline's, with one floor for both."""
        best = self.ratio_and_exponent
        limit = profile_limit(best.rss, best.points, best.parameters, self.level)
        shapes, _ = region(self._exponent_columns, self.values, _BOTH, limit)
        differences = shapes[:, 0] * (shapes[:, 1] - 1)
        value = best.challenger.exponent - best.baseline.exponent
        return Estimate(
            value,
            min(value, float(differences.min())),
            max(value, float(differences.max())),
            self.level,
            best.freedom,
        )


def f_test(simpler: Fitted, richer: Fitted) -> FTest:
    """Of two nested rungs. Raises ValueError where the richer one leaves no degree of freedom."""
    from scipy.stats import f  # takes most of a second to import

    if richer.freedom < 1:
        raise ValueError(f"{richer.points} points leave nothing to test a model of {richer.parameters} parameters with")
    extra = richer.parameters - simpler.parameters
    statistic = max(simpler.rss - richer.rss, 0.0) / extra / (richer.rss / richer.freedom)
    return FTest(statistic, (extra, richer.freedom), float(f.sf(statistic, extra, richer.freedom)))
