"""Prepared datasets on disk: made from raw files in one atomic step, loaded as packed sequences."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from rich.console import Console

from recsys.data.cards import Counts, DatasetCard, card_paths, load_card
from recsys.data.locate import changed_files, find_raw, hash_files, locate_raw, resolve_data_root, sources_of
from recsys.data.policies import PreparedEvents, PrepareOptions, apply_policies
from recsys.data.raw import RawEvents
from recsys.data.schema import INTERACTIONS, ITEMS, USERS, DataError
from recsys.data.sequences import Sequences
from recsys.data.split import GlobalTime, LeaveOneOut, PerDomainLast, make_split, split_report
from recsys.data.ties import tie_report

LAYOUT = 1
"""Raised when the same raw files and options give another result, so that older results are not taken for it."""


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset on disk."""

    path: Path
    meta: dict[str, Any]
    """The content of `meta.json`."""


@dataclass(frozen=True)
class DatasetStatus:
    """A known dataset, and what of it is here."""

    card: DatasetCard
    raw: Path | None
    """The folder with its raw files."""
    prepared: tuple[Path, ...]
    """Its prepared variants."""


def list_datasets(data_root: Path | str | None = None) -> list[DatasetStatus]:
    """All datasets with a card, by name."""
    root = resolve_data_root(data_root)
    statuses = []
    for name in card_paths(root):
        card = load_card(name, root)
        files = find_raw(card, root)
        folder = next(iter(files.values())).parent if files else None
        variants = sorted(path.parent for path in (root / "processed" / name).glob("[!.]*/meta.json"))
        statuses.append(DatasetStatus(card, folder, tuple(variants)))
    return statuses


def prepare(
    dataset: str | DatasetCard,
    data_root: Path | str | None = None,
    raw: Path | None = None,
    options: PrepareOptions | None = None,
    force: bool = False,
    allow_changed_raw: bool = False,
) -> Prepared:
    """The prepared dataset `<data-root>/processed/<name>/<variant>/`, made unless it is there for these raw files.

    `options` replaces the card's own preparation. `allow_changed_raw` accepts raw files whose hashes or counts are not
    those of the card.
    Raises DataError for whatever is wrong with the input; an earlier result stays as it was then.
    """
    root = resolve_data_root(data_root)
    card = load_card(dataset, root) if isinstance(dataset, str) else dataset
    options = card.prepare if options is None else options
    path = variant_path(card, root, options)
    present = path.is_dir()
    if present and not force and raw is None and find_raw(card, root) is None:
        return Prepared(path, read_meta(path))

    with _progress() as step:
        files = locate_raw(card, root, raw)
        step("hashing the raw files")
        hashes = hash_files(files)
        changed = changed_files(card, hashes)
        if changed and not allow_changed_raw:
            raise DataError(
                "\n".join(
                    [
                        f"raw files of {card.name} in {next(iter(files.values())).parent} are not those of the card:",
                        *changed,
                        f"Get them again (source: {card.source}), or accept them as they are with --allow-changed-raw.",
                    ]
                )
            )
        if present and not force:
            earlier = read_meta(path)
            differences = [*earlier["published_differences"], *_published_differences(card, options, earlier)]
            if earlier["raw_files"] == hashes and not differences:
                return Prepared(path, earlier)
        step("reading")
        raw_events = card.format.read(sources_of(card, files), card.domains)
        step("preparing")
        events = apply_policies(raw_events, card.domains, options)
        sequences = _pack(events)
        step("counting")
        meta: dict[str, Any] = {
            "dataset": card.name,
            "title": card.title,
            "source": card.source,
            "licence": card.licence,
            "variant": path.name,
            "fingerprint": sequences.fingerprint,
            "time_unit": events.time_unit,
            "days": _days(sequences),
            "options": options.model_dump(mode="json"),
            "raw_files": hashes,
            "changed_raw_files": bool(changed),
            "versions": _versions(),
            "source_counts": {
                "users": raw_events.frame["user"].nunique(),
                "items": raw_events.frame["item"].nunique(),
                "events": len(raw_events.frame),
            },
            "repairs": events.repairs,
            "counts": _counts(sequences),
            "ties": {
                "source": events.source_ties,
                "prepared": tie_report(events.frame) if events.source_ties else None,
            },
            "splits": _splits(sequences),
        }
        differences = [*raw_events.differences, *_published_differences(card, options, meta)]
        _refuse_differences(card, differences, allow_changed_raw)
        meta["published_differences"] = differences
        step("writing")
        _replace(path, lambda directory: _write(directory, raw_events, events, sequences, meta), present)
    return Prepared(path, meta)


