"""Does one architecture need fewer parameters than another for the same loss?

The unit is the mean of an (arm, size) over its seeds. Runs of one size share what its tuning did to them; taken as
independent they make a test of level 5 % reject up to half of the time where there is nothing to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from recsys.errors import UserError
from recsys.evaluation.inference import holm
from recsys.scaling.ladder import Estimate, FTest, Ladder, f_test
from recsys.scaling.laws import POWER_LAW, confidence, fit_law

Axis = Literal["dense parameters", "total parameters", "training FLOPs"]

MIN_SIZES = 4
MIN_DECADES = 1.0
_SIGNIFICANT = 0.05


class NoVerdict(UserError):
    """Too few sizes, or too close together; the message says what is missing."""


class Extrapolation(UserError):
    """The answer lies outside the sizes that were run; the message says where it would have to be read off."""


@dataclass(frozen=True)
class Arm:
    """The finished runs of one architecture, measured along one axis."""

    name: str
    sizes: Float[ndarray, " runs"]
    """Parameters or FLOPs; the runs of one size have exactly the same number."""
    values: Float[ndarray, " runs"]
    """A loss; for a bounded score, one minus the score."""

    @cached_property
    def means(self) -> tuple[Float[ndarray, " sizes"], Float[ndarray, " sizes"]]:
        """The sizes, ascending, and the mean over the runs of each."""
        sizes, index, counts = np.unique(self.sizes, return_inverse=True, return_counts=True)
        return sizes, np.bincount(index, self.values) / counts

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest size."""
        return float(self.sizes.min()), float(self.sizes.max())

    @cached_property
    def seed_variance(self) -> tuple[float, int]:
        """Variance among runs of one size, and its degrees of freedom; NaN and 0 without a second seed."""
        sizes, index = np.unique(self.sizes, return_inverse=True)
        deviations = self.values - self.means[1][index]
        freedom = len(self.values) - len(sizes)
        return (float(deviations @ deviations) / freedom, freedom) if freedom else (float("nan"), 0)


@dataclass(frozen=True)
class VarianceRatio:
    """Where the spread about the laws comes from: loss = law(size) + size effect + seed effect."""

    seeds: float
    """Variance among seeds of one arm and size."""
    sizes: float
    """Variance of what all seeds of an arm and size share (its tuning, a wrong form); never below 0."""

    @property
    def ratio(self) -> float:
        """Above 1, more seeds hardly help: tune every size better. Infinite where seeds do not differ at all."""
        return self.sizes / self.seeds if self.seeds else float("inf")


