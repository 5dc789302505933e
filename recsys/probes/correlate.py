"""Do runs that are more aligned rank worse? One point per independent run, pooled and within cells side by side.

A cell holds the runs that differ in nothing but their seed: one data set, one size, one arm. Between cells
alignment and metric move together without any causal link (both follow the width), so a pooled correlation is shown
only for comparison; the claims are the within-cell ones.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from recsys.errors import UserError
from recsys.evaluation.inference import holm, percentile_interval

POINT_COLUMNS = ("run", "dataset", "cell", "seed", "log_ratio", "value", "log_parameters")
"""Of what `correlate` takes: `log_ratio` is the log of the run's alignment ratio, `value` its metric."""

COLUMNS = ("dataset", "statistic", "scope", "value", "low", "high", "p", "p_holm", "runs", "cells")
"""Of what it gives. `scope` is "pooled" or "within"; the primary family, to which Holm's correction is applied, are the
within-cell Spearman correlations, one per data set."""

ALL = "all"


class TooFewRuns(UserError):
    """Runs from which nothing can be concluded; the message says what is missing."""


class MissingExtra(UserError):
    """A package of an extra is not installed; the message says which."""


def centre_in_cells(points: pd.DataFrame) -> pd.DataFrame:
    """The points with `log_ratio_within` and `value_within`: what is left less the mean of the point's cell."""
    centred = points.copy()
    for name in ("log_ratio", "value"):
        centred[f"{name}_within"] = points[name] - points.groupby("cell")[name].transform("mean")
    return centred


