"""What a study says: a law for each arm on each axis, two arms against each other, and several datasets pooled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from recsys.errors import UserError
from recsys.evaluation.inference import holm
from recsys.scaling.compare import (
    MIN_SIZES,
    Arm,
    Axis,
    HoldOut,
    LawComparison,
    compare_laws,
    conclusion,
    hold_out_largest,
)
from recsys.scaling.laws import POWER_LAW, Confidence, Law, TooFewPoints, confidence, fit_law
from recsys.scaling.pooling import Pooled, pool_ratios
from recsys.scaling.records import AXES, Response, Study
from recsys.scaling.robust import fit_huber, fit_lad

Engine = Literal["least_squares", "huber", "lad"]


@dataclass(frozen=True)
class ArmLaw:
    """The law of one arm on one axis, through the means of its sizes."""

    study: str
    axis: Axis
    arm: Arm
    law: Law
    confidence: Confidence | None
    """None for the robust fits, which have no intervals here."""
    hold_out: HoldOut | None
    """None where too few sizes would be left to fit."""


@dataclass(frozen=True)
class Findings:
    response: Response
    laws: list[ArmLaw] = field(default_factory=list)
    comparisons: dict[tuple[str, Axis], LawComparison] = field(default_factory=dict)
    pooled: dict[Axis, Pooled] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    """What was asked for and cannot be said, with the reason."""

    def sentences(self) -> list[str]:
        """What the comparisons come to, named axis by named axis; the p-values of all are corrected together."""
        said = []
        adjusted = holm([comparison.ratio_test.p for comparison in self.comparisons.values()])
        for study in dict.fromkeys(study for study, _ in self.comparisons):
            chosen = {key: one for key, one in self.comparisons.items() if key[0] == study}
            p = [value for key, value in zip(self.comparisons, adjusted, strict=True) if key in chosen]
            said += [f"{study}: {line}" if study else line for line in conclusion(list(chosen.values()), p)]
        return said


def find(
    studies: Sequence[Study],
    response: Response,
    axes: Sequence[Axis] = tuple(AXES),
    *,
    engine: Engine = "least_squares",
    compare: tuple[str, str] | None = None,
) -> Findings:
    """Everything that the finished runs allow; what they do not allow is a refusal with its reason.

    `compare`: the baseline and the challenger. Raises StudyError for an arm that is in no study.
    """
    findings = Findings(response)
    for study in studies:
        for axis in axes:
            if study.table[AXES[axis]].isna().any():
                _refuse(findings, study, axis, "these runs do not say; make them with `recsys sweep`")
                continue
            for name in study.arms:
                _fit(findings, study, study.arm(name, axis, response), axis, engine)
            if compare is not None:
                baseline, challenger = (study.arm(name, axis, response) for name in compare)
                try:
                    findings.comparisons[study.name, axis] = compare_laws(axis, baseline, challenger)
                except UserError as error:
                    _refuse(findings, study, axis, str(error))
    for axis in axes:
        ratios = {study: one.rho for (study, its), one in findings.comparisons.items() if its == axis}
        if len(ratios) > 1:
            try:
                findings.pooled[axis] = pool_ratios(ratios)
            except ValueError as error:
                findings.refusals.append(f"all studies, {axis}: {error}")
    return findings


def _refuse(findings: Findings, study: Study, axis: Axis, reason: str) -> None:
    findings.refusals.append(f"{study.name + ', ' if study.name else ''}{axis}: {reason}")


def _fit(findings: Findings, study: Study, arm: Arm, axis: Axis, engine: Engine) -> None:
    sizes, values = arm.means
    x = sizes[:, None]
    if len(sizes) < MIN_SIZES:
        _refuse(findings, study, axis, f"{arm.name} has {len(sizes)} sizes and a law needs at least {MIN_SIZES}")
        return
    law = _ENGINES[engine](x, values)
    try:
        held = hold_out_largest(arm)
    except TooFewPoints:
        held = None
    intervals = confidence(law, x, values) if engine == "least_squares" else None
    findings.laws.append(ArmLaw(study.name, axis, arm, law, intervals, held))


_ENGINES: dict[Engine, Callable[[np.ndarray, np.ndarray], Law]] = {
    "least_squares": lambda x, y: fit_law(POWER_LAW, x, y),
    "huber": lambda x, y: fit_huber(POWER_LAW, x, y),
    "lad": lambda x, y: fit_lad(POWER_LAW, x, y),
}
