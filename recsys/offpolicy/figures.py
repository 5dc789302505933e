"""Figures of an evaluation, each with one message."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recsys.results import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"trust": "#1b6ca8", "widen": "#d98e04", "do not use": "#a83232"}


def draw_estimates(frame: pd.DataFrame, logged: float, path: Path, title: str) -> None:
    """The estimate of every candidate with its interval, coloured by verdict; diamonds are the truth, where known.

    `frame` holds one estimator's rows of `study_frame`. What was refused has no estimate and says so.
    """
    from matplotlib.figure import Figure

    frame = frame.sort_values("truth" if frame["truth"].notna().all() else "value", na_position="first")
    figure = Figure(figsize=(7.2, 1.7 + 0.3 * len(frame)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(frame))
    axes.axvline(logged, color="0.6", linewidth=1, linestyle="--", zorder=0, label="mean reward of the log")
    for verdict, colour in _COLOURS.items():
        rows = (frame["verdict"] == verdict).to_numpy()
        if not rows.any():
            continue
        value, low, high = (frame[name].to_numpy()[rows] for name in ("value", "low", "high"))
        if verdict == "do not use":
            for row in place[rows]:
                axes.annotate("refused", (logged, row), (4, 0), textcoords="offset points", color=colour, va="center")
            continue
        axes.hlines(place[rows], low, high, color=colour, linewidth=2, alpha=0.6)
        axes.plot(value, place[rows], "o", color=colour, markersize=5, label=f"estimate ({verdict})")
    if frame["truth"].notna().any():
        axes.plot(frame["truth"], place, "D", color="black", markersize=4, markerfacecolor="none", label="truth")
    axes.set_yticks(place, frame["candidate"])
    axes.set(xlabel="mean reward of a request", ylim=(-0.7, len(frame) - 0.3))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    _finish(figure, axes, path, title)


def draw_weights(study: dict[str, Any], edges: np.ndarray, path: Path, title: str) -> None:
    """Share of requests by the weight of what was shown, both axes logarithmic.

    Where a curve reaches far to the right, few requests decide the estimate.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    names = [candidate["candidate"] for candidate in study["candidates"]]
    colours = _palette(len(names))
    reached = np.flatnonzero(np.sum([candidate["weights"] for candidate in study["candidates"]], axis=0))
    bins = slice(reached[0], reached[-1] + 1)
    edges = edges[reached[0] : reached[-1] + 2]
    for candidate, colour in zip(study["candidates"], colours, strict=True):
        counts = np.array(candidate["weights"], dtype=float)[bins]
        axes.stairs(counts / counts.sum(), 10.0**edges, color=colour, linewidth=1.4, label=candidate["candidate"])
    axes.axvline(1, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="weight (target over logging probability)", ylabel="share of requests")
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    _finish(figure, axes, path, title)


def draw_risk_return(ranking: pd.DataFrame, logged: float, path: Path, title: str) -> None:
    """What each candidate promises above the logging policy, against how unsure that is.

    Above the line the interval lies above the log's mean reward. `ranking` is a `ranking_frame`, of which only what has
    an interval is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    frame = ranking.dropna(subset=["low"])
    risk = ((frame["high"] - frame["low"]) / 2).to_numpy()
    gain = (frame["value"] - logged).to_numpy()
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    reach = (
        np.array([0.97 * risk.min(initial=np.inf), 1.03 * risk.max(initial=0.0)]) if len(risk) else np.array([0.0, 1.0])
    )
    top = 1.15 * max(gain.max(initial=0.0), reach[1])
    axes.fill_between(reach, reach, top, color="#1b6ca8", alpha=0.08, linewidth=0)
    axes.plot(reach, reach, color="#1b6ca8", linewidth=1, label="above: the whole interval is above the log")
    axes.axhline(0, color="0.6", linewidth=1, linestyle="--", zorder=0)
    for verdict, colour in _COLOURS.items():
        rows = (frame["verdict"] == verdict).to_numpy()
        axes.plot(risk[rows], gain[rows], "o", color=colour, markersize=5)
    for number, (x, y) in enumerate(zip(risk, gain, strict=True), 1):
        axes.annotate(str(number), (x, y), (4, 3), textcoords="offset points", fontsize=8)
    key = "\n".join(f"{number} {name}" for number, name in enumerate(frame["candidate"], 1))
    axes.text(1.02, 1.0, key, transform=axes.transAxes, fontsize=7, va="top")
    axes.set(xlabel="half width of the interval", ylabel="estimate minus mean reward of the log", xlim=reach)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    _finish(figure, axes, path, title)


def _palette(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.92, count)]


def _finish(figure: "Figure", axes: "Axes", path: Path, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix[1:] or "png")
