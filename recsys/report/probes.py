"""Tables of what a probe measured, every value beside its chance levels."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from recsys.experiment import DatasetSource, Experiment
from recsys.loading import load_yaml
from recsys.probes.correlate import POINT_COLUMNS
from recsys.results import RunDirectory, RunError, fingerprint

Row = Mapping[str, Any]


def alignment_frame(probes: pa.Table, label: str = "best") -> pd.DataFrame:
    """One row per unit: how much more its output is aligned with its query than chance, and the cosines behind it.

    The alignment ratio is E[cos²] over that of outputs paired with other users' queries, 1 being chance; the columns
    after it are the same ratio of pairs drawn uniformly, of Gaussian pairs with the clouds' means and covariances, and
    of the unit before training.
    """
    rows = []
    for unit, found in _units(probes, label):
        ratio, cos2 = found["alignment_ratio"], found["cos2_mean"]
        rows.append(
            {
                "unit": unit,
                "direction": ratio["direction"],
                "tokens": f"{ratio['tokens']:,}",
                "alignment ratio [95 %]": _with_interval(ratio, ".2f"),
                "isotropic": _number(ratio["null_isotropic"], ".2f"),
                "covariance": _number(ratio["null_covariance"], ".2f"),
                "at start": _number(ratio["null_init"], ".2f"),
                "E[cos²]": _number(cos2["value"], ".4f"),
                "shuffled": _number(cos2["null_shuffled"], ".4f"),
                "mean cos": _number(found["cos_mean"]["value"], "+.3f"),
            }
        )
    return pd.DataFrame(rows)


def contribution_frame(probes: pa.Table, label: str = "best") -> pd.DataFrame:
    """One row per unit: what its output holds beyond its query, how large the update is, and how far the gate is open.

    Novelty and the cross-domain share stand beside their excess over the control, the same unit with other users'
    queries: both are high for an untrained model, too. An excess of 0 says that query and context have nothing in
    common, one below 0 that they overlap. The energy is the share times Σ|G|² / Σ|X|², G being the update and X the
    query: what is added of what the query does not hold. `silent` is the share of queries with nothing to attend to.
    """
    rows = []
    for unit, found in _units(probes, label):
        novelty, share = found["novelty"], found["cross_domain_share"]
        rows.append(
            {
                "unit": unit,
                "novelty": _number(novelty["value"], ".3f"),
                "less control [95 %]": _with_interval(found["novelty_beyond_control"], "+.3f"),
                "share": _number(share["value"], ".3f"),
                "less control [95 %] ": _with_interval(found["cross_domain_share_beyond_control"], "+.3f"),
                "energy [95 %]": _with_interval(found["cross_domain_energy"], ".3f"),
                "|G|/|X|": _number(found["norm_ratio"]["value"], ".3f"),
                "gate": _number(found["gate_mean"]["value"], ".3f"),
                "silent": _number(found["silent_share"]["value"], ".3f"),
            }
        )
    return pd.DataFrame(rows)


def intervention_frame(interventions: pa.Table) -> pd.DataFrame:
    """One row per intervention and unit: the change of the metric (macro, where there are several domains).

    `energy` is the share of the update's energy that was changed, `per energy` the change over it: parts of the update
    hold unequal shares.
    """
    rows = interventions.to_pylist()
    macro = any(row["key"].split("/")[1] == "macro" for row in rows)
    return pd.DataFrame(
        {
            "added instead": row["intervention"],
            "unit": row["unit"],
            " ".join(row["key"].split("/")[1:]): f"{row['value']:.4f}",
            "change [95 %]": f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
            "p (Holm)": f"{row['p_holm']:.4f}",
            "energy": f"{row['energy']:.3f}",
            "per energy": _number(row["difference_per_energy"], "+.4f"),
        }
        for row in rows
        if not macro or row["key"].split("/")[1] == "macro"
    )


def run_points(runs: Iterable[RunDirectory], key: str) -> pd.DataFrame:
    """A point per finished run, with the columns `POINT_COLUMNS`; `key` is a metric of its `final.json`.

    The alignment ratio of a run is the geometric mean over its units at the best checkpoint. Runs on the same data that
    differ in nothing but their seed are a cell: what else sets two runs apart may move both numbers. Parameters are
    those outside of the item table. Raises RunError for a run without probes, without an exchange, or without the
    metric.
    """
    rows = []
    for run in runs:
        final, experiment = run.read_final(), load_yaml(run.config, Experiment)
        if key not in final["metrics"]:
            raise RunError(f"{run.path} has no metric {key}; it has, among others, {next(iter(final['metrics']))}")
        ratios = [found["alignment_ratio"]["value"] for _, found in _units(run.read_probes(), "best")]
        if not ratios or None in ratios:
            raise RunError(f"{run.path} has no alignment ratio (no exchange, or nothing to attend to); leave it out")
        counts, source = final["parameters"], experiment.data.source
        dataset = source.dataset if isinstance(source, DatasetSource) else source.name
        rows.append(
            (
                run.path.name,
                dataset,
                fingerprint(experiment.model_copy(update={"seed": 0}).yaml(), final["data"]["fingerprint"]),
                final["seed"],
                sum(map(math.log, ratios)) / len(ratios),
                final["metrics"][key]["value"],
                math.log(counts["total"] - counts["item_table"]),
            )
        )
    return pd.DataFrame(rows, columns=list(POINT_COLUMNS))


def correlation_frame(correlations: pd.DataFrame) -> pd.DataFrame:
    """Pooled and within-cell values side by side, as `recsys.probes.correlate.correlate` gives them."""
    rows = []
    for (dataset, statistic), found in correlations.groupby(["dataset", "statistic"], sort=False):
        scopes = {row["scope"]: row for row in cast("list[Row]", found.to_dict("records"))}
        within = scopes.get("within")
        rows.append(
            {
                "data": str(dataset),
                "statistic": str(statistic),
                "runs": str(found["runs"].iloc[0]),
                "cells": str(found["cells"].iloc[0]),
                "pooled [95 %]": _signed(scopes["pooled"]),
                "within cells [95 %]": "–" if within is None else _signed(within),
                "p within": "–" if within is None else _defined(within["p"], ".3f"),
                "p Holm": "–" if within is None else _defined(within["p_holm"], ".3f"),
            }
        )
    return pd.DataFrame(rows)


def _signed(row: Row) -> str:
    if math.isnan(row["value"]):
        return "–"
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _defined(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _units(probes: pa.Table, label: str) -> list[tuple[str, dict[str, Row]]]:
    """The rows of whole units by measure; those of the update's alignment as `update/measure`."""
    units: dict[str, dict[str, Row]] = {}
    for row in probes.to_pylist():
        if (row["label"], row["head"], row["position"]) != (label, "all", "all") or row["bin"] is not None:
            continue
        if row["query"] == "normalised":
            continue
        aligned = row["site"] == "update" and row["query"] is not None
        key = f"update/{row['measure']}" if aligned else row["measure"]
        found = units.setdefault(row["unit"], {})
        if row["measure"] in found and row["direction"] != found[row["measure"]]["direction"]:
            continue  # a single source among several: the row of all sources together comes first
        found.setdefault(key, row)
    return list(units.items())


def _with_interval(row: Row, form: str) -> str:
    if row["value"] is None or row["low"] is None:
        return _number(row["value"], form)
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
