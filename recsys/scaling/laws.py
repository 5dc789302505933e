"""Scaling laws: the forms, least-squares fits of them, and bands around the fits.

A form is a sum of power laws over the axes of a study (parameters N, training examples D). Whatever the axis, larger
is better and the response falls: a loss, or one minus a bounded score such as NDCG.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from recsys.errors import UserError
from recsys.scaling.projection import Projected, Range, Search, minimize, region


@dataclass(frozen=True)
class Form:
    """A law up to its parameters: the sum of each coefficient, which is never negative, times its column."""

    formula: str
    axes: tuple[str, ...]
    coefficients: tuple[str, ...]
    ranges: tuple[Range, ...]
    """Of the shape parameters, those in which the law is not linear."""
    log_columns: Callable[[ndarray, ndarray], ndarray]
    """Points `points axes` and shapes `*grid shapes` -> the logarithm of each column, `*grid points terms`."""

    def columns(
        self,
        x: Float[ndarray, "points axes"],
        shape: Float[ndarray, "*grid shapes"],
        reference: Float[ndarray, " axes"],
    ) -> Float[ndarray, "*grid points terms"]:
        """Columns that are 1 at the reference point, which keeps their coefficients of the order of the response."""
        return np.exp(self.log_columns(x, shape) - self.log_columns(reference[None], shape))


def _power(axis: ndarray, exponent: ndarray) -> ndarray:
    """log(axis^-exponent): `points` and `*grid` -> `*grid points`."""
    return -exponent[..., None] * np.log(axis)


def _stack(*columns: ndarray) -> ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def _power_law(x: ndarray, shape: ndarray) -> ndarray:
    power = _power(x[:, 0], shape[..., 0])
    return _stack(np.zeros_like(power), power)


def _two_axes(x: ndarray, shape: ndarray) -> ndarray:
    power = _power(x[:, 0], shape[..., 0])
    return _stack(np.zeros_like(power), power, _power(x[:, 1], shape[..., 1]))


def _one_exponent(x: ndarray, shape: ndarray) -> ndarray:
    return _two_axes(x, shape[..., [0, 0]])


def _link(x: ndarray, shape: ndarray) -> ndarray:
    power = -shape[..., 0, None] * x[:, 0]
    return _stack(np.zeros_like(power), power)


def _data_constrained(x: ndarray, shape: ndarray) -> ndarray:
    n, d, unique, fitting = x.T
    a, b, per_data, per_parameter = (shape[..., index] for index in range(4))
    n, d = _effective(n, fitting, per_parameter), _effective(d, unique, per_data)
    power = -a[..., None] * np.log(n)
    return _stack(np.zeros_like(power), power, -b[..., None] * np.log(d))


def _effective(total: ndarray, unique: ndarray, life: ndarray) -> ndarray:
    """What `total` is worth of which only `unique` is new: U + U r (1 - exp(-R / r)) after R repetitions."""
    unique = np.minimum(unique, total)
    repeats, life = total / unique - 1, life[..., None]
    return unique * (1 + life * (1 - np.exp(-repeats / life)))


_EXPONENT = (0.01, 3.0)

POWER_LAW = Form(
    formula="E + A N^-a",
    axes=("N",),
    coefficients=("E", "A"),
    ranges=(Range("a", *_EXPONENT, 60),),
    log_columns=_power_law,
)
"""For a bounded score M, fitted to 1 - M: the score saturates at 1 - E."""

TWO_AXES = Form(
    formula="E + A N^-a + B D^-b",
    axes=("N", "D"),
    coefficients=("E", "A", "B"),
    ranges=(Range("a", *_EXPONENT, 30), Range("b", *_EXPONENT, 30)),
    log_columns=_two_axes,
)
"""Parameters and unique training data (Hoffmann et al., 2022, approach 3)."""

ONE_EXPONENT = Form(
    formula="E + A N^-a + B D^-a",
    axes=("N", "D"),
    coefficients=("E", "A", "B"),
    ranges=(Range("a", *_EXPONENT, 60),),
    log_columns=_one_exponent,
)
"""The two axes with one exponent (Gadre et al., 2024, equation 4)."""

DATA_CONSTRAINED = Form(
    formula="E + A N'^-a + B D'^-b",
    axes=("N", "D", "U", "N_U"),
    coefficients=("E", "A", "B"),
    ranges=(
        Range("a", 0.05, 1.5, 8),
        Range("b", 0.05, 1.5, 8),
        Range("R_D", 0.5, 200.0, 7),
        Range("R_N", 0.5, 200.0, 7),
    ),
    log_columns=_data_constrained,
)
"""Training in several epochs (Muennighoff et al., 2023): D examples of which U are unique, N parameters of which N_U
would suit U examples (`Optimum.parameters`). D' and N' count what repeats at a discount that R_D and R_N set."""

SCORE_OF_LOSS = Form(
    formula="E + A exp(-g L)",
    axes=("L",),
    coefficients=("E", "A"),
    ranges=(Range("g", 0.01, 30.0, 80),),
    log_columns=_link,
)
"""A metric from the loss: E is what a model that knows nothing would have (Gadre et al., 2024, equation 5)."""


@dataclass(frozen=True)
class Law:
    """A form with its parameters."""

    form: Form
    shape: Float[ndarray, " shapes"]
    reference: Float[ndarray, " axes"]
    """Geometric mean of the points."""
    at_reference: Float[ndarray, " terms"]
    """The terms at the reference point. Unlike a bare coefficient, a term there hardly depends on its exponent."""
    objective: float
    """What was minimized."""
    rss: float
    """Residual sum of squares of the response itself, whatever was minimized."""
    points: int
    search: Search

    @property
    def parameters(self) -> dict[str, float]:
        """All parameters by their names in the formula. A and a go together: do not compare A of two fits."""
        columns = self.form.log_columns(self.reference[None], self.shape)[0]
        coefficients = self.at_reference * np.exp(-columns)
        values = [*coefficients.tolist(), *self.shape.tolist()]
        names = [*self.form.coefficients, *(one.name for one in self.form.ranges)]
        return dict(zip(names, values, strict=True))

    def predict(self, x: Float[ndarray, "points axes"]) -> Float[ndarray, " points"]:
        return self.form.columns(x, self.shape, self.reference) @ self.at_reference


class TooFewPoints(UserError):
    """A law has at least as many parameters as there are points; the message says how many are needed."""


def check_points(form: Form, x: Float[ndarray, "points axes"], y: Float[ndarray, " points"]) -> None:
    """Raises TooFewPoints, or ValueError for what no law can be fitted to."""
    needed = len(form.coefficients) + len(form.ranges) + 1
    if len(y) < needed:
        raise TooFewPoints(
            f"{form.formula} has {needed - 1} parameters and there are {len(y)} points; at least {needed} are needed"
        )
    if not (np.isfinite(x).all() and (x > 0).all() and np.isfinite(y).all()):
        raise ValueError("sizes must be positive and responses finite; leave failed runs out before a fit")


def make_law(
    form: Form,
    x: Float[ndarray, "points axes"],
    y: Float[ndarray, " points"],
    *,
    shape: Float[ndarray, " shapes"],
    reference: Float[ndarray, " axes"],
    at_reference: Float[ndarray, " terms"],
    objective: float,
    search: Search,
) -> Law:
    """The law that a search ended at; terms that vanished join the parameters at a bound."""
    residual = y - form.columns(x, shape, reference) @ at_reference
    gone = [name for name, value in zip(form.coefficients, at_reference, strict=True) if value == 0]
    search = replace(search, at_bounds=(*gone, *search.at_bounds))
    return Law(form, shape, reference, at_reference, objective, float(residual @ residual), len(y), search)


def fit_law(
    form: Form,
    x: Float[ndarray, "points axes"],
    y: Float[ndarray, " points"],
    weights: Float[ndarray, " points"] | None = None,
) -> Law:
    """Least squares of the response by variable projection; `weights` multiply the squares (one over a variance)."""
    check_points(form, x, y)
    reference = np.exp(np.log(x).mean(0))
    root = np.ones_like(y) if weights is None else np.sqrt(weights)
    found = minimize(lambda shape: root[:, None] * form.columns(x, shape, reference), root * y, form.ranges)
    return make_law(
        form,
        x,
        y,
        shape=found.shape,
        reference=reference,
        at_reference=found.projected.coefficients,
        objective=float(found.projected.rss),
        search=found.search,
    )


@dataclass(frozen=True)
class Confidence:
    """All laws of a form that the points do not rule out: those whose residuals are within an F test of the best.

    Intervals are those of the profile likelihood. Resampling a few seeds gives intervals that are too narrow.
    """

    law: Law
    shapes: Float[ndarray, "inside shapes"]
    projected: Projected
    limit: float

    def band(self, at: Float[ndarray, "points axes"]) -> tuple[Float[ndarray, " points"], Float[ndarray, " points"]]:
        """Lowest and highest value of the law at each point."""
        columns = self.law.form.columns(at, self.shapes, self.law.reference)
        bounds = [self._interval(columns[:, point]) for point in range(len(at))]
        low, high = np.array(bounds).reshape(-1, 2).T
        return low, high

    def parameter(self, name: str) -> tuple[float, float]:
        """Interval of a shape parameter, or of a term at the reference point."""
        if name in self.law.form.coefficients:
            unit = np.eye(len(self.law.form.coefficients))[self.law.form.coefficients.index(name)]
            low, high = self._interval(np.broadcast_to(unit, self.projected.coefficients.shape))
            return max(low, 0.0), high
        values = self.shapes[:, [one.name for one in self.law.form.ranges].index(name)]
        return float(values.min()), float(values.max())

    def _interval(self, functional: Float[ndarray, "inside terms"]) -> tuple[float, float]:
        value = np.einsum("gt,gt->g", functional, self.projected.coefficients)
        half = self.projected.half_width(functional, self.limit)
        return float((value - half).min()), float((value + half).max())


def confidence(
    law: Law, x: Float[ndarray, "points axes"], y: Float[ndarray, " points"], level: float = 0.95
) -> Confidence:
    """What the points leave open about a law fitted to them by `fit_law`, without weights."""
    limit = profile_limit(law.rss, len(y), len(law.parameters), level)
    shapes, projected = region(lambda shape: law.form.columns(x, shape, law.reference), y, law.form.ranges, limit)
    return Confidence(law, shapes, projected, limit)


def profile_limit(rss: float, points: int, parameters: int, level: float) -> float:
    """The residual sum of squares up to which one parameter may be moved from its best value (an F test)."""
    from scipy.stats import f  # takes most of a second to import

    freedom = points - parameters
    return rss * (1 + float(f.ppf(level, 1, freedom)) / freedom)
