"""A scaling study as one report: what it says, and everything that is needed to doubt it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from recsys.loading import parse_yaml
from recsys.report.laws import COLOURS, figures, ladder_frame, laws_figure, laws_frame, ratio_frame, search_frame
from recsys.report.probes import alignment_frame, contribution_frame
from recsys.report.tables import caveats, results_frame
from recsys.results import RunDirectory, load
from recsys.scaling.findings import Findings
from recsys.scaling.records import PARAMETERS, exclusions

_CLASSES = PARAMETERS[: PARAMETERS.index("trainable")]

_TEXT = {"study": str, "arm": str, "size": str}


@dataclass
class Section:
    """A part of a report; whatever form it is written in, it is this."""

    title: str
    text: list[str] = field(default_factory=list)
    """Paragraphs."""
    tables: list[tuple[str, pd.DataFrame]] = field(default_factory=list)
    """Name and cells, as text."""
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    listings: list[tuple[str, str]] = field(default_factory=list)
    """Name and text, shown when asked for."""

    @property
    def empty(self) -> bool:
        return not (self.text or self.tables or self.figures or self.listings)


def study_report(
    directories: Sequence[Path], table: pd.DataFrame, findings: Sequence[Findings]
) -> tuple[str, list[Section]]:
    """Title and sections. The first of `findings` is of the response that the study is judged by.

    What lies only in run directories (intervals over users, probes, configs, versions) is left out where they are not
    there any more, as beside a table that was kept alone.
    """
    place = {name: index for index, name in enumerate(table["run"])}
    runs = sorted((RunDirectory(path) for path in _run_paths(directories, table)), key=lambda run: place[run.path.name])
    trials = _trials(directories)
    primary, *secondary = findings
    sections = [
        _conclusion(primary, table),
        _results(table, runs),
        _laws(primary),
        *(_secondary(one) for one in secondary),
        Section(
            "Matching",
            ["Relative to the arm of the same size that it is a control of; the axis that was matched is named."],
            [("matching", matching_frame(table))],
        ),
        _learning_rates(table, trials),
        _probes(runs),
        _data(runs),
        Section("Left out", exclusions(table) or ["Nothing: every run of the plan is done."]),
        _origins(directories, runs),
    ]
    return ", ".join(path.name for path in directories), [section for section in sections if not section.empty]


def _run_paths(directories: Sequence[Path], table: pd.DataFrame) -> Iterator[Path]:
    names = set(table.loc[table["state"] == "done", "run"].dropna())
    for directory in directories:
        for path in (*directory.glob("runs/*"), *directory.glob("*"), directory):
            if path.name in names and (path / "final.json").is_file():
                yield path


def _trials(directories: Sequence[Path]) -> pd.DataFrame:
    found = [pd.read_csv(path, dtype=_TEXT) for folder in directories for path in folder.glob("trials.csv")]
    found = [frame.assign(study=frame["study"].fillna("")) for frame in found if not frame.empty]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _conclusion(findings: Findings, table: pd.DataFrame) -> Section:
    counts = ", ".join(f"{count} {state}" for state, count in table["state"].value_counts(sort=False).items())
    section = Section("What it says", findings.sentences() + [f"Not said: {reason}" for reason in findings.refusals])
    if not findings.comparisons and not findings.refusals:
        section.text.append("No two arms were compared (--compare A B).")
    section.text.append(
        f"Runs: {counts}. The response is the full-softmax cross-entropy on validation, mean over domains. Laws go "
        "through the means of each size over its seeds; intervals are 95 % profile-F intervals; p-values are corrected "
        "over all comparisons (Holm)."
    )
    return section


def _results(table: pd.DataFrame, runs: Sequence[RunDirectory]) -> Section:
    section = Section("Results", tables=[("means", means_frame(table))])
    if runs:
        values = load(runs)
        section.tables.append(("runs", results_frame(values, ["ndcg@10", "hr@10"], "full")))
        section.text.append(
            "Means over seeds (± standard deviation between them), then every run with its 95 % bootstrap interval "
            "over test users."
        )
    return section


def means_frame(table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and size as text: mean over seeds, and the standard deviation between them."""
    rows = []
    done = table[table["state"] == "done"]
    for (study, size, arm), runs in done.groupby(["study", "size", "arm"], sort=False):
        row = ({"study": str(study)} if study else {}) | {"size": str(size), "arm": str(arm), "seeds": str(len(runs))}
        for column, label in (
            ("cross_entropy", "cross-entropy (validation)"),
            ("ndcg@10", "NDCG@10 (validation)"),
            ("test_ndcg@10", "NDCG@10 (test)"),
            ("test_hr@10", "HR@10 (test)"),
        ):
            values = runs[column].astype(float).dropna()
            spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
            row[label] = f"{values.mean():.4f}{spread}" if len(values) else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def matching_frame(table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and size as text: parameters by class, the gap of a control, FLOPs."""
    rows = []
    for (study, size), cells in table.groupby(["study", "size"], sort=False):
        least = cells["training_flops"].min()
        for arm, runs in cells.groupby("arm", sort=False):
            first = runs.iloc[0]
            gap = "–" if pd.isna(first["gap"]) else f"{float(first['gap']):+.3%} {first['matched_on']}"
            row = ({"study": str(study)} if study else {}) | {"size": str(size), "arm": str(arm), "gap": gap}
            row |= {
                name.replace("_", " "): "–" if pd.isna(first[name]) else f"{int(first[name]):,}" for name in _CLASSES
            }
            flops = runs["training_flops"].mean()
            row["training FLOPs"] = "–" if pd.isna(flops) else f"{flops:.3g} ({flops / least:.2f}×)"
            rows.append(row)
    return pd.DataFrame(rows)


def _laws(findings: Findings) -> Section:
    frames = {
        "laws": laws_frame(findings),
        "searches": search_frame(findings),
        "ladder": ladder_frame(findings),
        "rho": ratio_frame(findings),
    }
    section = Section("Laws", tables=[(name, frame) for name, frame in frames.items() if not frame.empty])
    section.figures = list(figures(findings))
    if section.tables:
        section.text.append(
            "L(N) = E + A N^-a by variable projection, A N^-a given at the geometric mean of the sizes. A parameter at "
            "a bound is one that these sizes do not determine. Held out: the signed error of the law at the largest "
            "size when it is fitted without it."
        )
    return section


def _secondary(findings: Findings) -> Section:
    """Its laws are drawn on the first axis only."""
    name = findings.response
    section = Section(f"Laws of 1 − {name.upper()} (secondary)", findings.sentences())
    section.text += [f"Not said: {reason}" for reason in findings.refusals]
    frame = laws_frame(findings)
    if not frame.empty:
        section.tables.append((f"laws-{name}", frame))
    for study in dict.fromkeys(one.study for one in findings.laws):
        laws = [one for one in findings.laws if one.study == study and one.axis == findings.laws[0].axis]
        section.figures.append((f"laws-{name}-{study}".rstrip("-"), laws_figure(laws, name)))
    return section


def _learning_rates(table: pd.DataFrame, trials: pd.DataFrame) -> Section:
    if trials.empty:
        rates = sorted(table["learning_rate"].dropna().unique())
        said = ", ".join(f"{rate:g}" for rate in rates)
        return Section(
            "Learning rates", [f"Not tuned: all runs have {said}. Then a size may be off its best for one arm."]
        )
    counts = trials.groupby(["study", "arm", "size"]).size()
    text = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else str(counts.min())
    return Section(
        "Learning rates",
        [f"{text} trials for each arm at each size, with a seed of their own; the ring is what the runs had."],
        figures=[(f"bowls-{study}".rstrip("-"), bowls_figure(part, table)) for study, part in trials.groupby("study")],
    )


def bowls_figure(trials: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Loss over learning rate, a panel per size and a line per arm."""
    sizes, arms = list(dict.fromkeys(trials["size"])), list(dict.fromkeys(trials["arm"]))
    figure = Figure(figsize=(2.4 * len(sizes) + 0.8, 2.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for colour, arm in zip(COLOURS * len(arms), arms, strict=False):
            bowl = trials[(trials["size"] == size) & (trials["arm"] == arm)].sort_values("learning_rate")
            axes.plot(bowl["learning_rate"], bowl["cross_entropy"], "o-", color=colour, markersize=3, label=arm)
            chosen = table[(table["size"] == size) & (table["arm"] == arm) & (table["state"] == "done")]
            if not chosen.empty and not bowl.empty:
                best = bowl["cross_entropy"].min()
                axes.plot(chosen["learning_rate"].iloc[0], best, "o", color=colour, markersize=9, fillstyle="none")
        axes.set(xscale="log", title=size, xlabel="learning rate")
        axes.xaxis.set_minor_formatter(NullFormatter())  # under a decade, matplotlib would name every line
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation cross-entropy")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _probes(runs: Sequence[RunDirectory]) -> Section:
    """What `recsys probe` shows of a run, of all that are probed."""
    probed = [(run.path.name, run.read_probes()) for run in runs if run.probes.exists()]
    if not probed:
        return Section("Probes")
    tables = [
        (name, pd.concat([make(probes).assign(run=run) for run, probes in probed], ignore_index=True))
        for name, make in (("alignment", alignment_frame), ("contribution", contribution_frame))
    ]
    return Section(
        "Probes",
        [
            "An alignment ratio of 1 is chance; isotropic, covariance and at start are the same ratio by other "
            "chances. Novelty and share stand beside their excess over other users' queries. Intervals are over "
            "users; all other measures stand in each run's probes.parquet."
        ],
        [(name, frame[["run", *(column for column in frame if column != "run")]]) for name, frame in tables],
    )


def _data(runs: Sequence[RunDirectory]) -> Section:
    section = Section("Data")
    rows: list[dict[str, str]] = []
    for run in runs:
        final = run.read_final()
        config = parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config))["data"]
        mark = final["data"]["fingerprint"][:12]
        if any(row["fingerprint"] == mark for row in rows):
            continue
        source = config["source"]
        split = final["data"]["split"]
        rows.append(
            {
                "data": source.get("dataset", source["name"]),
                "fingerprint": mark,
                "domains": ", ".join(final["data"]["domains"]),
                "split": split["name"],
                "items": ", ".join(f"{its['candidates']:,}" for its in final["counts"].values()),
                "test targets": ", ".join(f"{its['targets']:,}" for its in final["counts"].values()),
                "history": f"last {config['max_len']} events",
            }
        )
        section.text += list(caveats(final))
    if rows:
        section.tables.append(("data", pd.DataFrame(rows)))
    return section


def _origins(directories: Sequence[Path], runs: Sequence[RunDirectory]) -> Section:
    """Configs, commits, versions, hardware."""
    section = Section("Where it comes from")
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        environment = run.read_environment()
        about = {key: environment[key] for key in ("commit", "python", "packages", "platform", "processor", "device")}
        entry = seen.setdefault(json.dumps(about, sort_keys=True), about | {"runs": 0, "seconds": 0.0, "first": ""})
        entry["runs"] += 1
        entry["seconds"] += environment["seconds"]
        entry["first"] = min(filter(None, (entry["first"], environment["started"])))
    rows = [
        {
            "commit": str(about["commit"]),
            "runs": str(about["runs"]),
            "time": f"{about['seconds'] / 60:.0f} min",
            "from": about["first"],
            "hardware": about["processor"] if about["device"] == "cpu" else about["device"],
            "python": about["python"],
            "packages": ", ".join(f"{name} {version}" for name, version in about["packages"].items()),
        }
        for about in seen.values()
    ]
    if rows:
        section.tables.append(("origins", pd.DataFrame(rows)))
    for directory in directories:
        path = directory / "sweep.yaml"
        if path.is_file():
            section.listings.append((f"the sweep, {path.name}", path.read_text(encoding="utf-8")))
    for run in runs:
        section.listings.append((f"the resolved config of {run.path.name}", run.config.read_text(encoding="utf-8")))
    return section