@dataclass(frozen=True)
class LawComparison:
    """Two arms on one axis."""

    axis: Axis
    baseline: Arm
    challenger: Arm
    ladder: Ladder

    @cached_property
    def rho(self) -> Estimate:
        """Parameters (or FLOPs) that the baseline needs for one of the challenger's. Above 1 the challenger wins."""
        return self.ladder.rho()

    @cached_property
    def exponent_difference(self) -> Estimate:
        """Challenger's minus baseline's; above 0 the challenger gains with size."""
        return self.ladder.exponent_difference()

    @cached_property
    def ratio_test(self) -> FTest:
        """Is there a difference at all: one law for both, against a ratio between them."""
        return f_test(self.ladder.shared, self.ladder.ratio)

    @cached_property
    def shape_test(self) -> FTest:
        """Does the ratio change with size: one ratio, against laws that share nothing."""
        return f_test(self.ladder.ratio, self.ladder.separate)

    @cached_property
    def shared_losses(self) -> tuple[float, float]:
        """Highest and lowest loss that both laws take within their own sizes.

        Raises Extrapolation where there is none: then no size of one arm does what a size of the other does.
        """
        separate = self.ladder.separate
        a, b = (
            curve.predict(np.array(arm.span))
            for arm, curve in ((self.baseline, separate.baseline), (self.challenger, separate.challenger))
        )
        high, low = min(a[0], b[0]), max(a[1], b[1])
        if low >= high:
            names = self.baseline.name, self.challenger.name
            raise Extrapolation(
                f"{names[0]} goes from {a[0]:.4g} to {a[1]:.4g} and {names[1]} from {b[0]:.4g} to {b[1]:.4g}: they "
                f"share no loss within the {self.axis} that were run, and a ratio would be an extrapolation; run "
                "sizes that reach the same losses"
            )
        return float(high), float(low)

    @property
    def overlap(self) -> tuple[float, float]:
        """The baseline's sizes of the same losses: where the ratio is an interpolation."""
        low, high = self.ladder.separate.baseline.inverse(np.array(self.shared_losses)).tolist()
        return max(low, self.baseline.span[0]), min(high, self.baseline.span[1])

    @property
    def variances(self) -> VarianceRatio | None:
        """None without a second seed anywhere."""
        arms = (self.baseline, self.challenger)
        freedom = sum(arm.seed_variance[1] for arm in arms)
        if not freedom:
            return None
        seeds = sum(arm.seed_variance[0] * arm.seed_variance[1] for arm in arms if arm.seed_variance[1]) / freedom
        separate = self.ladder.separate
        per_mean = separate.points / sum(len(arm.values) for arm in arms)
        return VarianceRatio(seeds, max(separate.rss / separate.freedom - seeds * per_mean, 0.0))

    def gap(self, sizes: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
        """Challenger's loss minus the baseline's at equal size, from separate laws. Below 0 the challenger wins."""
        for arm in (self.baseline, self.challenger):
            _require_within(sizes, arm.span, f"sizes of {arm.name}")
        separate = self.ladder.separate
        return separate.challenger.predict(sizes) - separate.baseline.predict(sizes)


def compare_laws(axis: Axis, baseline: Arm, challenger: Arm, level: float = 0.95) -> LawComparison:
    """The ladder of models over the means of two arms, which are taken to scatter alike at every size.

    Raises NoVerdict under four sizes or one decade in either arm; Extrapolation where the arms share no loss.
    """
    for arm in (baseline, challenger):
        sizes = len(arm.means[0])
        if sizes < MIN_SIZES:
            raise NoVerdict(f"{arm.name} has {sizes} sizes and a verdict needs at least {MIN_SIZES}; run more sizes")
        decades = float(np.log10(arm.span[1] / arm.span[0]))
        if decades < MIN_DECADES - 1e-9:
            raise NoVerdict(
                f"the {axis} of {arm.name} span {decades:.2f} decades and a verdict needs {MIN_DECADES:g}; run "
                "smaller or larger sizes"
            )
    (sizes_a, values_a), (sizes_b, values_b) = baseline.means, challenger.means
    ladder = Ladder(
        sizes=np.concatenate([sizes_a, sizes_b]),
        values=np.concatenate([values_a, values_b]),
        challenger=np.repeat([False, True], [len(sizes_a), len(sizes_b)]),
        level=level,
    )
    found = LawComparison(axis, baseline, challenger, ladder)
    _ = found.shared_losses  # raises where the arms cannot be compared
    return found


def interpolated_ratio(baseline: Arm, challenger: Arm, value: float) -> float:
    """Size of the baseline over that of the challenger at one value, read off between the runs; no law is fitted.

    An arm reaches the value between the largest size before which none reached it and the next one, linearly in the
    logarithm of the size. Raises Extrapolation where an arm never reaches it, or does so at its smallest size.
    """
    return _size_at(baseline, value) / _size_at(challenger, value)


def _size_at(arm: Arm, value: float) -> float:
    sizes, values = arm.means
    reached = values <= value
    if not reached.any():
        raise Extrapolation(
            f"{arm.name} never reaches {value:g}, its best is {values.min():g}; the size at which it would is an "
            "extrapolation: run larger sizes or ask for a value that both arms reach"
        )
    first = int(reached.argmax())
    if values[first] == value:
        return float(sizes[first])
    if first == 0:
        raise Extrapolation(
            f"{arm.name} is at {values[0]:g} with its smallest size already; the size at which it would be at "
            f"{value:g} is an extrapolation: run smaller sizes or ask for a better value"
        )
    share = (values[first - 1] - value) / (values[first - 1] - values[first])
    return float(sizes[first - 1] * (sizes[first] / sizes[first - 1]) ** share)


@dataclass(frozen=True)
class RatioCurve:
    """Baseline's size over the challenger's at equal loss, where that depends on the loss."""

    losses: Float[ndarray, " points"]
    ratio: Float[ndarray, " points"]
    low: Float[ndarray, " points"]
    high: Float[ndarray, " points"]


def ratio_curve(comparison: LawComparison, points: int = 41) -> RatioCurve:
    """Over the losses that both arms reach, from laws that share nothing.

    The interval joins the arms' profile intervals of the size at a loss (Zou & Donner, 2008).
    """
    separate, level = comparison.ladder.separate, comparison.ladder.level
    losses = np.linspace(*comparison.shared_losses, points)
    a, b = (np.log(curve.inverse(losses)) for curve in (separate.baseline, separate.challenger))
    (a_low, a_high), (b_low, b_high) = (
        _log_size_interval(arm, losses, level) for arm in (comparison.baseline, comparison.challenger)
    )
    return RatioCurve(
        losses=losses,
        ratio=np.exp(a - b),
        low=np.exp(a - b - np.hypot(a - a_low, b_high - b)),
        high=np.exp(a - b + np.hypot(a_high - a, b - b_low)),
    )


def _log_size_interval(arm: Arm, losses: Float[ndarray, " points"], level: float) -> tuple[ndarray, ndarray]:
    """Log of the sizes between which the band of an arm's law holds each loss; infinite where that is more than a
    decade beyond the runs."""
    sizes, values = arm.means
    law = fit_law(POWER_LAW, sizes[:, None], values)
    wide = np.geomspace(sizes[0] / 10, sizes[-1] * 10, 601)
    low, high = confidence(law, sizes[:, None], values, level).band(wide[:, None])
    logs = np.log(wide)[::-1]  # the ends of the band fall with the size; np.interp wants them to rise
    return (
        np.interp(losses, low[::-1], logs, right=-np.inf),
        np.interp(losses, high[::-1], logs, left=np.inf),
    )


@dataclass(frozen=True)
class HoldOut:
    """The largest size of an arm, predicted from the others."""

    arm: str
    size: float
    predicted: float
    observed: float
    seed_error: float | None
    """Standard error of the observed mean from its own seeds; None for one seed."""

    @property
    def error(self) -> float:
        """(predicted - observed) / observed. Above 0 the largest size did better than the law says."""
        return (self.predicted - self.observed) / self.observed


def hold_out_largest(arm: Arm) -> HoldOut:
    """Raises TooFewPoints with fewer than five sizes."""
    sizes, values = arm.means
    law = fit_law(POWER_LAW, sizes[:-1, None], values[:-1])
    runs = arm.values[arm.sizes == sizes[-1]]
    return HoldOut(
        arm=arm.name,
        size=float(sizes[-1]),
        predicted=float(law.predict(sizes[-1:, None])[0]),
        observed=float(values[-1]),
        seed_error=float(runs.std(ddof=1) / np.sqrt(len(runs))) if len(runs) > 1 else None,
    )


def conclusion(comparisons: Sequence[LawComparison], adjusted: Sequence[float] | None = None) -> list[str]:
    """One sentence per axis, and one that names the axes on which the challenger needs less.

    The p-values are adjusted over all the comparisons of the call; or they are `adjusted`, where these are some of
    more (on other datasets).
    """
    if adjusted is None:
        adjusted = holm([comparison.ratio_test.p for comparison in comparisons])
    lines = [_sentence(comparison, p) for comparison, p in zip(comparisons, adjusted, strict=True)]
    better: list[str] = []
    other: list[str] = []
    for comparison, p in zip(comparisons, adjusted, strict=True):
        wins = p < _SIGNIFICANT and comparison.rho.low > 1
        (better if wins else other).append(comparison.axis)
    names = comparisons[0].challenger.name, comparisons[0].baseline.name
    if better:
        rest = f"; not shown for {_listed(other)}" if other else ""
        lines.append(f"{names[0]} needs fewer than {names[1]} counted in {_listed(better)}{rest}.")
    else:
        lines.append(f"That {names[0]} needs fewer than {names[1]} is shown for none of {_listed(other)}.")
    return lines


def _sentence(comparison: LawComparison, p: float) -> str:
    rho, axis = comparison.rho, comparison.axis
    low, high = map(_rounded, comparison.overlap)
    old, new = comparison.baseline.name, comparison.challenger.name
    if p >= _SIGNIFICANT or rho.low <= 1 <= rho.high:
        verdict = f"{new} and {old} cannot be told apart"
    elif rho.value > 1:
        verdict = f"{new} reaches the loss of {old} with 1/{rho.value:.3g} of them"
    else:
        verdict = f"{new} needs {1 / rho.value:.3g} times as many as {old} for the same loss"
    text = (
        f"Counted in {axis}, {verdict}: rho = {rho.value:.3g} [{rho.low:.3g}, {rho.high:.3g}], p = {p:.2g}, over "
        f"{low} to {high} {axis} of {old}."
    )
    if comparison.shape_test.p >= _SIGNIFICANT:
        return text
    difference, curve = comparison.exponent_difference, ratio_curve(comparison, 2)
    return (
        f"{text} But the ratio changes with size (p = {comparison.shape_test.p:.2g}), from {curve.ratio[0]:.3g} "
        f"[{curve.low[0]:.3g}, {curve.high[0]:.3g}] at the smallest to {curve.ratio[1]:.3g} [{curve.low[1]:.3g}, "
        f"{curve.high[1]:.3g}] at the largest; the exponents differ by {difference.value:.3g} [{difference.low:.3g}, "
        f"{difference.high:.3g}]."
    )


def _rounded(size: float) -> str:
    """Three digits, written out up to billions."""
    return f"{float(f'{size:.3g}'):,.0f}" if size < 1e12 else f"{size:.3g}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _require_within(sizes: ndarray, span: tuple[float, float], what: str) -> None:
    if sizes.min() < span[0] * (1 - 1e-9) or sizes.max() > span[1] * (1 + 1e-9):
        raise Extrapolation(
            f"{sizes.min():.3g} to {sizes.max():.3g} is not within the {what}, {span[0]:.3g} to {span[1]:.3g}"
        )
