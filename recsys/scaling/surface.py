"""Laws in parameters and data together, through all sizes and amounts of data of a sweep's grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from recsys.scaling.compare import Axis
from recsys.scaling.isoflop import Parabola, isoflop_parabolas, optimum
from recsys.scaling.laws import (
    DATA_CONSTRAINED,
    ONE_EXPONENT,
    TWO_AXES,
    Confidence,
    Form,
    Law,
    TooFewPoints,
    confidence,
    fit_law,
)
from recsys.scaling.records import AXES, Response, Study

SurfaceForm = Literal["size_and_data", "one_exponent", "repeated_data"]

FORMS: dict[SurfaceForm, Form] = {
    "size_and_data": TWO_AXES,
    "one_exponent": ONE_EXPONENT,
    "repeated_data": DATA_CONSTRAINED,
}
LEVELS = 3
"""Amounts of data (or numbers of epochs) without which no exponent of the data can be told from its floor."""
SAME_BUDGET = 1.1
"""Runs whose training FLOPs are within this ratio of their neighbour's count as of one budget in a picture."""


@dataclass(frozen=True)
class Surface:
    """The law of one arm in parameters N and training targets D, through the means of its seeds."""

    axis: Axis
    arm: str
    x: Float[ndarray, "points axes"]
    y: Float[ndarray, " points"]
    law: Law
    confidence: Confidence | None
    """None with repeated data: four shapes are too many to search through for what the points leave open."""


def fit_surfaces(
    studies: Sequence[Study], response: Response, axes: Sequence[Axis], form: SurfaceForm
) -> tuple[list[Surface], list[str]]:
    """A law for each arm on each axis of parameters, and what cannot be fitted, with the reason.

    All studies are taken as one data set of which different shares are trained on (`data.train_users`), or as often as
    their epochs say. D is the number of targets of an epoch; `repeated_data` takes those of all epochs and the
    unique ones apart.
    """
    table = pd.concat([study.table for study in studies], ignore_index=True)
    found: list[Surface] = []
    refusals: list[str] = []
    for axis in axes:
        if axis == "training FLOPs":
            continue  # they are made of both
        for arm, rows in table.groupby("arm", sort=False):
            try:
                found.append(_fit(str(arm), rows, axis, response, form))
            except TooFewPoints as error:
                refusals.append(f"{axis}, {arm}: {error}")
    return found, refusals


def _fit(arm: str, rows: pd.DataFrame, axis: Axis, response: Response, form: SurfaceForm) -> Surface:
    n, unique, epochs, y = means(rows, axis, response)
    if form == "repeated_data":
        if len(np.unique(epochs)) < LEVELS:
            raise TooFewPoints(
                f"{len(np.unique(epochs))} numbers of epochs; what repetition is worth needs {LEVELS}: "
                "give the sweep a grid over trainer.epochs"
            )
        once = epochs == epochs.min()
        suited = optimum(fit_law(TWO_AXES, np.column_stack([n, unique])[once], y[once]))
        x = np.column_stack([n, epochs * unique, unique, [suited.parameters(one) for one in unique]])
    else:
        if len(np.unique(epochs)) > 1:
            raise TooFewPoints("the runs differ in their epochs; --form repeated_data takes that into account")
        x = np.column_stack([n, unique])
        if len(np.unique(unique)) < LEVELS:
            raise TooFewPoints(
                f"{len(np.unique(unique))} amounts of data; a law in the data needs {LEVELS}: "
                "give the sweep a grid over data.train_users"
            )
    law = fit_law(FORMS[form], x, y)
    return Surface(axis, arm, x, y, law, None if form == "repeated_data" else confidence(law, x, y))


def means(rows: pd.DataFrame, axis: Axis, response: Response) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Parameters, unique targets, epochs and response of each size in each study, the mean over its seeds."""
    values = rows.assign(value=rows[response] if response == "cross_entropy" else 1 - rows[response])
    columns = [AXES[axis], "targets", "epochs", "value"]
    if values["targets"].isna().any():
        raise TooFewPoints("these runs do not say how many targets they trained on; make them with `recsys sweep`")
    grouped = values.groupby(["study", "size"], sort=False)[columns].mean().to_numpy(float)
    n, unique, epochs, y = grouped.T
    return n, unique, epochs, y


def parabolas(studies: Sequence[Study], arm: str, axis: Axis, response: Response) -> list[Parabola]:
    """Over the sizes of an arm at equal training FLOPs, of all budgets with three sizes or more and a lowest point."""
    table = pd.concat([study.table for study in studies], ignore_index=True)
    rows = table[table["arm"] == arm].sort_values("training_flops")
    flops = rows["training_flops"].to_numpy(float)
    cluster = np.concatenate([[0], np.cumsum(flops[1:] > SAME_BUDGET * flops[:-1])])
    budgets = np.exp(pd.Series(np.log(flops)).groupby(cluster).transform("mean").to_numpy())
    sizes = rows[AXES[axis]].to_numpy(float)
    values = rows[response].to_numpy(float)
    losses = values if response == "cross_entropy" else 1 - values
    found = []
    for budget in np.unique(budgets):
        at = budgets == budget
        try:
            found += isoflop_parabolas(budgets[at], sizes[at], losses[at])
        except ValueError:
            continue  # too few sizes, or the lowest loss lies beyond them
    return found
