"""Logged feedback: what was shown, how likely it was to be shown, and what came of it. In memory and as Parquet."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from jaxtyping import Bool, Float64, Int64

from recsys.data.schema import SHOWN, DataError, bad_lines
from recsys.offpolicy.propensity import ItemFrequency
from recsys.results import atomic
from recsys.types import NO_DOMAIN, Catalog

LAYOUT = 1
"""Raised when a file of an older layout can no longer be read as it stands."""

LOGGED = "logged"
"""Where the propensities come from when no model filled any of them in."""

FEEDBACK = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("user", pa.int64(), nullable=False),
        pa.field("domain", pa.int16(), nullable=False),  # the domain that the request asked for
        pa.field("position", pa.int16(), nullable=False),  # from 0, the top
        pa.field("item", pa.int32(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
        pa.field("propensity", pa.float64()),  # of the item, given the items above it in the slate
        pa.field("marginal", pa.float64()),  # of the item at this position, whatever stands above it
    ]
)
"""One row per shown item. A column `reward_<name>` (float64, no nulls) follows for every reward."""

_KEY = b"recsys.offpolicy"
_REWARD = "reward_"
_CERTAIN = 1 - 1e-9


@dataclass(frozen=True)
class LoggedFeedback:
    """n requests with a slate of L items each, in the order of their ids. Everything is checked on construction.

    Raises DataError for feedback no estimate can rest on: propensities outside (0, 1], missing rewards, items
    outside the catalogue or twice in a slate, and a log whose policy left nothing to chance.
    """

    request: Int64[np.ndarray, " requests"]
    user: Int64[np.ndarray, " requests"]
    domain: Int64[np.ndarray, " requests"]
    """Index into `domain_names` of the domain that was asked for."""
    time: Int64[np.ndarray, " requests"]
    """Unix seconds, or an order where the source has only that."""
    items: Int64[np.ndarray, "requests slots"]
    """Item ids 1..num_items, top first."""
    positions: Int64[np.ndarray, "requests slots"]
    """0..L-1; where L is 1, the place on the page that the item stood at."""
    rewards: Mapping[str, Float64[np.ndarray, "requests slots"]]
    propensity: Float64[np.ndarray, "requests slots"]
    """Probability, when it was drawn, of each item given those above it: their product is that of the slate."""
    marginal: Float64[np.ndarray, "requests slots"] | None
    """Probability of each item at its position over all slates; None where it was not logged and L exceeds 1."""
    num_items: int
    domain_names: tuple[str, ...]
    propensities: str = LOGGED
    """"logged", or the name of the fitted model that filled in what was missing."""

    def __post_init__(self) -> None:
        if not len(self.request):
            raise DataError("this log has no rows")
        if not self.rewards:
            raise DataError(f"this log has no reward; give it at least one column {_REWARD}<name>")
        mend = "correct these rows or leave them out"
        outside = (self.items < 1) | (self.items > self.num_items)
        self._refuse(outside, self.items, "item", f"is outside the catalogue 1..{self.num_items}", mend)
        domain = np.broadcast_to(self.domain[:, None], self.items.shape)
        unknown = (domain < 0) | (domain >= len(self.domain_names))
        self._refuse(unknown, domain, "domain", f"is none of 0..{len(self.domain_names) - 1}", mend)
        twice = np.sort(self.items, axis=1)
        repeated = np.zeros(self.items.shape, dtype=bool)
        repeated[:, 1:] = twice[:, 1:] == twice[:, :-1]
        self._refuse(repeated, twice, "item", "stands twice in the slate", mend)
        for name, values in self.rewards.items():
            self._refuse(~np.isfinite(values), values, f"reward {name!r}", "is missing", mend)
        self._refuse_improbable(self.propensity, "propensity")
        if self.marginal is not None:
            self._refuse_improbable(self.marginal, "marginal")
        if len(self.request) > 1 and self.num_items > 1 and (self.propensity >= _CERTAIN).all():
            raise DataError(
                "every propensity of this log is 1: a deterministic policy showed only what it would show again, and "
                "nothing can be learnt about another one. Log with a temperature or with epsilon > 0."
            )

    def _refuse_improbable(self, values: Float64[np.ndarray, "requests slots"], what: str) -> None:
        wrong = ~((values > 0) & (values <= 1))  # NaN included
        mend = "what was shown had a probability above 0 and at most 1; log it when the item is drawn"
        self._refuse(wrong, values, what, "is no probability", mend)

    def _refuse(
        self, wrong: Bool[np.ndarray, "requests slots"], values: np.ndarray, what: str, problem: str, mend: str
    ) -> None:
        if wrong.any():
            rows, slots = np.nonzero(wrong)
            lines = [
                f"request {self.request[row]}, position {self.positions[row, slot]}: the {what} "
                f"{values[row, slot]} {problem}"
                for row, slot in zip(rows[:SHOWN], slots[:SHOWN], strict=True)
            ]
            raise bad_lines("logged feedback", lines, len(rows), f"{mend[0].upper()}{mend[1:]}.")

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.request)

    @property
    def slots(self) -> int:
        """Items in a slate."""
        return self.items.shape[1]

    def take(self, rows: Int64[np.ndarray, " chosen"]) -> "LoggedFeedback":
        """The feedback of some of the requests."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        rewards = {name: values[rows] for name, values in self.rewards.items()}
        return replace(self, **columns, rewards=rewards)

    def reward(self, weights: Mapping[str, float]) -> Float64[np.ndarray, "requests slots"]:
        """The weighted sum of named rewards, such as `{"click": 1.0, "like": 3.0}`."""
        unknown = [name for name in weights if name not in self.rewards]
        if unknown or not weights:
            near = difflib.get_close_matches(unknown[0], self.rewards, n=1, cutoff=0.5) if unknown else []
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(self.rewards)}"
            name = f"no reward {unknown[0]!r}" if unknown else "rewards, and none was asked for"
            raise DataError(f"this log has {name}; {hint}")
        return np.sum([weight * self.rewards[name] for name, weight in weights.items()], axis=0)

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        num_items: int,
        domain_names: tuple[str, ...],
        propensity_model: ItemFrequency | None = None,
    ) -> "LoggedFeedback":
        """The feedback in rows of `FEEDBACK`, in any order.

        A null propensity is refused unless a model is named, which is then fitted to all rows and fills in the
        nulls. Slates of different lengths are refused.
        """
        table = table.sort_by([("request", "ascending"), ("position", "ascending")])
        columns = {name: _column(table, name) for name in ("request", "user", "domain", "position", "item", "time")}
        request, first, count = np.unique(columns["request"], return_index=True, return_counts=True)
        if len(request):
            _refuse_ragged(request, count, columns["position"])
        propensity, source = _propensities(table, columns, propensity_model)
        slots = int(count[0]) if len(count) else 1

        def slate(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values.reshape(-1, slots))

        for name in ("user", "domain", "time"):
            values = slate(columns[name])
            differs = (values != values[:, :1]).any(1)
            if differs.any():
                lines = [f"request {r}: more than one {name}" for r in request[differs][:SHOWN]]
                mend = "A request is one visit of one user: give these rows request ids of their own."
                raise bad_lines("logged feedback", lines, int(differs.sum()), mend)
        marginal = slate(propensity) if slots == 1 else None
        if table["marginal"].null_count < len(table):
            marginal = slate(_float(table["marginal"]))
        rewards = [name for name in table.column_names if name.startswith(_REWARD)]
        return cls(
            request=request,
            user=columns["user"][first],
            domain=columns["domain"][first],
            time=columns["time"][first],
            items=slate(columns["item"]),
            positions=slate(columns["position"]),
            rewards={name.removeprefix(_REWARD): slate(_float(table[name])) for name in rewards},
            propensity=slate(propensity),
            marginal=marginal,
            num_items=num_items,
            domain_names=domain_names,
            propensities=source,
        )

    def to_table(self) -> pa.Table:
        """One row per shown item; what the columns do not say stands in the metadata of the schema."""
        wide = {name: np.repeat(getattr(self, name), self.slots) for name in ("request", "user", "domain", "time")}
        flat = {"position": self.positions, "item": self.items, "propensity": self.propensity}
        flat |= {f"{_REWARD}{name}": values for name, values in self.rewards.items()}
        columns = {name: pa.array(values.ravel()) for name, values in (wide | flat).items()}
        marginal = self.marginal
        columns["marginal"] = pa.nulls(self.items.size) if marginal is None else pa.array(marginal.ravel())
        schema = feedback_schema(list(self.rewards))
        about = {
            "layout": LAYOUT,
            "num_items": self.num_items,
            "domain_names": list(self.domain_names),
            "propensities": self.propensities,
        }
        table = pa.table({field.name: columns[field.name].cast(field.type) for field in schema}, schema=schema)
        return table.replace_schema_metadata({_KEY: json.dumps(about).encode()})

    def to_parquet(self, path: Path) -> None:
        """Write the file whole or not at all."""
        with atomic(path) as temporary:
            pyarrow.parquet.write_table(self.to_table(), temporary)

    @classmethod
    def from_parquet(cls, path: Path, propensity_model: ItemFrequency | None = None) -> "LoggedFeedback":
        """The feedback of a file that `to_parquet` (or anything of the same schema and metadata) wrote."""
        try:
            table = pyarrow.parquet.read_table(path)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is not a Parquet file that can be read ({error}); write it again") from None
        about = _about(path, table)
        for field in feedback_schema([n.removeprefix(_REWARD) for n in table.column_names if n.startswith(_REWARD)]):
            found = table.schema.field(field.name).type if field.name in table.column_names else None
            if found != field.type:
                raise DataError(f"{path}: the column {field.name!r} must be {field.type}, not {found or 'missing'}")
        log = cls.from_table(table, about["num_items"], tuple(about["domain_names"]), propensity_model)
        if about["propensities"] != LOGGED:
            assert log.propensities == LOGGED  # a file that was filled in has no null left to fill
            log = cls(**{**vars(log), "propensities": about["propensities"]})
        return log