def load_prepared(
    dataset: str | DatasetCard, data_root: Path | str | None = None, options: PrepareOptions | None = None
) -> tuple[Sequences, dict[str, Any]]:
    """Packed sequences and `meta.json` of a dataset; prepared first if only its raw files are there."""
    root = resolve_data_root(data_root)
    card = load_card(dataset, root) if isinstance(dataset, str) else dataset
    options = card.prepare if options is None else options
    path = variant_path(card, root, options)
    if not path.is_dir():
        if find_raw(card, root) is None:
            raise DataError(
                f"{card.name} is not prepared ({path} is not there) and its raw files were not found; "
                f"run `recsys data prepare {card.name} --raw DIR` with the folder of its raw files"
                + (f" and --data-root {root}" if data_root is not None else "")
            )
        prepare(card, root, options=options)
    return Sequences.load(path), read_meta(path)


class NamedItem(NamedTuple):
    """An item as its source knows it. A raw id may name several items, one in each of several domains."""

    item: int
    domain: int
    raw: str
    title: str | None


def load_items(
    dataset: str, data_root: Path | str | None = None, options: PrepareOptions | None = None
) -> tuple[NamedItem, ...]:
    """The items of a prepared dataset."""
    table = pa.parquet.read_table(locate_prepared(dataset, data_root, options) / "items.parquet").to_pydict()
    columns = (table[name] for name in ("item", "domain", "raw_item", "title"))
    return tuple(NamedItem(*row) for row in zip(*columns, strict=True))


def locate_prepared(dataset: str, data_root: Path | str | None = None, options: PrepareOptions | None = None) -> Path:
    """The directory of a prepared dataset, there or not."""
    root = resolve_data_root(data_root)
    card = load_card(dataset, root)
    return variant_path(card, root, card.prepare if options is None else options)


def variant_path(card: DatasetCard, data_root: Path, options: PrepareOptions) -> Path:
    """Where a dataset lies once it is prepared in this way: the hash covers how it is read and what is done to it."""
    reading = card.model_dump(mode="json", include={"name", "format", "files", "domains"})
    what = json.dumps([LAYOUT, reading, options.model_dump(mode="json")], sort_keys=True)
    return data_root / "processed" / card.name / hashlib.sha256(what.encode()).hexdigest()[:8]


def read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}/meta.json cannot be read ({error}); delete the folder and prepare it again") from None
    return meta


def _pack(events: PreparedEvents) -> Sequences:
    frame = events.frame
    return Sequences.pack(
        items=frame["item"].to_numpy(),
        domains=frame["domain"].to_numpy(),
        times=frame["timestamp"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(frame["user"]))]),
        domain_names=events.domain_names,
        item_domain=np.concatenate([[-1], events.item_domain]),
        time_unit=events.time_unit,
    )


