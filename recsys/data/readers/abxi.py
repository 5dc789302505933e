"""The text format of ABXI (WWW 2025): one user per line, `user item|time item|time …`, with maps to the raw ids."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Int16, Int64

from recsys.data.raw import RawEvents, Source, bad_rows, check_times, read_text, read_titles
from recsys.data.schema import DataError, bad_lines
from recsys.loading import Config

_LINE = re.compile(r"\d{1,9}(?: \d{1,9}\|-?\d{1,18})+")
_INTEGER = re.compile(r"-?\d{1,18}")


class AbxiFormat(Config):
    """Files by their names in the card. Only `sequences` is needed where `domain_sizes` gives the domain of an item."""

    name: Literal["abxi"] = "abxi"
    sequences: str
    item_map: str | None = None
    """JSON `{raw item: [index, domain]}`; without it the raw item is its index."""
    user_map: str | None = None
    """JSON `{raw user: index}`."""
    titles: str | None = None
    """TSV with the columns `asin` and `title`."""
    domain_sizes: tuple[int, ...] | None = None
    """Items per domain: the first n items are of the first domain, and so on. Checked against the map if both exist."""

    def file_names(self) -> list[str]:
        return [name for name in (self.sequences, self.item_map, self.user_map, self.titles) if name]

    def check(self, domains: tuple[str, ...], file_domains: Mapping[str, str | None]) -> str | None:
        """What is wrong with this format in a card of these domains; None if nothing."""
        if self.domain_sizes is not None and len(self.domain_sizes) != len(domains):
            return f"format.domain_sizes has {len(self.domain_sizes)} numbers for {len(domains)} domains"
        if self.domain_sizes is None and self.item_map is None:
            return "format needs item_map or domain_sizes, to know the domain of an item"
        return None

    def read(self, sources: Mapping[str, Source], domains: tuple[str, ...]) -> RawEvents:
        """The events of the files that are there, by their names in the card."""
        paths = {name: source.path for name, source in sources.items()}
        path = paths[self.sequences]
        user, item, timestamp, line = _read_sequences(path)
        check_times(path, timestamp, line)
        item_ids, item_domain, raw_items = self._items(paths, domains)
        row = np.searchsorted(item_ids, item)
        unknown = (row == len(item_ids)) | (item_ids[np.minimum(row, len(item_ids) - 1)] != item)
        if unknown.any():
            mapped = self.item_map is not None and self.item_map in paths
            source = self.item_map if mapped else "format.domain_sizes of the card"
            raise bad_rows(
                path,
                unknown,
                lambda at: f"line {line[at]}: the item {item[at]} is not among the {len(item_ids):,} items of {source}",
                "The files do not belong together; get all of them from one place.",
            )
        users, user_row = np.unique(user, return_inverse=True)
        frame = pd.DataFrame(
            {
                "user": user_row.astype(np.int32),
                "item": row.astype(np.int32),
                "domain": item_domain[row],
                "timestamp": timestamp,
                "rating": np.full(len(row), np.nan, dtype=np.float32),
                "file": np.zeros(len(row), dtype=np.int16),
                "line": line,
            }
        )
        return RawEvents(
            frame=frame,
            users=self._users(paths, users),
            items=raw_items,
            files=(path.name,),
            differences=self._differences(item_ids, item_domain, domains),
            titles=read_titles(paths[self.titles]) if self.titles and self.titles in paths else {},
        )

    def _items(
        self, paths: Mapping[str, Path], domains: tuple[str, ...]
    ) -> tuple[Int64[np.ndarray, " items"], Int16[np.ndarray, " items"], np.ndarray]:
        """Index, domain and raw id of every item, by ascending index."""
        if self.item_map is None or self.item_map not in paths:
            if self.domain_sizes is None:
                raise DataError(
                    f"{self.item_map} is not there, and without it the domain of an item is unknown; "
                    "get the file, or give format.domain_sizes in the card"
                )
            domain = np.repeat(np.arange(len(domains), dtype=np.int16), self.domain_sizes)
            ids = np.arange(1, len(domain) + 1)
            return ids, domain, ids.astype(str).astype(object)
        path = paths[self.item_map]
        entries = _read_json_object(path)
        ids, domain = _item_numbers(path, entries, len(domains))
        order = np.argsort(ids, kind="stable")
        ids, domain = ids[order], domain[order]
        repeated = np.flatnonzero(ids[1:] == ids[:-1])
        if len(repeated):
            raise bad_lines(
                str(path),
                [f"the index {ids[at]} is given to two items" for at in repeated],
                len(repeated),
                "The map is damaged; get it again.",
            )
        return ids, domain, np.array(list(entries), dtype=object)[order]

    def _differences(
        self, ids: Int64[np.ndarray, " items"], domain: Int16[np.ndarray, " items"], names: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The map against `domain_sizes`, which say the same of the published files."""
        if self.domain_sizes is None:
            return ()
        expected = np.repeat(np.arange(len(names)), self.domain_sizes)
        if np.array_equal(domain, expected) and ids[-1] == len(ids):
            return ()
        found = dict(zip(names, np.bincount(domain, minlength=len(names)).tolist(), strict=True))
        given = dict(zip(names, self.domain_sizes, strict=True))
        return (f"items in {self.item_map}: {found}, the card's format.domain_sizes: {given}, in this order of ids",)

    def _users(self, paths: Mapping[str, Path], users: Int64[np.ndarray, " users"]) -> np.ndarray:
        """The raw id of each user index, which is the index itself where no map is."""
        names = users.astype(str).astype(object)
        if self.user_map is None or self.user_map not in paths:
            return names
        path = paths[self.user_map]
        entries = _read_json_object(path)
        wrong = [raw for raw, index in entries.items() if type(index) is not int]
        if wrong:
            problems = [f"the entry of user {raw!r} is {entries[raw]!r}, not a number" for raw in wrong]
            raise bad_lines(str(path), problems, len(wrong), "The map is damaged; get it again.")
        raw_of = {index: raw for raw, index in entries.items()}
        missing = [index for index in users.tolist() if index not in raw_of]
        if missing:
            raise bad_lines(
                str(path),
                [f"user {index} of {self.sequences} is not in the map" for index in missing],
                len(missing),
                "The files do not belong together; get both from one place.",
            )
        return np.array([raw_of[index] for index in users.tolist()], dtype=object)