class FeedbackSource(NamedTuple):
    """Public feedback as its reader found it."""

    log: LoggedFeedback
    catalog: Catalog
    raw_items: tuple[str, ...]
    """The source's id of item 1, 2, …"""


def feedback_schema(rewards: Sequence[str]) -> pa.Schema:
    """`FEEDBACK` with a column for every named reward."""
    return pa.schema([*FEEDBACK, *(pa.field(f"{_REWARD}{name}", pa.float64(), nullable=False) for name in rewards)])


def one_domain(name: str, num_items: int) -> Catalog:
    """The catalogue of a source that has one domain, nothing of it trained on."""
    domain = torch.zeros(num_items + 1, dtype=torch.int64)
    domain[0] = NO_DOMAIN
    return Catalog((name,), domain, torch.zeros(num_items + 1, dtype=torch.int64))


def _about(path: Path, table: pa.Table) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    if _KEY not in metadata:
        raise DataError(f"{path} is not logged feedback: its metadata lack {_KEY.decode()!r}; write it with to_parquet")
    about: dict[str, Any] = json.loads(metadata[_KEY])
    if about["layout"] != LAYOUT:
        raise DataError(f"{path} has layout {about['layout']}, and this version reads {LAYOUT}; log again")
    return about


def _column(table: pa.Table, name: str) -> Int64[np.ndarray, " rows"]:
    column = table[name]
    if column.null_count:
        raise DataError(f"logged feedback: {column.null_count:,} rows have no {name}; correct or leave them out")
    return column.to_numpy().astype(np.int64)


