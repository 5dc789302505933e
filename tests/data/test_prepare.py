import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from recsys.data import prepare as prepare_module
from recsys.data.cards import DatasetCard
from recsys.data.policies import PrepareOptions
from recsys.data.prepare import list_datasets, load_prepared, prepare, variant_path
from recsys.data.schema import INTERACTIONS, ITEMS, USERS, DataError
from recsys.data.split import LeaveOneOut, make_split
from recsys.loading import dump_yaml

MakeCard = Callable[..., DatasetCard]
Write = Callable[..., Path]


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_tables_of_the_small_shop(card: MakeCard, write: Write, tmp_path: Path) -> None:
    prepared = prepare(card(), tmp_path, raw=write())
    tables = {
        name: pa.parquet.read_table(prepared.path / f"{name}.parquet") for name in ("interactions", "items", "users")
    }
    assert tables["interactions"].schema == INTERACTIONS
    assert tables["items"].schema == ITEMS
    assert tables["users"].schema == USERS
    assert tables["interactions"].to_pydict() == {
        "user": [0, 0, 0, 1, 1, 1, 1, 2],
        "item": [2, 4, 1, 2, 3, 4, 1, 2],
        "domain": [0, 1, 0, 0, 1, 1, 0, 0],
        "timestamp": [100, 200, 200, 150, 300, 300, 400, 500],
        "rating": [5, 4, None, 3, 2, 1, 5, 5],
    }
    assert tables["items"].to_pydict() == {
        "item": [1, 2, 3, 4],
        "domain": [0, 0, 1, 1],
        "raw_item": ["rice", "tea", "cup", "pan"],
        "title": [None] * 4,
    }
    assert tables["users"].to_pydict() == {"user": [0, 1, 2], "raw_user": ["ann", "bob", "cleo"]}


def test_the_report_of_the_small_shop(card: MakeCard, write: Write, tmp_path: Path, events: str) -> None:
    folder = write()
    prepared = prepare(card(), tmp_path, raw=folder)
    meta = prepared.meta
    assert json.loads((prepared.path / "meta.json").read_text()) == meta
    assert meta["counts"] == {
        "users": 3,
        "items": 4,
        "events": 8,
        "overlapping_users": 2,
        "length": {"mean": 8 / 3, "min": 1, "max": 4},
        "domains": {"food": {"users": 3, "items": 2, "events": 5}, "kitchen": {"users": 2, "items": 2, "events": 3}},
    }
    sha256 = hashlib.sha256(events.encode()).hexdigest()
    assert meta["raw_files"] == {"events.csv": {"sha256": sha256, "bytes": len(events)}}
    assert set(meta["versions"]) == {"recsys", "python", "numpy", "pandas", "pyarrow"}
    assert meta["repairs"]["users_with_one_event"] == 1
    assert meta["ties"]["source"]["tied"] == 2
    assert meta["ties"]["source"]["across_domains"] == 1
    assert meta["ties"]["source"]["by_domain_index_share"] == 0.0
    assert meta["days"] == ["1970-01-01", "1970-01-01"]
    loo = meta["splits"]["leave_one_out"]
    assert loo["test"] == {"food": 2, "kitchen": 0}
    assert loo["validation"] == {"food": 0, "kitchen": 2}
    assert loo["users_not_evaluated"] == 1
    assert loo["tied_test_share"] == 0.5  # ann's rice at 200, with the pan before it
    # Training times 100, 150, 300, 500: two later than 200, one later than 400.
    assert loo["later_train_share"] == (2 / 4 + 1 / 4) / 2


def test_the_sequences_are_those_of_the_table(card: MakeCard, write: Write, tmp_path: Path) -> None:
    write()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw-files").rename(tmp_path / "raw/shop")
    sequences, meta = load_prepared(card(), tmp_path)  # prepares by itself: the raw files are where they belong
    table = pa.parquet.read_table(variant_path(card(), tmp_path, PrepareOptions()) / "interactions.parquet")
    np.testing.assert_array_equal(sequences.items, table["item"])
    np.testing.assert_array_equal(sequences.domains, table["domain"])
    np.testing.assert_array_equal(sequences.times, table["timestamp"])
    np.testing.assert_array_equal(sequences.event_users(), table["user"])
    assert sequences.domain_names == ("food", "kitchen")
    assert sequences.item_domain.tolist() == [-1, 0, 0, 1, 1]
    assert sequences.fingerprint == meta["fingerprint"]
    assert make_split(sequences, LeaveOneOut()).hash == meta["splits"]["leave_one_out"]["hash"]


