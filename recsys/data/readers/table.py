"""Any table with one event per row: CSV, TSV, JSON lines or Parquet, described by the card."""

import csv
import difflib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float32, Int16, Int32, Int64
from pydantic import field_validator, model_validator

from recsys.data.raw import (
    RawEvents,
    Source,
    bad_rows,
    canonical_order,
    check_times,
    is_seconds,
    read_bytes,
    read_text,
)
from recsys.data.schema import SHOWN, DataError, bad_lines
from recsys.loading import Config

Column = str | int
"""A column by its name, or by its position from 0 where the file has no header."""

_NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
"""What counts as missing in a text file unless it stands in quotes."""

_UNIT_SEPARATOR = "\x1f"
"""Stands for a separator of several characters, which the parser does not take."""

_LAST = np.iinfo(np.int64).max


class Columns(Config):
    """Which column of the file is which column of the dataset."""

    user: Column
    item: Column
    domain: Column | None = None
    timestamp: Column | None = None
    rating: Column | None = None

    def given(self) -> dict[str, str]:
        """Role -> column, of the columns that the file has."""
        pairs = {role: getattr(self, role) for role in type(self).model_fields}
        return {role: str(column) for role, column in pairs.items() if column is not None}


class TableFormat(Config):
    """How to read the files of a card. All its files have this one shape; `.gz` files are unpacked.

    The domain of an event comes from `columns.domain`, or from `domain` of its file in the card; a dataset of one
    domain needs neither.
    """

    name: Literal["table"] = "table"
    type: Literal["csv", "tsv", "jsonl", "parquet"]
    columns: Columns
    separator: str | None = None
    """Between the fields of a csv or tsv file; by default a comma or a tab."""
    header: bool = True
    quoting: bool = True
    """False where a double quote is a character like any other."""
    time_unit: Literal["s", "ms", "iso", "order"] = "s"
    """What `columns.timestamp` holds. "order" is a number that only orders a user's events; without a column the
    events of a user are in the order of the files."""
    missing_time: Literal["error", "drop", "order"] = "error"
    """An event without a time is an error, is left out, or comes after all timed events of its user; "order" makes
    the whole dataset one that keeps only an order."""

    @field_validator("separator")
    @classmethod
    def _within_a_line(cls, separator: str | None) -> str | None:
        if separator is not None and (not separator or set(separator) & set('\r\n"')):
            raise ValueError('must be some text without quotes and line ends, such as "," or "::"')
        return separator

    @model_validator(mode="after")
    def _timed(self) -> "TableFormat":
        if self.columns.timestamp is None and self.time_unit != "order":
            raise ValueError("columns.timestamp is missing; name it, or say time_unit: order")
        return self

    def file_names(self) -> list[str]:
        return []

    def check(self, domains: tuple[str, ...], file_domains: Mapping[str, str | None]) -> str | None:
        """What is wrong with this format in a card of these domains; None if nothing."""
        without = [name for name, domain in file_domains.items() if domain is None]
        if self.columns.domain is not None and len(without) < len(file_domains):
            return "the domain comes from format.columns.domain or from the files, not from both"
        if self.columns.domain is None and without and len(domains) > 1:
            return f"the domain of {without[0]} is unknown; give it a domain, or name format.columns.domain"
        return None

    def read(self, sources: Mapping[str, Source], domains: tuple[str, ...]) -> RawEvents:
        """The events of all files, in the order of the card."""
        parts = [self._read_file(source, number, domains) for number, source in enumerate(sources.values())]
        frame = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
        frame["user"], users = _encode(frame["user"])
        frame["item"], items = _encode(frame["item"])
        return RawEvents(
            frame=frame,
            users=users,
            items=items,
            files=tuple(source.path.name for source in sources.values()),
            time_unit="order" if "order" in (self.time_unit, self.missing_time) else "seconds",
        )

    def _read_file(self, source: Source, number: int, domains: tuple[str, ...]) -> pd.DataFrame:
        path = source.path
        cells = self._cells(path)
        columns = self.columns.given()
        for role in ("user", "item"):
            _refuse_missing(path, cells, columns[role], f"{role} id")
        time, timed = self._times(path, cells)
        frame = pd.DataFrame(
            {
                "user": cells.text(columns["user"]),
                "item": cells.text(columns["item"]),
                "domain": self._domains(path, cells, domains, source.domain),
                "timestamp": time,
                "rating": _ratings(path, cells, columns.get("rating")),
                "file": np.full(len(cells.lines), number, dtype=np.int16),
                "line": cells.lines,
            }
        )
        return frame if timed is None else frame[timed]

    def _cells(self, path: Path) -> "Cells":
        wanted = list(dict.fromkeys(self.columns.given().values()))
        match self.type:
            case "csv" | "tsv":
                separator = self.separator or {"csv": ",", "tsv": "\t"}[self.type]
                return read_delimited(path, wanted, separator, self.header, self.quoting)
            case "jsonl":
                return _read_jsonl(path, wanted)
            case "parquet":
                return _read_parquet(path, wanted)

    def _domains(
        self, path: Path, cells: "Cells", domains: tuple[str, ...], domain: str | None
    ) -> Int16[np.ndarray, " events"]:
        if self.columns.domain is None:
            only = 0 if domain is None else domains.index(domain)
            return np.full(len(cells.lines), only, dtype=np.int16)
        column = str(self.columns.domain)
        _refuse_missing(path, cells, column, "domain")
        found = cells.columns[column]
        index = np.asarray(pc.index_in(found, pa.array(domains)).fill_null(-1), dtype=np.int16)

        def unknown(row: int) -> str:
            value = found[row].as_py()
            near = difflib.get_close_matches(value, domains, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"line {cells.lines[row]}: there is no domain {value!r}{hint}"

        if (index < 0).any():
            mend = f"The card's domains are: {', '.join(domains)}. Correct the lines, or add the name to the card."
            raise bad_rows(path, index < 0, unknown, mend)
        return index

    def _times(self, path: Path, cells: "Cells") -> tuple[Int64[np.ndarray, " events"], np.ndarray | None]:
        """Seconds or a key to order by; and which events to keep, where some are to be left out."""
        if self.columns.timestamp is None:
            return np.arange(len(cells.lines)), None
        column = str(self.columns.timestamp)
        text = cells.columns[column]
        present = np.asarray(text.is_valid())
        if self.missing_time == "error":
            _refuse_missing(path, cells, column, "time")
        values = np.zeros(len(text), dtype=np.int64)
        values[present] = self._parse_times(path, text.filter(pa.array(present)), cells.lines[present])
        if self.time_unit != "order":
            mend = "say `time_unit: ms` in the card" if self.time_unit == "s" else "correct the card's `time_unit`"
            if self.time_unit == "ms" and is_seconds(values[present] * 1000):
                raise DataError(f"{path}: these are seconds, not milliseconds; say `time_unit: s` in the card")
            check_times(path, values[present], cells.lines[present], mend)
        if self.missing_time == "drop":
            return values, present
        return np.where(present, values, _LAST), None

    def _parse_times(
        self, path: Path, text: pa.ChunkedArray, lines: Int64[np.ndarray, " timed"]
    ) -> Int64[np.ndarray, " timed"]:
        if self.time_unit == "iso":
            stamps = pd.to_datetime(text.to_pandas(), utc=True, errors="coerce", format="ISO8601")
            wrong = stamps.isna().to_numpy()
            if not wrong.any():
                return stamps.dt.as_unit("s").astype(np.int64).to_numpy()
            kind = "an ISO 8601 time such as 2014-07-23T10:00:00Z"
        else:
            divisor = 1000 if self.time_unit == "ms" else 1
            try:
                return np.asarray(pc.cast(text, pa.int64())) // divisor
            except pa.ArrowInvalid:
                numbers = pd.to_numeric(text.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
            wrong = ~(np.abs(numbers) < 2**62)
            if not wrong.any():
                return (numbers // divisor).astype(np.int64)
            kind = "a number"
        raise bad_rows(
            path,
            wrong,
            lambda row: f"line {lines[row]}: the time {text[row].as_py()!r} is not {kind}",
            "Correct these lines, or the card's `time_unit`.",
        )


@dataclass(frozen=True)
class Cells:
    """Some columns of a file as text (null where missing), and the line each row was read at."""

    columns: dict[str, pa.ChunkedArray]
    lines: Int64[np.ndarray, " events"]

    def text(self, column: str) -> pd.Series:
        return self.columns[column].to_pandas()


def read_delimited(path: Path, wanted: list[str], separator: str, header: bool, quoting: bool) -> Cells:
    """Columns of a CSV or TSV file. Without a header the columns are called "0", "1", …

    Raises DataError for a column that is not there (naming those that are) and for lines of another length.
    """
    content = read_bytes(path)
    if len(separator.encode()) > 1:
        content, separator = content.replace(separator.encode(), _UNIT_SEPARATOR.encode()), _UNIT_SEPARATOR
    first_line = content.split(b"\n", 1)[0].decode("utf-8", errors="replace").rstrip("\r")
    quotes = {} if quoting else {"quoting": csv.QUOTE_NONE}
    names = next(csv.reader([first_line], delimiter=separator, **quotes))  # type: ignore[arg-type]
    if not header:
        names = [str(position) for position in range(len(names))]
    _refuse_absent(path, wanted, names)
    skipped: list[int] = []
    problems: list[str] = []
    num_problems = 0

    def on_invalid_row(row: pa.csv.InvalidRow) -> str:
        nonlocal num_problems
        skipped.append(row.number)
        if row.text.strip():
            num_problems += 1
            if len(problems) < SHOWN:
                problems.append(f"line {row.number}: {row.actual_columns} fields, not {row.expected_columns}")
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(content),
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=int(header)),
            parse_options=pa.csv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoting else False,
                newlines_in_values=quoting,
                ignore_empty_lines=False,
                invalid_row_handler=on_invalid_row,
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                null_values=_NULLS,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: the table cannot be read ({error}); correct the file, or its format in the card"
        ) from None
    if problems:
        mend = "A line too short is cut off; one too long has a separator inside a field that is not quoted."
        raise bad_lines(str(path), problems, num_problems, mend)
    lines = np.setdiff1d(np.arange(1 + header, 1 + header + len(table) + len(skipped)), skipped)
    blank = [number for number, line in enumerate(content.splitlines(), start=1) if not line]
    if blank:  # read as a row without values, so that the lines after it keep their numbers
        empty = np.all([table[name].is_null() for name in wanted], axis=0)
        kept = ~(empty & np.isin(lines, blank))  # a blank line may also stand within quotes
        table, lines = table.filter(pa.array(kept)), lines[kept]
    return Cells({name: _trimmed(table[name]) for name in wanted}, _some(path, lines))


def _read_jsonl(path: Path, wanted: list[str]) -> Cells:
    values: dict[str, list[str | None]] = {name: [] for name in wanted}
    lines: list[int] = []
    problems: list[str] = []
    num_problems = 0
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not an object")
            if not lines:
                _refuse_absent(path, wanted, list(row))
            cells = [row.get(name) for name in wanted]
            nested = next((cell for cell in cells if isinstance(cell, list | dict | bool)), None)
            if nested is not None:
                raise ValueError(f"{json.dumps(nested)} is neither a text nor a number")
        except ValueError as error:
            num_problems += 1
            problems.append(f"line {number}: not a JSON object of texts and numbers ({error})")
            continue
        lines.append(number)
        for name, cell in zip(wanted, cells, strict=True):
            missing = cell is None or cell != cell  # NaN
            values[name].append(None if missing else str(cell))
    if problems:
        raise bad_lines(str(path), problems, num_problems, "Each line must be one JSON object; correct these lines.")
    columns = {name: _trimmed(pa.chunked_array([pa.array(values[name], pa.string())])) for name in wanted}
    return Cells(columns, _some(path, np.asarray(lines, dtype=np.int64)))


def _read_parquet(path: Path, wanted: list[str]) -> Cells:
    """The line of a row is its number from 1."""
    try:
        with pa.parquet.ParquetFile(path) as file:
            _refuse_absent(path, wanted, file.schema_arrow.names)
            table = file.read(columns=wanted)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}); get it again") from None
    columns = {}
    for name in wanted:
        column = table[name]
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        try:
            columns[name] = _trimmed(pc.cast(column, pa.string()))
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: the column {name!r} cannot be read as text ({error})") from None
        except pa.ArrowNotImplementedError:
            raise DataError(f"{path}: the column {name!r} holds {column.type}, not texts or numbers") from None
    return Cells(columns, _some(path, np.arange(1, len(table) + 1)))