def _float(column: pa.ChunkedArray) -> Float64[np.ndarray, " rows"]:
    """The values, NaN for null (which the checks of the class then refuse)."""
    return column.to_numpy().astype(np.float64)


def _propensities(
    table: pa.Table, columns: Mapping[str, Int64[np.ndarray, " rows"]], model: ItemFrequency | None
) -> tuple[Float64[np.ndarray, " rows"], str]:
    """The propensities, those that are null filled in by the model, and where they come from."""
    propensity = _float(table["propensity"])
    missing = table["propensity"].is_null().to_numpy()
    if not missing.any():
        return propensity, LOGGED
    if model is None:
        rows = np.flatnonzero(missing)
        lines = [f"request {columns['request'][r]}, position {columns['position'][r]}: no propensity" for r in rows]
        mend = (
            "Weights need the probability with which each item was drawn, logged when it was drawn. Name a propensity "
            "model to estimate what is missing; estimates then rest on that model."
        )
        raise bad_lines("logged feedback", lines, len(rows), mend)
    fitted = model.fit(columns["item"], columns["domain"], columns["position"])
    return np.where(missing, fitted, propensity), model.name


def _refuse_ragged(
    request: Int64[np.ndarray, " requests"],
    count: Int64[np.ndarray, " requests"],
    position: Int64[np.ndarray, " rows"],
) -> None:
    usual = int(np.bincount(count).argmax())
    mend = "The estimators need slates of one length: split the log by length, or complete the slates."
    _refuse(count != usual, lambda r: f"request {request[r]} shows {count[r]} items, most others {usual}", mend)
    places = position.reshape(-1, usual)
    mend = "Number the positions of a slate from 0, the top, each once."
    wrong = (places != np.arange(usual)).any(1) if usual > 1 else places[:, 0] < 0
    _refuse(wrong, lambda r: f"request {request[r]} has the positions {places[r].tolist()}", mend)


def _refuse(wrong: Bool[np.ndarray, " requests"], describe: Callable[[int], str], mend: str) -> None:
    if wrong.any():
        rows = np.flatnonzero(wrong)
        raise bad_lines("logged feedback", [describe(int(row)) for row in rows[:SHOWN]], len(rows), mend)