def _read_sequences(path: Path) -> tuple[Int64[np.ndarray, " events"], ...]:
    """User, item, time and line of every event."""
    text = read_text(path)
    numbers: list[int] = []
    lengths, line_numbers = [], []
    problems: list[str] = []
    num_problems = 0
    first_line: dict[int, int] = {}
    for line_number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        problem = None if _LINE.fullmatch(line) else _diagnose(line)
        if problem is None:
            values = [int(number) for number in line.replace("|", " ").split()]
            if line_number != (earlier := first_line.setdefault(values[0], line_number)):
                problem = f"user {values[0]} has a line already (line {earlier})"
        if problem is None:
            numbers += values
            lengths.append(len(values) // 2)
            line_numbers.append(line_number)
        else:
            num_problems += 1
            problems.append(f"line {line_number}: {problem}")
    if not problems and not text.endswith("\n") and numbers[-1] < numbers[-3] and lengths[-1] > 1:
        # Times ascend within a line, so a last time that falls, in a file without a last line end, is half a number.
        num_problems = 1
        problems = [f"line {line_numbers[-1]}: the file ends in the middle of the time {numbers[-1]}"]
    if problems:
        raise bad_lines(
            str(path),
            problems,
            num_problems,
            "Each line must read `user item|time item|time …`, all of them whole numbers. "
            "If the end of the file is missing, get it again.",
        )
    per_line = np.asarray(lengths)
    flat = np.asarray(numbers, dtype=np.int64)
    is_user = np.zeros(len(flat), dtype=bool)
    is_user[np.concatenate([[0], np.cumsum(2 * per_line + 1)[:-1]])] = True
    pairs = flat[~is_user].reshape(-1, 2)
    return np.repeat(flat[is_user], per_line), pairs[:, 0], pairs[:, 1], np.repeat(np.asarray(line_numbers), per_line)


def _diagnose(line: str) -> str | None:
    """Why a line does not have the plain form; None if it differs in blanks only."""
    user, *events = line.split()
    if not _INTEGER.fullmatch(user):
        return f"the user id {user!r} is not a number"
    if not events:
        return f"user {user} has no events; the line is cut short"
    for event in events:
        item, bar, seconds = event.partition("|")
        if not item.isascii() or not item.isdigit() or len(item) > 9:
            return f"the item id {item!r} is not a number"
        if not bar or not seconds:
            return f"{event!r} has no time; the line is cut short"
        if not _INTEGER.fullmatch(seconds):
            return f"the time {seconds!r} is not a number"
    return None


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); get the file again"
        ) from None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path} must hold one JSON object that maps raw ids to numbers; get the file again")
    return entries


def _item_numbers(
    path: Path, entries: dict[str, Any], num_domains: int
) -> tuple[Int64[np.ndarray, " items"], Int16[np.ndarray, " items"]]:
    """Index and domain of every entry of an item map, in its order."""

    def valid(entry: Any) -> bool:
        return (
            isinstance(entry, list)
            and len(entry) == 2
            and all(type(number) is int for number in entry)
            and entry[0] >= 1
            and 0 <= entry[1] < num_domains
        )

    wrong = [raw for raw, entry in entries.items() if not valid(entry)]
    if wrong:
        raise bad_lines(
            str(path),
            [f"the entry of item {raw!r} is {entries[raw]!r}" for raw in wrong],
            len(wrong),
            f"An entry must be [index, domain], with an index from 1 and a domain from 0 to {num_domains - 1}.",
        )
    pairs = np.array(list(entries.values()), dtype=np.int64)
    return pairs[:, 0], pairs[:, 1].astype(np.int16)
