"""Figures of what a probe measured. None shows a cosine without its chance level."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys.results import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "0.2", "#3b6ea8", "#d9822b", "#4f8f5b", "0.55"


def draw_cosines(probes: pa.Table, path: Path, label: str = "best") -> None:
    """A panel per unit: the distribution of the cosine between query and output, and its three chance levels."""
    rows = _whole(probes)
    rows = rows[(rows["label"] == label) & (rows["query"] == "stream") & (rows["site"] == "output")]
    bins = rows[rows["measure"] == "cos_histogram"]
    ratios = rows[rows["measure"] == "alignment_ratio"].set_index("unit")
    units = list(dict.fromkeys(bins["unit"]))

    def draw(figure: "Figure") -> None:
        for axis, unit in zip(_panels(figure, len(units)), units, strict=True):
            found = _coarser(bins[bins["unit"] == unit].sort_values("bin"))
            width = 2 / len(found)
            edges = found["bin"].to_numpy() + width / 2
            axis.fill_between(edges, found["value"] / width, step="mid", color=_BLUE, alpha=0.35, linewidth=0)
            axis.step(edges, found["value"] / width, where="mid", color=_BLUE, linewidth=1, label="pairs as they are")
            for column, color, style, name in (
                ("null_shuffled", _ORANGE, "-", "other users' queries"),
                ("null_covariance", _GREEN, "--", "Gaussian, same covariances"),
                ("null_isotropic", _GREY, ":", "uniform directions"),
            ):
                axis.plot(edges, found[column].astype(float) / width, color=color, linestyle=style, label=name)
            ratio = ratios.loc[unit]
            axis.set_title(
                f"{unit}  {ratio['direction']}\n"
                f"alignment ratio {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                fontsize=9,
            )
            shown = found[found[["value", "null_shuffled", "null_isotropic"]].max(axis=1) > 1e-4]["bin"]
            axis.set(xlabel="cos(query, output)", xlim=(shown.min(), shown.max() + width), ylim=(0, None))
        figure.axes[0].set_ylabel("density")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)

    _save(draw, path, (3.6 * max(len(units), 1) + 0.6, 3.4))


def _coarser(histogram: pd.DataFrame, most: int = 50) -> pd.DataFrame:
    """Neighbouring bins put together, so that no more than `most` are left: finer ones show noise."""
    step = next(
        step for step in range(1, len(histogram) + 1) if len(histogram) % step == 0 and len(histogram) <= most * step
    )
    columns = ["value", "null_isotropic", "null_shuffled", "null_covariance"]
    sums = histogram[columns].astype(float).groupby(np.arange(len(histogram)) // step).sum()
    return sums.assign(bin=histogram["bin"].to_numpy()[::step])


def draw_trajectory(probes: pa.Table, path: Path) -> None:
    """The alignment ratio of every unit (rows) at every epoch (columns); white is 1, chance."""
    rows = _whole(probes)
    rows = rows[(rows["measure"] == "alignment_ratio") & (rows["query"] == "stream") & (rows["site"] == "output")]
    moments = rows.sort_values("epoch", kind="stable").drop_duplicates(["step", "unit"], keep="last")
    table = moments.pivot(index="unit", columns="step", values="value")
    epochs = moments.drop_duplicates("step", keep="last").set_index("step")["epoch"]
    best = rows[rows["label"] == "best"]["step"]
    per_epoch = int(epochs.index[-1]) / max(int(epochs.iloc[-1]), 1)

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import TwoSlopeNorm

        axis = figure.subplots()
        values = np.log2(table.to_numpy(float))
        reach = max(float(np.nanmax(np.abs(values))), 0.25)
        image = axis.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -reach, reach), aspect="auto")
        for row, column in np.ndindex(values.shape):
            dark = abs(values[row, column]) > 0.6 * reach
            text = "–" if np.isnan(values[row, column]) else f"{2 ** values[row, column]:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else _INK)
        names = [_moment(int(step), int(epochs[step]), per_epoch) for step in table.columns]
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(table)), table.index)
        axis.set_xlabel("epoch")
        for column, step in enumerate(table.columns):
            if len(best) and step == best.iloc[0]:
                axis.annotate("best", (column, -0.5), ha="center", va="bottom", fontsize=7, annotation_clip=False)
        bar = figure.colorbar(image)
        bar.set_label("alignment ratio (1: chance)", fontsize=8)
        ticks = np.linspace(-reach, reach, 5)
        bar.set_ticks(ticks.tolist(), labels=[f"{2**tick:.2f}" for tick in ticks])

    _save(draw, path, (2.8 + 0.55 * table.shape[1], 1.6 + 0.45 * len(table)))


def _moment(step: int, epoch: int, per_epoch: float) -> str:
    """An epoch by its number where it ends there; else the step."""
    if step == 0:
        return "start"
    return f"{epoch}" if step == round(epoch * per_epoch) else f"step\n{step}"


def draw_energy(probes: pa.Table, path: Path, label: str = "best") -> None:
    """Per unit and head: the share of the output's energy along its query and orthogonal to it, beside chance."""
    rows = probes.to_pandas()
    wanted = (rows["label"] == label) & (rows["position"] == "all") & (rows["query"] == "stream")
    rows = rows[wanted & (rows["measure"] == "parallel_energy") & (rows["site"] == "output") & (rows["head"] != "bias")]
    rows = rows.drop_duplicates(["unit", "head"])
    units = list(dict.fromkeys(rows["unit"]))

    def draw(figure: "Figure") -> None:
        for axis, unit in zip(_panels(figure, len(units)), units, strict=True):
            found = rows[rows["unit"] == unit]
            place = np.arange(len(found))
            parallel = found["value"].to_numpy(float)
            axis.bar(place, parallel, color=_ORANGE, width=0.7, label="along the query")
            axis.bar(place, 1 - parallel, bottom=parallel, color=_BLUE, alpha=0.45, width=0.7, label="orthogonal to it")
            reach = np.abs(found[["low", "high"]].to_numpy(float).T - parallel)
            axis.errorbar(place, parallel, yerr=reach, fmt="none", color=_INK, capsize=2, linewidth=0.9)
            for x, null in zip(place, found["null_shuffled"], strict=True):
                axis.hlines(
                    null, x - 0.42, x + 0.42, color=_INK, linewidth=1.2, label="_" if x else "other users' queries"
                )
            chance = float(found["null_isotropic"].iloc[0])
            axis.axhline(chance, color=_INK, linestyle=":", linewidth=0.9, label="uniform directions, 1/d")
            axis.set_xticks(place, ["whole" if head == "all" else f"head {head}" for head in found["head"]])
            axis.set_title(f"{unit}  {found['direction'].iloc[0]}", fontsize=9)
            axis.set_ylim(0, 1)
        figure.axes[0].set_ylabel("share of the output's energy")
        figure.axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))

    _save(draw, path, (2.6 * max(len(units), 1) + 2.2, 3.0))