def test_loading_what_is_not_there_names_the_command(card: MakeCard, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_prepared(card(), tmp_path)
    assert "recsys data prepare shop --raw DIR" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_same_input_gives_the_same_bytes(card: MakeCard, write: Write, tmp_path: Path) -> None:
    options = PrepareOptions(ties="seeded_random", tie_seed=5)
    folder = write()
    first = prepare(card(), tmp_path / "a", raw=folder, options=options)
    second = prepare(card(), tmp_path / "b", raw=folder, options=options)
    assert files_below(first.path) == files_below(second.path)
    assert first.path.name == second.path.name == first.meta["variant"]
    shuffled = files_below(prepare(card(), tmp_path / "a", raw=folder, options=options, force=True).path)
    assert shuffled == files_below(first.path)


def test_each_way_of_preparing_has_its_place(card: MakeCard, write: Write, tmp_path: Path) -> None:
    folder = write()
    dropped = PrepareOptions(ties="drop")
    paths = {
        prepare(card(), tmp_path, raw=folder).path,
        prepare(card(), tmp_path, raw=folder, options=dropped).path,
        prepare(card(prepare="{ties: drop}"), tmp_path, raw=folder).path,  # the same as the one before it
        prepare(card(title="Another title"), tmp_path, raw=folder).path,  # the same as the first
        prepare(card(domains="[kitchen, food]"), tmp_path, raw=folder).path,
    }
    assert len(paths) == 3
    sequences, meta = load_prepared(card(), tmp_path, dropped)
    assert meta["ties"]["prepared"]["tied"] == 0
    assert len(sequences.items) == 4


def test_a_prepared_dataset_is_made_again_only_for_other_raw_files(
    card: MakeCard, write: Write, tmp_path: Path, events: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    calls = []
    original = prepare_module._replace
    monkeypatch.setattr(prepare_module, "_replace", lambda *args: (calls.append(1), original(*args)))
    first = prepare(card(), tmp_path, raw=folder)
    again = prepare(card(), tmp_path, raw=folder)
    without_raw = prepare(card(), tmp_path)
    assert first == again == without_raw
    assert len(calls) == 1
    write(events + "cleo,pan,kitchen,600,1\n")
    assert prepare(card(), tmp_path, raw=folder).meta["counts"]["events"] == 9
    assert len(calls) == 2
    prepare(card(), tmp_path, raw=folder, force=True)
    assert len(calls) == 3


def test_changed_raw_files_are_refused_unless_accepted(card: MakeCard, write: Write, tmp_path: Path) -> None:
    folder = write()
    made = card(files=f"events.csv: {{sha256: {'f' * 64}, bytes: 12}}")
    with pytest.raises(DataError) as caught:
        prepare(made, tmp_path, raw=folder)
    message = str(caught.value)
    found = hashlib.sha256((folder / "events.csv").read_bytes()).hexdigest()
    assert f"events.csv: expected sha256 {'f' * 64}, 12 bytes; found sha256 {found}" in message
    assert "--allow-changed-raw" in message
    assert not (tmp_path / "processed").exists()
    accepted = prepare(made, tmp_path, raw=folder, allow_changed_raw=True)
    assert accepted.meta["changed_raw_files"]
    assert not prepare(card(), tmp_path, raw=folder).meta["changed_raw_files"]


def test_published_counts_are_checked(card: MakeCard, write: Write, tmp_path: Path) -> None:
    folder = write()
    right = """
      source: {users: 3, items: 4, events: 8}
      prepared: {users: 3, items: {food: 2, kitchen: 2}, events: 8, validation: {kitchen: 2}, test: 2}
    """
    prepare(card(published=right), tmp_path / "right", raw=folder)
    wrong = right.replace("kitchen: 2}, events: 8", "kitchen: 20}, events: 80").replace("items: 4", "items: 40")
    for root in ("right", "wrong"):  # also against what an earlier card has prepared
        with pytest.raises(DataError) as caught:
            prepare(card(published=wrong), tmp_path / root, raw=folder)
        message = str(caught.value)
        assert "items in the raw files: published 40, found 4" in message
        assert "items after preparation: published food 2, kitchen 20, found food 2, kitchen 2" in message
        assert "events after preparation: published 80, found 8" in message
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(DataError) as caught:  # other options: only the raw files can be compared
        prepare(card(published=wrong), tmp_path / "wrong", raw=folder, options=PrepareOptions(ties="drop"))
    assert "after preparation" not in str(caught.value)
    accepted = prepare(card(published=wrong), tmp_path / "wrong", raw=folder, allow_changed_raw=True)
    assert len(accepted.meta["published_differences"]) == 3


def test_a_failure_leaves_nothing_behind_and_the_earlier_result_whole(
    card: MakeCard, write: Write, tmp_path: Path, events: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    folder = write()
    before = files_below(prepare(card(), root, raw=folder).path.parents[2])
    write(events + "cleo,pan,kitchen,600,1\n")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"half")
        raise full

    def interrupt(table: pa.Table, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_table", fail)
        with pytest.raises(DataError, match=r"No space left on device.* Nothing half-written is left"):
            prepare(card(), root, raw=folder)
        with pytest.raises(DataError, match="No space left on device"):
            prepare(card(), root, raw=folder, options=PrepareOptions(ties="drop"))
        patch.setattr(prepare_module, "write_table", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(card(), root, raw=folder)
    assert files_below(root) == before
    write(events + "cleo,pan,kitchen,-600,1\n")
    with pytest.raises(DataError, match="negative"):
        prepare(card(), root, raw=folder)
    assert files_below(root) == before


def test_a_failing_rename_brings_the_earlier_result_back(
    card: MakeCard, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    folder = write()
    prepare(card(), root, raw=folder)
    before = files_below(root)
    original = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if self.name.endswith("-new"):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_new)
        with pytest.raises(DataError, match="Input/output error"):
            prepare(card(), root, raw=folder, force=True)
    assert files_below(root) == before


def test_two_processes_may_prepare_the_same(
    card: MakeCard, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    original = prepare_module._write

    def overtaken(*args: Any) -> None:
        original(*args)
        monkeypatch.setattr(prepare_module, "_write", original)
        monkeypatch.setattr("os.getpid", lambda: -1)
        prepare(card(), tmp_path, raw=folder)

    monkeypatch.setattr(prepare_module, "_write", overtaken)
    path = prepare(card(), tmp_path, raw=folder).path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert load_prepared(card(), tmp_path)[0].num_users == 3


def test_a_full_disk(card: MakeCard, write: Write, tmp_path: Path) -> None:
    """A limit on the size of written files stands for the full disk, in a process of its own."""
    folder, root = write(), tmp_path / "root"
    (root / "cards").mkdir(parents=True)
    (root / "cards/shop.yaml").write_text(dump_yaml(card()))
    code = f"""
import resource
from pathlib import Path
from recsys.data.prepare import prepare
from recsys.data.schema import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    prepare("shop", {str(root)!r}, raw=Path({str(folder)!r}))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert not [path for path in (root / "processed").rglob("*") if path.is_file()]
    assert done.stderr == ""


def test_the_list_of_datasets(card: MakeCard, write: Write, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards/shop.yaml").write_text(dump_yaml(card()))
    statuses = {status.card.name: status for status in list_datasets(tmp_path)}
    assert {"shop", "amazon-afk", "ciao"} <= set(statuses)
    assert (statuses["shop"].raw, statuses["shop"].prepared) == (None, ())
    (tmp_path / "raw").mkdir()
    write().rename(tmp_path / "raw/shop")
    path = prepare("shop", tmp_path).path
    [status] = [status for status in list_datasets(tmp_path) if status.card.name == "shop"]
    assert (status.raw, status.prepared) == (tmp_path / "raw/shop", (path,))


def test_a_spoilt_meta_file_says_what_to_do(card: MakeCard, write: Write, tmp_path: Path) -> None:
    path = prepare(card(), tmp_path, raw=write()).path
    (path / "meta.json").write_text("{")
    with pytest.raises(DataError, match="delete the folder and prepare it again"):
        load_prepared(card(), tmp_path)


def test_titles_reach_the_items(card: MakeCard, write: Write, tmp_path: Path) -> None:
    made = card(
        format="{name: abxi, sequences: s.txt, item_map: m.txt, titles: t.tsv}",
        files="{s.txt: {}, m.txt: {}, t.tsv: {optional: true}}",
    )
    write("0 1|5 2|6 3|7\n", "s.txt")
    write('{"a": [1, 0], "b": [2, 1], "c": [3, 1]}', "m.txt")
    folder = write("asin\ttitle\nb\tA cup\n", "t.tsv")
    path = prepare(made, tmp_path, raw=folder).path
    items: dict[str, Any] = pa.parquet.read_table(path / "items.parquet").to_pydict()
    assert items["raw_item"] == ["a", "b", "c"]
    assert items["title"] == [None, "A cup", None]
