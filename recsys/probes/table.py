"""The table of a probe: one row per unit, direction, head, place and measure, each value beside its chance levels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor

PROBES_SCHEMA = pa.schema(
    [
        pa.field("label", pa.string(), nullable=False),  # of the checkpoint
        pa.field("step", pa.int64()),
        pa.field("epoch", pa.int64()),
        pa.field("unit", pa.string(), nullable=False),  # path in the model; its last part is the domain that asks
        pa.field("direction", pa.string(), nullable=False),  # read domain->asking domain; * for all others together
        pa.field("head", pa.string(), nullable=False),  # a number, "all", or "bias" of the out-projection
        pa.field("position", pa.string(), nullable=False),  # places back from the stream's end ("3-6"), or "all"
        pa.field("site", pa.string(), nullable=False),  # query, context, attention, output, gate or update
        pa.field("query", pa.string()),  # what the alignment is with: the "stream", or "normalised" by its LayerNorm
        pa.field("measure", pa.string(), nullable=False),
        pa.field("bin", pa.float64()),  # lower edge, of the measure cos_histogram
        pa.field("value", pa.float64()),  # null where undefined
        pa.field("low", pa.float64()),  # 95 % interval over users
        pa.field("high", pa.float64()),
        pa.field("null_isotropic", pa.float64()),
        pa.field("null_shuffled", pa.float64()),
        pa.field("null_covariance", pa.float64()),
        pa.field("null_init", pa.float64()),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("users", pa.int64(), nullable=False),
    ]
)
"""Chance levels are null where a measure has none. Nothing is NaN."""

_KEY = ("unit", "direction", "head", "position", "site", "query", "measure", "bin")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row but for what names the checkpoint."""

    unit: str
    direction: str
    head: str = "all"
    position: str = "all"
    site: str
    query: str | None = None
    measure: str
    bin: float | None = None
    value: float | None
    low: float | None = None
    high: float | None = None
    null_isotropic: float | None = None
    null_shuffled: float | None = None
    null_covariance: float | None = None
    tokens: int
    users: int


def make_table(
    rows: Iterable[Row], *, label: str, step: int | None, epoch: int | None, initial: pa.Table | None
) -> pa.Table:
    """The rows of one checkpoint; `initial` holds those of the same model before training."""
    known = {} if initial is None else {tuple(row[key] for key in _KEY): row["value"] for row in initial.to_pylist()}
    mark = {"label": label, "step": step, "epoch": epoch}
    return pa.Table.from_pylist(
        [mark | vars(row) | {"null_init": known.get(tuple(getattr(row, key) for key in _KEY))} for row in rows],
        schema=PROBES_SCHEMA,
    )


def number(value: Tensor | float) -> float | None:
    """None for what is undefined."""
    return float(value) if math.isfinite(value) else None
