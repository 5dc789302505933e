"""Ciao product reviews (Tang et al. 2012). Rows of user, item, category, rating, helpfulness and unix time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import scipy.io
from jaxtyping import Float64, Int64

from recsys.data.raw import RawEvents, Source, bad_rows, check_times
from recsys.data.readers.table import Cells, read_delimited
from recsys.data.schema import DataError
from recsys.loading import Config

COLUMNS = ("user", "item", "category", "rating", "helpfulness", "unix_ts")


class CiaoFormat(Config):
    """The original `.mat` matrix of six columns, or the same rows as a (gzipped) TSV with a header.

    Category k is the k-th domain of the card.
    """

    name: Literal["ciao"] = "ciao"
    ratings: str
    """The file's name in the card."""

    def file_names(self) -> list[str]:
        return [self.ratings]

    def check(self, domains: tuple[str, ...], file_domains: Mapping[str, str | None]) -> str | None:
        """What is wrong with this format in a card of these domains; None if nothing."""
        return None

    def read(self, sources: Mapping[str, Source], domains: tuple[str, ...]) -> RawEvents:
        path = sources[self.ratings].path
        values, lines = _read_matrix(path) if path.suffix == ".mat" else _read_tsv(path)
        columns = dict(zip(COLUMNS, values.T, strict=True))
        for name in ("user", "item", "category", "unix_ts"):
            _refuse_fractions(path, name, columns[name], lines)
        category = columns["category"].astype(np.int64)
        wrong = (category < 1) | (category > len(domains))
        if wrong.any():
            raise bad_rows(
                path,
                wrong,
                lambda row: f"line {lines[row]}: there is no category {category[row]}",
                f"The card names {len(domains)} domains, for the categories 1 to {len(domains)}.",
            )
        timestamp = columns["unix_ts"].astype(np.int64)
        check_times(path, timestamp, lines)
        users, user_row = np.unique(columns["user"].astype(np.int64), return_inverse=True)
        items, item_row = np.unique(columns["item"].astype(np.int64), return_inverse=True)
        frame = pd.DataFrame(
            {
                "user": user_row.astype(np.int32),
                "item": item_row.astype(np.int32),
                "domain": (category - 1).astype(np.int16),
                "timestamp": timestamp,
                "rating": columns["rating"].astype(np.float32),
                "file": np.zeros(len(values), dtype=np.int16),
                "line": lines,
            }
        )
        return RawEvents(frame, users.astype(str).astype(object), items.astype(str).astype(object), (path.name,))


def _refuse_fractions(
    path: Path, name: str, values: Float64[np.ndarray, " events"], lines: Int64[np.ndarray, " events"]
) -> None:
    wrong = ~np.isfinite(values) | (values != np.floor(values))
    if wrong.any():
        raise bad_rows(
            path,
            wrong,
            lambda row: f"line {lines[row]}: the {name} {values[row]} is not a whole number",
            "Correct or remove these lines, or get the file again.",
        )


def _read_tsv(path: Path) -> tuple[Float64[np.ndarray, "events 6"], Int64[np.ndarray, " events"]]:
    cells = read_delimited(path, list(COLUMNS), "\t", header=True, quoting=False)
    return np.stack([_numbers(path, name, cells) for name in COLUMNS], axis=1), cells.lines


def _numbers(path: Path, name: str, cells: Cells) -> Float64[np.ndarray, " events"]:
    text = cells.text(name)
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.isnan(numbers)
    if wrong.any():
        raise bad_rows(
            path,
            wrong,
            lambda row: f"line {cells.lines[row]}: the {name} {text.iloc[row]!r} is not a number",
            "Correct or remove these lines, or get the file again.",
        )
    return numbers


def _read_matrix(path: Path) -> tuple[Float64[np.ndarray, "events 6"], Int64[np.ndarray, " events"]]:
    """The one matrix of six columns in a MATLAB file; the line of a row is its number from 1."""
    try:
        content = scipy.io.loadmat(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged file fails in as many ways as the format has parts
        raise DataError(f"{path}: not a MATLAB file that can be read ({error}); get it again") from None
    matrices = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    fitting = [value for value in matrices.values() if value.ndim == 2 and value.shape[1] == len(COLUMNS)]
    if len(fitting) != 1 or not len(fitting[0]):
        found = ", ".join(f"{name} {value.shape}" for name, value in matrices.items()) or "nothing"
        raise DataError(
            f"{path}: it must hold one matrix of the {len(COLUMNS)} columns {', '.join(COLUMNS)}; it holds {found}"
        )
    return fitting[0].astype(np.float64), np.arange(1, len(fitting[0]) + 1)
