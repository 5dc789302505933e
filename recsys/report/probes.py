"""Tables of what a probe measured, every value beside its chance levels."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

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
                "1/d": _number(cos2["null_isotropic"], ".4f"),
                "E|cos|": _number(found["cos_abs_mean"]["value"], ".3f"),
                "mean cos": _number(found["cos_mean"]["value"], "+.3f"),
            }
        )
    return pd.DataFrame(rows)


def contribution_frame(probes: pa.Table, label: str = "best") -> pd.DataFrame:
    """One row per unit: what its output holds beyond its query, how large the update is, and how far the gate is open.

    Novelty and cross-domain share are given as excess over the control, the same units with other users' queries:
    the raw values are high for an untrained model, too.
    """
    rows = []
    for unit, found in _units(probes, label):
        novelty, share = found["novelty"], found["cross_domain_share"]
        rows.append(
            {
                "unit": unit,
                "direction": novelty["direction"],
                "novelty": _number(novelty["value"], ".3f"),
                "beyond control [95 %]": _with_interval(found["novelty_beyond_control"], "+.3f"),
                "cross-domain share": _number(share["value"], ".3f"),
                "beyond control [95 %] ": _with_interval(found["cross_domain_share_beyond_control"], "+.3f"),
                "CKA": _number(found["cka"]["value"], ".3f"),
                "|update|/|query|": _number(found["norm_ratio"]["value"], ".3f"),
                "orthogonal energy": _number(found["update/orthogonal_energy"]["value"], ".3f"),
                "gate": _number(found["gate_mean"]["value"], ".3f"),
                "silent": _number(found["silent_share"]["value"], ".3f"),
            }
        )
    return pd.DataFrame(rows)


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