def _trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without blanks around the text; what is empty then is missing."""
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(text, ""), None, text)


def _some(path: Path, lines: Int64[np.ndarray, " events"]) -> Int64[np.ndarray, " events"]:
    if not len(lines):
        raise DataError(f"{path}: the file has no events; get it again, or correct the card if it names the wrong file")
    return lines


def _refuse_absent(path: Path, wanted: list[str], names: list[str]) -> None:
    absent = [name for name in wanted if name not in names]
    if absent:
        noun = "column" if len(absent) == 1 else "columns"
        raise DataError(
            f"{path}: there is no {noun} {', '.join(map(repr, absent))}; the columns are: {', '.join(names)}. "
            "Correct format.columns in the card."
        )


def _refuse_missing(path: Path, cells: Cells, column: str, what: str) -> None:
    missing = np.asarray(cells.columns[column].is_null())
    if missing.any():
        raise bad_rows(
            path,
            missing,
            lambda row: f"line {cells.lines[row]}: the {what} is missing (column {column})",
            "Fill in or remove these lines"
            + (", or set missing_time in the card to drop or order." if what == "time" else "."),
        )


def _ratings(path: Path, cells: Cells, column: str | None) -> Float32[np.ndarray, " events"]:
    """NaN where there is none."""
    if column is None:
        return np.full(len(cells.lines), np.nan, dtype=np.float32)
    text = cells.text(column)
    ratings = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float32, na_value=np.nan)
    wrong = np.isnan(ratings) & text.notna().to_numpy()
    if wrong.any():
        raise bad_rows(
            path,
            wrong,
            lambda row: f"line {cells.lines[row]}: the rating {text.iloc[row]!r} is not a number",
            "Correct these lines, or leave columns.rating out of the card.",
        )
    return ratings


def _encode(ids: pd.Series) -> tuple[Int32[np.ndarray, " events"], np.ndarray]:
    """Each event's row in the canonical order of the distinct ids, and those ids."""
    codes, distinct = pd.factorize(ids)
    names = np.asarray(distinct, dtype=object)
    order = canonical_order(names)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    return rank[codes], names[order]
