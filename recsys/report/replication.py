"""Our runs beside the numbers that others publish for the same experiment."""

from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat

from recsys.evaluation.metrics import metric_key
from recsys.loading import Config
from recsys.report.tables import duration_text
from recsys.results import RunDirectory, RunError, arms_of


class PublishedExperiment(Config):
    """Test metrics of one experiment as published."""

    name: str
    """The name of our runs of it."""
    paper: str
    source: str
    """Where the numbers stand, and what they are a mean of."""
    protocol: str
    band: PositiveFloat
    """The relative difference of means up to which it counts as replicated."""
    values: dict[str, dict[str, float]]
    """Domain -> metric -> value."""
    spread: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Their standard deviation between seeds, where it is known."""


class Published(Config):
    experiments: tuple[PublishedExperiment, ...]


def replicate(runs: Iterable[RunDirectory], published: Published) -> list[dict[str, Any]]:
    """One record per published number that finished runs can be held against.

    `value` is the mean over the runs of that name, `spread` its standard deviation between seeds (null for one),
    `full` the same metric under full ranking, where the runs have it; `runs` says where each number comes from.
    Raises RunError where no finished run carries a published name, where runs of one name differ in more than the
    seed, and where one lacks the published protocol.
    """
    by_name: dict[str, list[RunDirectory]] = {}
    for members in arms_of(run for run in runs if run.state == "done").values():
        name = members[0].read_final()["name"]
        if name in by_name:
            raise RunError(f"runs of {name} differ in more than their seed; give only those of one config")
        by_name[name] = members
    records = [
        _record(experiment, domain, metric, by_name[experiment.name])
        for experiment in published.experiments
        if experiment.name in by_name
        for domain, metrics in experiment.values.items()
        for metric in metrics
    ]
    if not records:
        names = ", ".join(experiment.name for experiment in published.experiments)
        raise RunError(f"no finished run here has a published counterpart; train one of {names}")
    return records


def _record(experiment: PublishedExperiment, domain: str, metric: str, runs: list[RunDirectory]) -> dict[str, Any]:
    key = metric_key("test", domain, metric, experiment.protocol)
    found = [_numbers_of(run, key) | _origin_of(run) for run in runs]
    values = [number["value"] for number in found]
    full = [run.read_final()["metrics"].get(metric_key("test", domain, metric, "full")) for run in runs]
    goal = experiment.values[domain][metric]
    difference = mean(values) / goal - 1
    return {
        "experiment": experiment.name,
        "source": f"{experiment.paper}; {experiment.source}",
        "key": key,
        "published": goal,
        "published_spread": experiment.spread.get(domain, {}).get(metric),
        "value": mean(values),
        "spread": stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "relative_difference": difference,
        "band": experiment.band,
        "within_band": abs(difference) <= experiment.band,
        "full": mean(number["value"] for number in full if number) if all(full) else None,
        "runs": found,
    }


def _numbers_of(run: RunDirectory, key: str) -> dict[str, Any]:
    metrics = run.read_final()["metrics"]
    if key not in metrics:
        raise RunError(f"{run.path} has no {key}: train it with the protocol among eval.protocols")
    return {name: metrics[key][name] for name in ("value", "low", "high", "n")}


def _origin_of(run: RunDirectory) -> dict[str, Any]:
    final, environment = run.read_final(), run.read_environment()
    selection = final["selection"] or {}
    return {
        "run": run.path.name,
        "seed": final["seed"],
        "parameters": final["parameters"]["total"],
        "chosen_epoch": selection.get("epoch"),
        "epochs": selection.get("epochs"),
        "commit": environment["commit"],
        "command": environment["command"],
        "hardware": f"{environment['processor']}, {environment['torch_threads']} threads"
        if environment["device"] == "cpu"
        else environment["device"],
        "date": environment["started"][:10],
        "seconds": environment["seconds"],
    }


def replication_frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per number, as text."""
    rows = []
    for record in records:
        runs = record["runs"]
        experiment, _, metric = record["key"].removeprefix("test/").partition("/")
        seconds = mean(run["seconds"] for run in runs)
        rows.append(
            {
                "run": record["experiment"],
                "domain": experiment,
                "metric": metric.upper().partition("[")[0],
                "published": _spread_text(record["published"], record["published_spread"]),
                "here": _spread_text(record["value"], record["spread"]),
                "difference": f"{100 * record['relative_difference']:+.1f} %"
                + ("" if record["within_band"] else f" (beyond {100 * record['band']:.0f} %)"),
                "full": "–" if record["full"] is None else f"{record['full']:.4f}",
                "seeds": ", ".join(str(run["seed"]) for run in runs),
                "epochs": ", ".join(f"{run['chosen_epoch']} of {run['epochs']}" for run in runs),
                "time": duration_text(seconds),
                "hardware": ", ".join(dict.fromkeys(run["hardware"] for run in runs)),
                "commit": ", ".join(dict.fromkeys(str(run["commit"])[:7] for run in runs)),
            }
        )
    return pd.DataFrame(rows)


def _spread_text(value: float, spread: float | None) -> str:
    return f"{value:.4f}" if spread is None else f"{value:.4f} ± {spread:.4f}"