def correlate(points: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Rows as `COLUMNS`, for every data set and, where there are several, for all together.

    Intervals resample whole cells, and runs where there is a single cell. p-values within cells permute the metric
    inside each cell. Raises TooFewRuns where no cell has two runs or there are fewer than four in all.
    """
    several = [cell for cell, runs in points.groupby("cell") if len(runs) > 1]
    if not several or len(points) < 4:
        raise TooFewRuns(
            f"{len(points)} runs in {points['cell'].nunique()} cells, of which {len(several)} have more than one: "
            "a correlation within cells needs four runs or more, some of which differ only in their seed"
        )
    datasets = list(dict.fromkeys(points["dataset"]))
    rows = []
    for dataset in [*datasets, *([ALL] if len(datasets) > 1 else [])]:
        chosen = points if dataset == ALL else points[points["dataset"] == dataset]
        if len(chosen) < 4:
            continue
        arrays = _Points.of(chosen)
        for (statistic, scope), measure in _STATISTICS.items():
            value = measure(arrays)
            interval = percentile_interval(value, _bootstrap(arrays, measure, samples, seed), len(chosen))
            p = _permutation(arrays, measure, value, samples, seed) if scope == "within" else math.nan
            rows.append((dataset, statistic, scope, value, interval.low, interval.high, p, math.nan, len(chosen)))
    table = pd.DataFrame(rows, columns=[*COLUMNS[:-1]])
    cells = points.groupby("dataset")["cell"].nunique().to_dict() | {ALL: points["cell"].nunique()}
    table["cells"] = table["dataset"].map(cells)
    primary = (table["statistic"] == "spearman") & (table["scope"] == "within") & table["p"].notna()
    if len(datasets) > 1:
        primary &= table["dataset"] != ALL
    table.loc[primary, "p_holm"] = holm(table.loc[primary, "p"].tolist())
    return table


def mixed_model(points: pd.DataFrame) -> dict[str, float]:
    """The slope of the metric on the log alignment ratio: sizes as fixed effects, data sets as groups with an intercept
    and, where slopes differ, a slope of their own (REML); both variables in units of their within-cell standard
    deviation.

    `slope`, `error` (standard error), `p`. Needs two data sets or more. Raises MissingExtra without statsmodels.
    """
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM
        from statsmodels.tools.sm_exceptions import ConvergenceWarning
    except ImportError:
        raise MissingExtra("the mixed model needs statsmodels: pip install 'recsys[stats]'") from None
    if points["dataset"].nunique() < 2:
        raise TooFewRuns("the mixed model takes data sets as groups and there is one; give runs on two or more")
    centred = centre_in_cells(points)
    x, y = (points[name] / centred[f"{name}_within"].std(ddof=1) for name in ("log_ratio", "value"))
    size = pd.get_dummies(points["log_parameters"].round(6), drop_first=True, dtype=float)
    # Between cells both move for other reasons, so the cell's mean of the predictor is a covariate of its own.
    mean = x.groupby(points["cell"]).transform("mean")
    fixed = np.column_stack([np.ones(len(x)), x, mean, size])
    fixed = fixed[:, _independent(fixed)]
    ones = np.ones(len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a variance at zero: the data sets do not differ
        warnings.simplefilter("ignore", RuntimeWarning)
        for own in (np.column_stack([ones, x - mean]), ones[:, None]):
            groups = points["dataset"].to_numpy()
            fit = MixedLM(y.to_numpy(), fixed, groups, own).fit(method=["lbfgs", "powell"])
            if np.isfinite(fit.bse[1]):
                break  # else the slopes do not differ between data sets, and the likelihood is flat there
    return {"slope": float(fit.params[1]), "error": float(fit.bse[1]), "p": float(fit.pvalues[1])}


def _independent(columns: Float[ndarray, "points columns"]) -> list[int]:
    """Columns that are no combination of those before them."""
    kept: list[int] = []
    for index in range(columns.shape[1]):
        if np.linalg.matrix_rank(columns[:, [*kept, index]]) > len(kept):
            kept.append(index)
    return kept


class _Points(NamedTuple):
    """The columns of some points as arrays; cells and data sets are numbered."""

    x: Float[ndarray, " points"]
    y: Float[ndarray, " points"]
    size: Float[ndarray, " points"]
    cell: Int[ndarray, " points"]
    dataset: Int[ndarray, " points"]

    @staticmethod
    def of(points: pd.DataFrame) -> "_Points":
        x, y, size = (points[name].to_numpy(float) for name in ("log_ratio", "value", "log_parameters"))
        cell, dataset = (np.unique(points[name], return_inverse=True)[1] for name in ("cell", "dataset"))
        return _Points(x, y, size, cell, dataset)

    def within(self) -> tuple[Float[ndarray, " rest"], Float[ndarray, " rest"]]:
        """Both less their cell's mean; a cell of one says nothing and is left out."""
        runs = np.bincount(self.cell)
        kept = runs[self.cell] > 1
        x, y = (
            (values - (np.bincount(self.cell, values) / np.maximum(runs, 1))[self.cell])[kept]
            for values in (self.x, self.y)
        )
        return x.round(12), y.round(12)  # equal values must tie


def _spearman(x: Float[ndarray, " points"], y: Float[ndarray, " points"]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(x), rankdata(y))


def _kendall(x: Float[ndarray, " points"], y: Float[ndarray, " points"]) -> float:
    """tau-b."""
    above, beyond = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    pairs = math.sqrt(float((above**2).sum()) * float((beyond**2).sum()))
    return float((above * beyond).sum()) / pairs if pairs > 0 else math.nan


def _pearson(x: Float[ndarray, " points"], y: Float[ndarray, " points"]) -> float:
    if len(x) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 1e-12 * len(x) else math.nan


def _partial(points: _Points) -> float:
    """Spearman's correlation of what ranks of log parameters and the data set leave of both."""
    from scipy.stats import rankdata

    datasets = (points.dataset[:, None] == np.unique(points.dataset)).astype(float)
    given = np.column_stack([datasets, rankdata(points.size)])
    x, y = (
        ranks - given @ np.linalg.lstsq(given, ranks, rcond=None)[0] for ranks in map(rankdata, (points.x, points.y))
    )
    return _pearson(x, y)


Measure = Callable[[_Points], float]

_STATISTICS: dict[tuple[str, str], Measure] = {
    ("spearman", "pooled"): lambda points: _spearman(points.x, points.y),
    ("kendall", "pooled"): lambda points: _kendall(points.x, points.y),
    ("spearman given log parameters", "pooled"): _partial,
    ("spearman", "within"): lambda points: _spearman(*points.within()),
    ("kendall", "within"): lambda points: _kendall(*points.within()),
}


def _bootstrap(points: _Points, measure: Measure, samples: int, seed: int) -> Float[ndarray, " samples"]:
    generator = np.random.default_rng(seed)
    numbers = np.unique(points.cell)
    single = len(numbers) == 1  # then runs are resampled in place of cells
    groups = (
        [np.array([run]) for run in range(len(points.x))]
        if single
        else [np.flatnonzero(points.cell == number) for number in numbers]
    )
    draws = np.empty(samples)
    for sample in range(samples):
        drawn = generator.integers(len(groups), size=len(groups))
        index = np.concatenate([groups[group] for group in drawn])
        cell = np.repeat(
            np.arange(len(drawn)), [len(groups[group]) for group in drawn]
        )  # drawn twice, it counts as two
        draws[sample] = measure(
            _Points(
                points.x[index],
                points.y[index],
                points.size[index],
                points.cell[index] if single else cell,
                points.dataset[index],
            )
        )
    return draws


def _permutation(points: _Points, measure: Measure, value: float, samples: int, seed: int) -> float:
    """Two-sided: the share of permutations of the metric inside cells, the given one too, that are as far from 0."""
    if math.isnan(value):
        return math.nan
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(points.cell == number) for number in np.unique(points.cell)]
    extreme = 1
    for _ in range(samples):
        permuted = points.y.copy()
        for group in groups:
            permuted[group] = points.y[generator.permutation(group)]
        extreme += abs(measure(points._replace(y=permuted))) >= abs(value) - 1e-12
    return extreme / (samples + 1)
