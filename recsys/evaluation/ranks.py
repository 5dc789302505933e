"""The table of ranks: one row per protocol and target, from which every metric can be computed later."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa

Split = Literal["validation", "test"]
Seen = Literal["history", "none"]
"""Whether the items of a user's history leave the full rankings; the target never does."""

RANKS_SCHEMA = pa.schema(
    [
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),  # of the target
        pa.field("target", pa.int32(), nullable=False),
        pa.field("history", pa.int32(), nullable=False),  # events before the target, not truncated
        pa.field("greater", pa.int32(), nullable=False),
        pa.field("ties", pa.int32(), nullable=False),
        pa.field("candidates", pa.int32(), nullable=False),  # the target included
        pa.field("cross_entropy", pa.float32()),  # null for sampled protocols
    ]
)

_KEY = b"recsys"


@dataclass(frozen=True)
class RanksInfo:
    """What a table of ranks was computed on; kept in its schema, and so in its file."""

    split: Split
    split_hash: str
    seen: Seen
    negatives: dict[str, dict[str, str]]
    """sha256 of the negatives per sampled protocol and domain."""

    @staticmethod
    def of(ranks: pa.Table) -> "RanksInfo":
        metadata = ranks.schema.metadata or {}
        if _KEY not in metadata:
            raise ValueError("this table does not say which split its ranks belong to; write it with `evaluate`")
        return RanksInfo(**json.loads(metadata[_KEY]))


def ranks_table(columns: Sequence[pa.Table], info: RanksInfo) -> pa.Table:
    """The pieces as one table in a fixed order of rows, whatever the order they were ranked in."""
    table = pa.concat_tables(columns).combine_chunks()
    order = [(name, "ascending") for name in ("protocol", "user", "history", "target")]
    return table.sort_by(order).replace_schema_metadata({_KEY: json.dumps(asdict(info)).encode()})
