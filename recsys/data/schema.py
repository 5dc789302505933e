"""The tables of a prepared dataset, and the error that every bad input ends in."""

from collections.abc import Iterable

import pyarrow as pa

from recsys.errors import UserError

INTERACTIONS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("domain", pa.int16(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("rating", pa.float32()),
    ]
)
"""One row per event, sorted by user, time and the order that the tie policy gives. `user` counts from 0, `item`
from 1 over all domains (0 is padding). `timestamp` is in unix seconds, or the rank 0, 1, 2 … of the event within
its user where the source keeps only an order. `rating` is null where the source has none."""

ITEMS = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("domain", pa.int16(), nullable=False),
        pa.field("raw_item", pa.string(), nullable=False),
        pa.field("title", pa.string()),
    ]
)

USERS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("raw_user", pa.string(), nullable=False),
    ]
)

MAX_DOMAINS = 127
"""Packed sequences keep a domain in one signed byte."""

SHOWN = 5
"""How many offending lines an error lists before it only counts."""


class DataError(UserError):
    """Data that cannot be used; the message names the place and says what to do. Shown without a traceback."""


def bad_lines(origin: str, problems: Iterable[str], total: int, mend: str) -> DataError:
    """One error for all offending lines of a file: the first few, how many there are, and what to do."""
    shown = [f"  {problem}" for problem, _ in zip(problems, range(SHOWN), strict=False)]
    if total > len(shown):
        shown.append(f"  … and {total - len(shown):,} more")
    noun = "problem" if total == 1 else "problems"
    return DataError("\n".join([f"{origin}: {total:,} {noun}", *shown, mend]))