def _days(sequences: Sequences) -> list[str] | None:
    """The days (UTC) of the first and the last event."""
    if sequences.time_unit == "order":
        return None
    first_and_last = (int(sequences.times.min()), int(sequences.times.max()))
    return [datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d") for seconds in first_and_last]


def _counts(sequences: Sequences) -> dict[str, Any]:
    """Users, items and events, in all and by domain; overlapping users have events in two domains or more."""
    domain_of_user = np.unique(sequences.event_users() * sequences.num_domains + sequences.domains)
    users = np.bincount(domain_of_user % sequences.num_domains, minlength=sequences.num_domains)
    items = np.bincount(sequences.item_domain[1:], minlength=sequences.num_domains)
    events = np.bincount(sequences.domains, minlength=sequences.num_domains)
    domains_per_user = np.bincount(domain_of_user // sequences.num_domains, minlength=sequences.num_users)
    lengths = np.diff(sequences.offsets)
    return {
        "users": sequences.num_users,
        "items": sequences.num_items,
        "events": len(sequences.items),
        "overlapping_users": int((domains_per_user >= 2).sum()),
        "length": {"mean": float(lengths.mean()), "min": int(lengths.min()), "max": int(lengths.max())},
        "domains": {
            name: {"users": int(users[index]), "items": int(items[index]), "events": int(events[index])}
            for index, name in enumerate(sequences.domain_names)
        },
    }


def _splits(sequences: Sequences) -> dict[str, Any]:
    """The report of every split at its default options; of one that does not fit this dataset, why."""
    reports: dict[str, Any] = {}
    for config in (LeaveOneOut(), PerDomainLast(), GlobalTime()):
        try:
            reports[config.name] = split_report(sequences, make_split(sequences, config))
        except DataError as error:
            reports[config.name] = {"not_possible": str(error)}
    return reports


def _published_differences(card: DatasetCard, options: PrepareOptions, meta: dict[str, Any]) -> list[str]:
    """Where the counts are not the published ones; those after preparation are compared at the card's own options."""
    differences: list[str] = []
    if card.published.source is not None:
        differences += _differences("in the raw files", card.published.source, meta["source_counts"])
    if card.published.prepared is not None and options == card.prepare:
        split = meta["splits"]["leave_one_out"]
        counts = meta["counts"]
        found = {
            "users": counts["users"],
            "items": {name: domain["items"] for name, domain in counts["domains"].items()},
            "events": {name: domain["events"] for name, domain in counts["domains"].items()},
            "validation": split["validation"],
            "test": split["test"],
        }
        differences += _differences("after preparation", card.published.prepared, found)
    return differences


def _refuse_differences(card: DatasetCard, differences: list[str], allowed: bool) -> None:
    if differences and not allowed:
        raise DataError(
            "\n".join(
                [
                    f"{card.name} does not have its published counts:",
                    *(f"  {difference}" for difference in differences),
                    "The raw files are of another version, or the card is wrong. "
                    f"Get the files again (source: {card.source}), or accept them with --allow-changed-raw.",
                ]
            )
        )


def _differences(where: str, published: Counts, found: dict[str, Any]) -> Iterator[str]:
    for name, expected in published.model_dump(exclude_none=True).items():
        value = found.get(name)
        if isinstance(expected, int) and isinstance(value, dict):
            value = sum(value.values())
        if isinstance(expected, dict) and isinstance(value, dict):
            value = {domain: value.get(domain, 0) for domain in expected}
        if value != expected:
            yield f"{name} {where}: published {_shown(expected)}, found {_shown(value)}"


def _shown(counts: int | dict[str, int] | None) -> str:
    if isinstance(counts, dict):
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return "not counted" if counts is None else f"{counts:,}"


def _write(directory: Path, raw: RawEvents, events: PreparedEvents, sequences: Sequences, meta: dict[str, Any]) -> None:
    frame = events.frame
    ratings = pa.array(frame["rating"].to_numpy(), mask=frame["rating"].isna().to_numpy())
    columns = [pa.array(frame[name].to_numpy()) for name in INTERACTIONS.names[:-1]]
    write_table(pa.table([*columns, ratings], schema=INTERACTIONS), directory / "interactions.parquet")
    items = [
        np.arange(1, len(events.items) + 1, dtype=np.int32),
        events.item_domain,
        pa.array(events.items, pa.string()),
        pa.array([raw.titles.get(name) for name in events.items], pa.string()),
    ]
    write_table(pa.table(items, schema=ITEMS), directory / "items.parquet")
    users = [np.arange(len(events.users), dtype=np.int32), pa.array(events.users, pa.string())]
    write_table(pa.table(users, schema=USERS), directory / "users.parquet")
    sequences.save(directory)
    text = json.dumps(meta, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "meta.json").write_text(text + "\n", encoding="utf-8")


def write_table(table: pa.Table, path: Path) -> None:
    pa.parquet.write_table(table, path, compression="zstd")


def _replace(path: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Fills a sibling directory and renames it into place, so that `path` is there whole or not at all.

    After a failure what was there before is there again. Without `overwrite`, a `path` that another process has made
    in the meantime stays: it has the same content.
    """
    fresh = path.parent / f".{path.name}-{os.getpid()}-new"
    stale = path.parent / f".{path.name}-{os.getpid()}-old"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        if overwrite:
            path.rename(stale)
        try:
            fresh.rename(path)
        except BaseException:
            if overwrite:
                stale.rename(path)
            elif path.is_dir():
                return
            raise
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{path} could not be written: {error}. Nothing half-written is left; make room or grant access there, "
            "or choose another place with --data-root."
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _versions() -> dict[str, str]:
    import recsys

    return {
        "recsys": recsys.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pandas": pd.__version__,
        "pyarrow": pa.__version__,
    }


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner that names the step, where a terminal is there to see it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)
