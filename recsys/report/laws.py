"""Laws and their comparisons as tables and figures."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy import ndarray

from recsys.scaling.compare import Extrapolation, LawComparison, ratio_curve
from recsys.scaling.findings import ArmLaw, Findings
from recsys.scaling.isoflop import Parabola
from recsys.scaling.ladder import Estimate, Fitted, f_test
from recsys.scaling.pooling import Pooled
from recsys.scaling.records import AXES
from recsys.scaling.surface import Surface

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8661c1", "#e08e0b", "#555555", "#00868b", "#a0522d")
"""One per arm, in the order of the table."""

NAMES = {"cross_entropy": "validation cross-entropy", "ndcg@10": "1 − NDCG@10", "hr@10": "1 − HR@10"}


def laws_frame(findings: Findings) -> pd.DataFrame:
    """One row per law as text: floor, term at the reference size and exponent with 95 % profile-F intervals.

    A parameter that lies at a bound is one that the sizes do not determine. The last column is the signed error of the
    law at the largest size when it is fitted without it.
    """
    return pd.DataFrame([_law_row(one) for one in findings.laws])


def search_frame(findings: Findings) -> pd.DataFrame:
    """One row per law as text: whether its minimum can be believed."""
    return pd.DataFrame(
        ({"study": one.study} if one.study else {})
        | {
            "axis": one.axis,
            "arm": one.arm.name,
            "RSS": f"{one.law.rss:.3g}",
            "starts that agree": f"{one.law.search.agreeing} of {one.law.search.starts}",
            "gradient": f"{one.law.search.gradient:.0e}",
            "at a bound": ", ".join(one.law.search.at_bounds) or "–",
        }
        for one in findings.laws
    )


def _law_row(one: ArmLaw) -> dict[str, str]:
    law, known = one.law, one.confidence
    sizes, _ = one.arm.means
    floor, term = law.at_reference.tolist()
    shape = float(law.shape[0])
    study = {"study": one.study} if one.study else {}
    return study | {
        "axis": one.axis,
        "arm": one.arm.name,
        "sizes": f"{len(sizes)} ({_size(sizes[0])} to {_size(sizes[-1])})",
        "E": _with_interval(floor, None if known is None else known.parameter("E")),
        "A N^-a": f"{_with_interval(term, None if known is None else known.parameter('A'))}"
        f" at {_size(float(law.reference[0]))}",
        "a": _with_interval(shape, None if known is None else known.parameter("a")),
        "at a bound": ", ".join(law.search.at_bounds) or "–",
        "held out": "–" if one.hold_out is None else f"{100 * one.hold_out.error:+.2f} %",
    }


def ladder_frame(findings: Findings) -> pd.DataFrame:
    """The four models of each comparison, each tested against the one before."""
    rows = []
    for (study, axis), comparison in findings.comparisons.items():
        before: Fitted | None = None
        for rung, fitted in comparison.ladder.fitted().items():
            test = None if before is None or fitted.freedom < 1 else f_test(before, fitted)
            rows.append(
                ({"study": study} if study else {})
                | {
                    "axis": axis,
                    "model": rung.replace("_", " "),
                    "parameters": str(fitted.parameters),
                    "RSS": f"{fitted.rss:.3g}",
                    "AICc": f"{fitted.aicc:.1f}" if np.isfinite(fitted.aicc) else "–",
                    "F": "–" if test is None else f"{test.statistic:.2f} ({test.freedom[0]}, {test.freedom[1]})",
                    "p": "–" if test is None else f"{test.p:.2g}",
                }
            )
            before = fitted
    return pd.DataFrame(rows)


def ratio_frame(findings: Findings) -> pd.DataFrame:
    """rho and the difference of exponents per study and axis, and where the spread comes from."""
    rows = []
    for (study, axis), one in findings.comparisons.items():
        variances = one.variances
        rows.append(
            ({"study": study} if study else {})
            | {
                "axis": axis,
                "rho [95 %]": estimate_text(one.rho),
                "difference of exponents": estimate_text(one.exponent_difference),
                "sizes : seeds": "–" if variances is None else f"{variances.ratio:.2g}",
                "baseline": f"{_size(one.overlap[0])} to {_size(one.overlap[1])}",
            }
        )
    return pd.DataFrame(rows)


def estimate_text(estimate: Estimate) -> str:
    high = f"{estimate.high:.3g}" if np.isfinite(estimate.high) else "∞"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {high}]"


def records(findings: Findings) -> dict[str, Any]:
    """All of it as plain values, for a file."""
    return {
        "response": findings.response,
        "laws": [
            {
                "study": one.study,
                "axis": one.axis,
                "arm": one.arm.name,
                "sizes": one.arm.means[0].tolist(),
                "means": one.arm.means[1].tolist(),
                "formula": one.law.form.formula,
                "parameters": one.law.parameters,
                "intervals": None
                if one.confidence is None
                else {name: list(one.confidence.parameter(name)) for name in ("E", "A", "a")},
                "reference": float(one.law.reference[0]),
                "rss": one.law.rss,
                "starts": one.law.search.starts,
                "agreeing": one.law.search.agreeing,
                "gradient": one.law.search.gradient,
                "at_bounds": list(one.law.search.at_bounds),
                "hold_out_error": None if one.hold_out is None else one.hold_out.error,
            }
            for one in findings.laws
        ],
        "comparisons": [
            {
                "study": study,
                "axis": axis,
                "baseline": one.baseline.name,
                "challenger": one.challenger.name,
                "rho": _numbers(one.rho),
                "exponent_difference": _numbers(one.exponent_difference),
                "p_ratio": one.ratio_test.p,
                "p_shape": one.shape_test.p,
                "overlap": list(one.overlap),
                "ladder": {
                    rung: {"parameters": fitted.parameters, "rss": fitted.rss, "aicc": _finite(fitted.aicc)}
                    for rung, fitted in one.ladder.fitted().items()
                },
            }
            for (study, axis), one in findings.comparisons.items()
        ],
        "pooled": {
            axis: _numbers(one.ratio) | {"tau": one.tau, "heterogeneity": one.heterogeneity}
            for axis, one in findings.pooled.items()
        },
        "refusals": findings.refusals,
        "conclusion": findings.sentences(),
    }


def surfaces_frame(surfaces: Sequence[Surface]) -> pd.DataFrame:
    """One row per law in parameters and data as text; the terms are those at the geometric mean of the points."""
    rows = []
    for one in surfaces:
        law, known = one.law, one.confidence
        terms = dict(zip(law.form.coefficients, law.at_reference.tolist(), strict=True))
        shapes = dict(zip((one.name for one in law.form.ranges), law.shape.tolist(), strict=True))
        rows.append(
            {"axis": one.axis, "arm": one.arm, "law": law.form.formula, "points": str(len(one.y))}
            | {
                name: _with_interval(value, None if known is None else known.parameter(name))
                for name, value in (terms | shapes).items()
            }
            | {"at": f"N {_size(law.reference[0])}, D {_size(law.reference[1])}", "RSS": f"{law.rss:.3g}"}
            | {"at a bound": ", ".join(law.search.at_bounds) or "–"}
        )
    return pd.DataFrame(rows)


def surface_records(surfaces: Sequence[Surface]) -> list[dict[str, Any]]:
    """All of it as plain values, for a file."""
    return [
        {
            "axis": one.axis,
            "arm": one.arm,
            "formula": one.law.form.formula,
            "points": {name: column.tolist() for name, column in zip(one.law.form.axes, one.x.T, strict=True)}
            | {"response": one.y.tolist()},
            "parameters": one.law.parameters,
            "reference": one.law.reference.tolist(),
            "at_reference": one.law.at_reference.tolist(),
            "rss": one.law.rss,
            "starts": one.law.search.starts,
            "agreeing": one.law.search.agreeing,
            "gradient": one.law.search.gradient,
            "at_bounds": list(one.law.search.at_bounds),
        }
        for one in surfaces
    ]


def surface_figure(surface: Surface, response: str) -> Figure:
    """The response over the parameters, a curve of the law for each amount of data."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    levels, level_of = np.unique(surface.x[:, 1:], axis=0, return_inverse=True)
    for index in range(len(levels)):
        at = level_of.flatten() == index
        colour = str(0.75 - 0.65 * index / max(1, len(levels) - 1))
        n = np.geomspace(surface.x[at, 0].min(), surface.x[at, 0].max(), 60)
        grid = np.column_stack([n, np.tile(levels[index], (len(n), 1))])
        axes.plot(n, surface.law.predict(grid), color=colour, linewidth=1.3)
        axes.scatter(surface.x[at, 0], surface.y[at], s=22, color=colour, zorder=3, label=_size(levels[index, 0]))
    axes.set(xscale="log", xlabel=surface.axis, ylabel=NAMES[response], title=surface.arm)
    axes.legend(frameon=False, fontsize=8, title="training targets", title_fontsize=8)
    _plain(axes)
    return figure


