"""Where the data is: the data root, the raw files of a card, and their hashes."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pooch

from recsys.data.cards import DatasetCard
from recsys.data.raw import Source
from recsys.data.schema import DataError


def resolve_data_root(data_root: Path | str | None = None) -> Path:
    """The argument, else the environment's RECSYS_DATA, else `./data`."""
    return Path(data_root or os.environ.get("RECSYS_DATA") or "data")


def raw_folders(card: DatasetCard, data_root: Path, raw: Path | None) -> list[Path]:
    """Where the raw files of a card may lie, in the order they are looked for."""
    if raw is not None:
        return [raw]
    names = dict.fromkeys([card.name, card.folder or card.name])
    return [*(data_root / "raw" / name for name in names), data_root / (card.folder or card.name)]


def present_files(card: DatasetCard, folder: Path) -> dict[str, Path] | None:
    """The raw files of a card in a folder, by their names in the card; None if one that is needed is missing.

    An alternative that stands for a missing file goes under the name of the file it stands for.
    """
    found = {name: folder / name for name in card.files if (folder / name).is_file()}
    for name, file in card.files.items():
        if file.alternative_to is not None and name in found:
            path = found.pop(name)
            found.setdefault(file.alternative_to, path)
    return found if all(name in found for name in _needed(card)) else None


def find_raw(card: DatasetCard, data_root: Path, raw: Path | None = None) -> dict[str, Path] | None:
    """The raw files in the first folder that has all that are needed; None if no folder has."""
    for folder in raw_folders(card, data_root, raw):
        found = present_files(card, folder)
        if found is not None:
            return found
    return None


def sources_of(card: DatasetCard, paths: Mapping[str, Path]) -> dict[str, Source]:
    """What a reader gets, in the order of the card."""
    return {name: Source(paths[name], file.domain) for name, file in card.files.items() if name in paths}


def locate_raw(card: DatasetCard, data_root: Path, raw: Path | None = None) -> dict[str, Path]:
    """The raw files; fetched to `<data-root>/raw/<name>` if they lie nowhere and the card knows their addresses.

    Raises DataError that lists where it looked, what should lie there and where it comes from.
    """
    found = find_raw(card, data_root, raw)
    if found is not None:
        return found
    if raw is None and all(card.files[name].url for name in _needed(card)):
        _download(card, data_root / "raw" / card.name)
        found = find_raw(card, data_root)
        assert found is not None
        return found
    looked = [
        f"  {folder}: " + ("no " + ", ".join(_missing(card, folder)) if folder.is_dir() else "no such folder")
        for folder in raw_folders(card, data_root, raw)
    ]
    others = [name for name in card.files if name not in _needed(card)]
    raise DataError(
        "\n".join(
            [
                f"the raw files of {card.name} are missing; looked in",
                *looked,
                f"files needed: {', '.join(_needed(card))}"
                + (f" (used if there: {', '.join(others)})" if others else ""),
                f"source: {card.source}",
                "Put the files into one of these folders, or name another with --raw or --data-root.",
            ]
        )
    )


def hash_files(paths: Mapping[str, Path]) -> dict[str, dict[str, str | int]]:
    """`sha256` and `bytes` of each raw file, by file name."""
    hashes: dict[str, dict[str, str | int]] = {}
    for path in paths.values():
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        hashes[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    return hashes


def changed_files(card: DatasetCard, hashes: Mapping[str, Mapping[str, str | int]]) -> list[str]:
    """One line for each raw file that is not the one the card describes."""
    changed = []
    for name, found in hashes.items():
        expected = card.files[name]
        if expected.sha256 not in (None, found["sha256"]) or expected.bytes not in (None, found["bytes"]):
            changed.append(
                f"  {name}: expected sha256 {expected.sha256 or '(unknown)'}, {expected.bytes or '?'} bytes; "
                f"found sha256 {found['sha256']}, {found['bytes']} bytes"
            )
    return changed


def _needed(card: DatasetCard) -> list[str]:
    return [name for name, file in card.files.items() if not file.optional and file.alternative_to is None]


def _missing(card: DatasetCard, folder: Path) -> list[str]:
    return [name for name in _needed(card) if not (folder / name).is_file()]


def _download(card: DatasetCard, folder: Path) -> None:
    """All files with an address, checked against their hashes; a fetch that fails is tried again twice."""
    files = {name: file for name, file in card.files.items() if file.url and file.alternative_to is None}
    fetcher = pooch.create(
        path=folder,
        base_url="",
        registry={name: file.sha256 and f"sha256:{file.sha256}" for name, file in files.items()},
        urls={name: file.url for name, file in files.items()},
        retry_if_failed=2,
    )
    for name, file in files.items():
        try:
            fetcher.fetch(name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{name} of {card.name} could not be fetched from {file.url}: {error}\n"
                f"Try again, or put the file into {folder} by hand (source: {card.source})."
            ) from None