def draw_interventions(interventions: pa.Table, path: Path) -> None:
    """What the metric loses under each intervention in all units (left), beside the energy it changes (right)."""
    rows = interventions.to_pandas()
    group = rows["key"].str.split("/").str[1]
    rows = rows[(rows["unit"] == "all") & ((group == "macro") | ~(group == "macro").any())]
    rows = rows.drop_duplicates("intervention").iloc[::-1]

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.3])
        place = np.arange(len(rows))
        difference = rows["difference"].to_numpy(float)
        reach = np.stack([difference - rows["low"], rows["high"] - difference])
        sure = (rows["low"] > 0) | (rows["high"] < 0)
        colors = [_BLUE if certain else "0.75" for certain in sure]
        left.barh(place, difference, color=colors, height=0.65)
        left.errorbar(difference, place, xerr=reach, fmt="none", color=_INK, capsize=2, linewidth=0.9)
        left.axvline(0, color=_INK, linewidth=0.8)
        left.set_yticks(place, rows["intervention"])
        key, trained = rows["key"].iloc[0], rows["trained"].iloc[0]
        left.set_xlabel(f"change of {key} (as trained: {trained:.4f})", fontsize=8)
        right.barh(place, rows["energy"], color=_ORANGE, height=0.65)
        for y, energy in zip(place, rows["energy"], strict=True):
            right.annotate(f" {energy:.2f}", (energy, y), va="center", fontsize=7)
        right.set_xlim(0, 1.2 * float(rows["energy"].max()))
        right.set_xlabel("energy changed, Σ|ΔG|²/Σ|G|²", fontsize=8)
        right.tick_params(left=False)

    _save(draw, path, (8.4, 0.9 + 0.27 * len(rows)))


def draw_correlation(points: pd.DataFrame, path: Path, metric: str, pooled: str, within: str) -> None:
    """Every run's log alignment ratio against its metric, raw and both less their cell's mean; `pooled` and `within`
    are the two correlations in words, which stand above them.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(1, 2)
        groups = list(dict.fromkeys(points["dataset"]))
        for axis, suffix, title in zip(axes, ("", "_within"), (pooled, within), strict=True):
            for number, group in enumerate(groups):
                chosen = points[points["dataset"] == group]
                color = (_BLUE, _ORANGE, _GREEN, _GREY)[number % 4]
                axis.scatter(
                    chosen[f"log_ratio{suffix}"], chosen[f"value{suffix}"], s=18, color=color, alpha=0.8, label=group
                )
            x, y = points[f"log_ratio{suffix}"].to_numpy(float), points[f"value{suffix}"].to_numpy(float)
            if len(x) > 2 and np.ptp(x) > 0:
                slope, start = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, start + slope * ends, color=_INK, linewidth=1)
            axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.set_title(title, fontsize=9)
        axes[0].set(xlabel="log alignment ratio (0 is chance)", ylabel=metric)
        axes[1].set(xlabel="log alignment ratio less its cell's mean", ylabel=f"{metric} less its cell's mean")
        if len(groups) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)

    _save(draw, path, (8.4, 3.6))


def _whole(probes: pa.Table) -> pd.DataFrame:
    """The rows of whole units."""
    rows = probes.to_pandas()
    return rows[(rows["head"] == "all") & (rows["position"] == "all")].drop_duplicates(
        ["label", "step", "epoch", "unit", "site", "query", "measure", "bin"]
    )


def _panels(figure: "Figure", count: int) -> list["Axes"]:
    return list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _save(draw: Callable[["Figure"], None], path: Path, size: tuple[float, float]) -> None:
    """PNG, PDF or whatever else the suffix names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    kind = path.suffix[1:]
    extra: dict[str, Any] = {"metadata": {"Software": None}} if kind == "png" else {}
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=160, format=kind, **extra)