def isoflop_figure(parabolas: Sequence[Parabola], axis: str, arm: str, response: str) -> Figure:
    """A parabola per budget over the sizes around its lowest point, marked; hollow where that was not run around."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, one in zip(COLOURS * len(parabolas), parabolas, strict=False):
        sizes = one.size * np.geomspace(0.2, 5, 60)
        axes.plot(sizes, one.predict(sizes), color=colour, linewidth=1.3, label=_size(one.budget))
        axes.scatter(one.size, one.loss, s=34, color=colour if one.inside else "none", edgecolors=colour, zorder=3)
    axes.set(xscale="log", xlabel=axis, ylabel=NAMES[response], title=arm)
    axes.legend(frameon=False, fontsize=8, title="training FLOPs", title_fontsize=8)
    _plain(axes)
    return figure


def figures(findings: Findings) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything there is to draw: laws, rho over the loss, and the forest of datasets."""
    for study in dict.fromkeys(one.study for one in findings.laws):
        for axis in AXES:
            laws = [one for one in findings.laws if one.study == study and one.axis == axis]
            if laws:
                yield _name("laws", study, axis), laws_figure(laws, findings.response)
    for (study, axis), comparison in findings.comparisons.items():
        try:
            yield _name("rho", study, axis), ratio_figure(comparison, findings.response)
        except Extrapolation:
            continue
    for axis, pooled in findings.pooled.items():
        yield _name("forest", "", axis), forest_figure(pooled, axis)


