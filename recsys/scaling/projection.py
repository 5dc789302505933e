"""Variable projection: least squares in which all but a few shape parameters are solved for in closed form.

A law such as E + A N^-a is linear in E and A once a is given. Only a is searched, on a grid that is then polished,
and the problem that is left is small and well conditioned (Golub & Pereyra, 1973).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

_RANK = 1e-10
"""A column whose part outside the span of those before it is smaller than this share of it adds nothing."""

_STARTS = 5
"""Local minima of the grid that are polished, at most."""


@dataclass(frozen=True)
class Range:
    """Where one shape parameter is looked for, in equal ratios from `low` to `high`."""

    name: str
    low: float
    high: float
    points: int

    def grid(self) -> Float[ndarray, " points"]:
        return np.geomspace(self.low, self.high, self.points)


@dataclass(frozen=True)
class Projected:
    """The best non-negative coefficients for each of many given shapes."""

    rss: Float[ndarray, "*grid"]
    """Residual sum of squares."""
    coefficients: Float[ndarray, "*grid terms"]
    inverse: Float[ndarray, "*grid terms terms"]
    """Inverse of X'X over the terms that are free; zero in rows and columns of a coefficient that is held at 0."""

    def half_width(self, functional: Float[ndarray, "*rows terms"], limit: float) -> Float[ndarray, "*rows"]:
        """How far `functional @ coefficients` may move from its value before the residuals exceed `limit`."""
        variance = np.einsum("...i,...ij,...j->...", functional, self.inverse, functional)
        return np.sqrt(np.maximum(limit - self.rss, 0) * variance)


def project(columns: Float[ndarray, "*grid points terms"], y: Float[ndarray, " points"]) -> Projected:
    """Non-negative least squares of `y` on each matrix of `columns`, by trying every set of free coefficients."""
    *grid, points, terms = columns.shape
    flat = columns.reshape(-1, points, terms)
    rss = np.full(len(flat), np.inf)
    coefficients = np.zeros((len(flat), terms))
    inverse = np.zeros((len(flat), terms, terms))
    undecided = np.arange(len(flat))
    for size in range(terms, 0, -1):
        for free in map(np.array, combinations(range(terms), size)):
            found, solution, covariance = _solve(flat[undecided][..., free], y)
            better = found < rss[undecided]
            at = undecided[better]
            rss[at], coefficients[at], inverse[at] = found[better], 0, 0
            coefficients[at[:, None], free] = solution[better]
            inverse[at[:, None, None], free[:, None], free] = covariance[better]
        if size == terms:  # where all coefficients come out positive, nothing else can be better
            undecided = undecided[np.isinf(rss[undecided])]
    rss[np.isinf(rss)] = y @ y
    return Projected(rss.reshape(grid), coefficients.reshape(*grid, terms), inverse.reshape(*grid, terms, terms))


def _solve(
    columns: Float[ndarray, "grid points free"], y: Float[ndarray, " points"]
) -> tuple[Float[ndarray, " grid"], Float[ndarray, "grid free"], Float[ndarray, "grid free free"]]:
    """Plain least squares; the sum of squares is infinite where columns are dependent or a coefficient is negative."""
    q, r = np.linalg.qr(columns)
    diagonal = np.abs(np.diagonal(r, axis1=-2, axis2=-1))
    dependent = (diagonal <= _RANK * np.linalg.norm(columns, axis=-2)).any(-1)
    r = np.where(dependent[:, None, None], np.eye(r.shape[-1]), r)
    solution = np.linalg.solve(r, (y @ q)[..., None])[..., 0]
    half = np.linalg.inv(r)
    residual = y - (columns @ solution[..., None])[..., 0]
    rss = np.einsum("gn,gn->g", residual, residual)
    return np.where(dependent | (solution < 0).any(-1), np.inf, rss), solution, half @ half.swapaxes(-1, -2)


