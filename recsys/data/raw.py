"""What every reader returns: the events of a source in the order of its files, with the place each was read at."""

import gzip
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from recsys.data.schema import SHOWN, DataError, bad_lines
from recsys.data.sequences import TimeUnit

DAY = 86_400
YEAR_1990 = 631_152_000
YEAR_2100 = 4_102_444_800


@dataclass(frozen=True)
class Source:
    """A raw file that was found, and the one domain of its events if the card gives it one."""

    path: Path
    domain: str | None = None


@dataclass(frozen=True)
class RawEvents:
    """Events as the source has them: nothing is sorted, repaired or filtered yet."""

    frame: pd.DataFrame
    """One row per event in file order: `user` and `item` (rows of `users` and `items`), `domain` (index),
    `timestamp` (seconds, or any key to order by), `rating` (NaN where there is none), `file` (index into `files`)
    and `line` (from 1)."""
    users: np.ndarray
    """Raw user ids in canonical order."""
    items: np.ndarray
    """Raw item ids in canonical order; the item ids of the prepared dataset follow it within each domain."""
    files: tuple[str, ...]
    time_unit: TimeUnit = "seconds"
    titles: dict[str, str] = field(default_factory=dict)
    """Raw item id -> title, where known."""
    differences: tuple[str, ...] = ()
    """Where the files are not as the card says, though they can be read."""

    def places(self, rows: Int[np.ndarray, " chosen"]) -> list[str]:
        """ "file line 3, user 'u', item 'i'" for the first few of some rows: what an error message points at."""
        events = self.frame.iloc[rows[:SHOWN]]
        return [
            f"{self.files[file]} line {line}, user {self.users[user]!r}, item {self.items[item]!r}"
            for file, line, user, item in zip(
                events["file"], events["line"], events["user"], events["item"], strict=True
            )
        ]


def read_bytes(path: Path) -> bytes:
    """The unpacked content of a file, `.gz` or plain, without a byte order mark. An empty file is an error."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); get it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: the text is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise DataError(f"{path}: the file is empty; get it again, or correct the card if it names the wrong file")
    return content


def read_text(path: Path) -> str:
    """`read_bytes`, decoded."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8 text; convert the file to UTF-8") from None


def read_titles(path: Path) -> dict[str, str]:
    """Raw item id -> title of a TSV with the columns `asin` (or `raw_item`) and `title`, perhaps among others."""
    header, *rows = read_text(path).replace("\r\n", "\n").split("\n")
    columns = header.split("\t")
    key = "raw_item" if "raw_item" in columns else "asin"
    for needed in (key, "title"):
        if needed not in columns:
            raise DataError(f"{path}: there is no column {needed!r}; the columns are: {', '.join(columns)}")
    item, title = columns.index(key), columns.index("title")
    cells = [row.split("\t") for row in rows if row]
    short = [at for at, row in enumerate(cells) if len(row) != len(columns)]
    if short:
        problems = [f"line {at + 2}: {len(cells[at])} fields, not {len(columns)}" for at in short]
        raise bad_lines(str(path), problems, len(short), "The file is damaged; get it again, or leave it out.")
    return {row[item]: row[title] for row in cells}


def is_seconds(times: Int[np.ndarray, " events"]) -> bool:
    """Whether all of some times, read as seconds, lie between 1990 and today."""
    return bool(len(times) and times.min() >= YEAR_1990 and times.max() <= time.time() + DAY)


def check_times(
    origin: Path,
    seconds: Int[np.ndarray, " events"],
    lines: Int[np.ndarray, " events"],
    milliseconds_mend: str = "divide the times by 1000",
) -> None:
    """Refuses times before 1970, times to come, times that are milliseconds, and single times before 1990 where most
    are later, as a number that was cut short gives them; each with its lines.
    """
    limit = int(time.time()) + DAY  # a day of grace for clocks and time zones
    wrong = (seconds < 0) | (seconds > limit)
    if len(seconds) and np.median(seconds) >= YEAR_1990:
        wrong |= seconds < YEAR_1990
    if not wrong.any():
        return
    milliseconds = (seconds > YEAR_2100) & (seconds // 1000 >= YEAR_1990) & (seconds // 1000 <= limit)

    def describe(row: int) -> str:
        value = int(seconds[row])
        if value < 0:
            return f"line {lines[row]}: the timestamp {value} is negative (before 1970)"
        if milliseconds[row]:
            return f"line {lines[row]}: the timestamp {value} is in milliseconds, not in seconds"
        if value < YEAR_1990:
            day = f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d}"
            return f"line {lines[row]}: the timestamp {value} ({day}) lies long before most others; is it cut short?"
        when = f" ({datetime.fromtimestamp(value, UTC):%Y-%m-%d})" if value < 253_402_300_800 else ""
        return f"line {lines[row]}: the timestamp {value}{when} lies in the future"

    mend = "correct or remove these lines"
    if milliseconds.any():
        mend = f"{milliseconds_mend[0].upper()}{milliseconds_mend[1:]}"
    raise bad_rows(origin, wrong, describe, f"{mend}.")


def bad_rows(origin: Path, wrong: Bool[np.ndarray, " events"], describe: Callable[[int], str], mend: str) -> DataError:
    """The error for the rows where `wrong` holds, each put in words by `describe`."""
    rows = np.flatnonzero(wrong)
    return bad_lines(str(origin), [describe(int(row)) for row in rows[:SHOWN]], len(rows), mend)


def canonical_order(ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " ids"]:
    """Positions that sort raw ids: as numbers where all are whole numbers, else as text. Independent of file order."""
    texts = np.asarray(ids, dtype=object)
    if all(text.isascii() and text.isdigit() and len(text) <= 18 for text in texts):
        return np.lexsort((texts.astype(str), texts.astype(np.int64)))
    return np.argsort(texts.astype(str), kind="stable")