def _name(kind: str, study: str, axis: str) -> str:
    return "-".join(part for part in (kind, study, axis.replace(" ", "_").lower()) if part)


def laws_figure(laws: Sequence[ArmLaw], response: str) -> Figure:
    """Runs as dots, their size means as rings, the law with its band, and the prediction of the largest size."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, one in zip(COLOURS * len(laws), laws, strict=False):
        sizes, means = one.arm.means
        grid = np.geomspace(sizes[0], sizes[-1], 80)
        axes.plot(grid, one.law.predict(grid[:, None]), color=colour, linewidth=1.4, label=one.arm.name)
        if one.confidence is not None:
            low, high = one.confidence.band(grid[:, None])
            axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.scatter(one.arm.sizes, one.arm.values, s=9, color=colour, alpha=0.7, linewidths=0, zorder=3)
        axes.scatter(sizes, means, s=42, facecolors="none", edgecolors=colour, linewidths=1.1, zorder=3)
        if one.hold_out is not None:
            axes.scatter(one.hold_out.size, one.hold_out.predicted, s=40, marker="x", color=colour, linewidths=1.1)
    values = np.concatenate([one.arm.values for one in laws])
    margin = 0.25 * (values.max() - values.min()) or 1.0
    axes.set(
        xscale="log", xlabel=laws[0].axis, ylabel=NAMES[response], ylim=(values.min() - margin, values.max() + margin)
    )
    axes.legend(frameon=False, fontsize=8, title="dot: run, ring: mean, ×: predicted from smaller", title_fontsize=7)
    _plain(axes)
    return figure


def ratio_figure(comparison: LawComparison, response: str) -> Figure:
    """Baseline's size over the challenger's at equal loss, where both laws are interpolated."""
    curve = ratio_curve(comparison)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.plot(curve.losses, curve.ratio, color=COLOURS[0], linewidth=1.5, label="laws that share nothing")
    high = np.minimum(curve.high, 1e6)  # beyond the axis, also where there is no upper end
    axes.fill_between(curve.losses, curve.low, high, color=COLOURS[0], alpha=0.14, linewidth=0)
    rho = comparison.rho
    axes.axhline(rho.value, color=COLOURS[1], linewidth=1, linestyle="--", label=f"one ratio: {estimate_text(rho)}")
    axes.set(
        xlabel=f"{NAMES[response]} (better to the right)",
        ylabel=f"{comparison.axis} of {comparison.baseline.name}\nfor one of {comparison.challenger.name}",
        yscale="log",
        ylim=_span(np.concatenate([curve.ratio, [rho.value, rho.low, rho.high]])),
    )
    _ratio_ticks(axes.yaxis)
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def forest_figure(pooled: Pooled, axis: str) -> Figure:
    """rho of each dataset and of a further one of the kind."""
    rows = [(row.name or "study", row.ratio, f"{row.weight:.0%}") for row in pooled.rows]
    rows.append(("all", pooled.ratio, ""))
    figure = Figure(figsize=(6.4, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, ratio, weight) in enumerate(reversed(rows)):
        colour = COLOURS[1] if name == "all" else "0.2"
        high = min(ratio.high, 1e3)
        axes.plot([max(ratio.low, 1e-3), high], [place, place], color=colour, linewidth=1.4)
        axes.plot(ratio.value, place, "D" if name == "all" else "s", color=colour, markersize=5)
        axes.annotate(
            f"{estimate_text(ratio)}  {weight}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    ends = _span(np.array([bound for _, ratio, _ in rows for bound in (ratio.low, ratio.high)]))
    axes.set(xscale="log", xlabel=f"rho ({axis})", xlim=ends, yticks=range(len(rows)), ylim=(-0.6, len(rows) - 0.4))
    _ratio_ticks(axes.xaxis)
    axes.set_yticklabels([name for name, _, _ in reversed(rows)])
    _plain(axes)
    return figure


def _span(values: ndarray) -> tuple[float, float]:
    """Ends of an axis of ratios: around 1, as far as the values go but no further than a factor of 100."""
    logs = np.abs(np.log(values[np.isfinite(values) & (values > 0)]))
    furthest = float(np.clip(1.2 * logs.max(), 0.4, np.log(100)))
    return float(np.exp(-furthest)), float(np.exp(furthest))


def _ratio_ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    wide = high / low > 30
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if wide else (0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.4g}" if interval is None else f"{value:.4g} [{interval[0]:.4g}, {interval[1]:.4g}]"


def _size(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 1e15 else f"{value:.2e}"
    return f"{value:.3g}"


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "low": estimate.low, "high": _finite(estimate.high), "level": estimate.level}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