@dataclass(frozen=True)
class Search:
    """How a minimum was found, and whether it can be believed."""

    starts: int
    agreeing: int
    """Starts that ended within a millionth of the best objective."""
    gradient: float
    """Length of the objective's gradient at the minimum, along the directions that no bound closes."""
    at_bounds: tuple[str, ...]
    """Parameters that lie at the end of their range: the data do not determine them."""


@dataclass(frozen=True)
class Minimum:
    shape: Float[ndarray, " shapes"]
    projected: Projected
    search: Search


Columns = Callable[[ndarray], ndarray]
"""Shapes `*grid shapes` -> columns `*grid points terms`."""


def minimize(columns: Columns, y: Float[ndarray, " points"], ranges: Sequence[Range]) -> Minimum:
    """The shape and coefficients with the smallest sum of squares: the grid's local minima, polished."""
    from scipy.optimize import least_squares  # takes most of a second to import

    grid = np.stack(np.meshgrid(*(one.grid() for one in ranges), indexing="ij"), axis=-1)
    rss = project(columns(grid), y).rss
    low, high = np.log([one.low for one in ranges]), np.log([one.high for one in ranges])

    def residual(log_shape: ndarray) -> ndarray:
        x = columns(np.exp(log_shape))
        return y - x @ project(x, y).coefficients

    starts = [grid[at] for at in _local_minima(rss)]
    results = []
    for start in starts:
        inside = np.clip(np.log(start), low + 1e-9, high - 1e-9)
        results.append(
            least_squares(residual, inside, jac="3-point", bounds=(low, high), xtol=1e-15, ftol=1e-15, gtol=1e-15)
        )
    best = min(results, key=lambda result: result.cost)
    bound = best.cost + max(1e-6 * best.cost, 1e-24 * float(y @ y))
    shape = np.exp(best.x)
    stuck = np.minimum(best.x - low, high - best.x) < 1e-6
    return Minimum(
        shape=shape,
        projected=project(columns(shape), y),
        search=Search(
            starts=len(results),
            agreeing=sum(bool(result.cost <= bound) for result in results),
            gradient=float(np.linalg.norm((2 * np.asarray(best.jac).T @ best.fun)[~stuck])),
            at_bounds=tuple(one.name for one, at_end in zip(ranges, stuck, strict=True) if at_end),
        ),
    )


def _local_minima(rss: Float[ndarray, "*grid"]) -> list[tuple[int, ...]]:
    """Grid points that no neighbour along an axis undercuts, best first."""
    lowest = np.ones(rss.shape, dtype=bool)
    for axis in range(rss.ndim):
        padded = np.pad(rss, [(1, 1) if a == axis else (0, 0) for a in range(rss.ndim)], constant_values=np.inf)
        before = np.take(padded, range(rss.shape[axis]), axis=axis)
        after = np.take(padded, range(2, rss.shape[axis] + 2), axis=axis)
        lowest &= (rss <= before) & (rss <= after)
    found = sorted(zip(*np.nonzero(lowest), strict=True), key=lambda at: rss[at])
    return [tuple(int(i) for i in at) for at in found[:_STARTS]]


def region(
    columns: Columns, y: Float[ndarray, " points"], ranges: Sequence[Range], limit: float
) -> tuple[Float[ndarray, "inside shapes"], Projected]:
    """The shapes whose sum of squares is at most `limit`, on a grid that is fitted to them, and what belongs to each.

    `limit` must lie above the minimum.
    """
    low, high = np.log([one.low for one in ranges]), np.log([one.high for one in ranges])
    points = 400 if len(ranges) == 1 else 60
    for _ in range(3):
        axes = [np.exp(np.linspace(a, b, points)) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(ranges))
        found = project(columns(grid), y)
        inside = found.rss <= limit
        if not inside.any():  # the region is smaller than the grid is fine: look around its best point
            inside = found.rss == found.rss.min()
        step = (high - low) / (points - 1)
        chosen = np.log(grid[inside])
        low, high = np.maximum(low, chosen.min(0) - step), np.minimum(high, chosen.max(0) + step)
    return grid[inside], Projected(found.rss[inside], found.coefficients[inside], found.inverse[inside])
