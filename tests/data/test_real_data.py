"""The real datasets, where they are: what is known of them comes out."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from recsys.data.cards import load_card
from recsys.data.filters import KCore
from recsys.data.locate import find_raw
from recsys.data.policies import PrepareOptions
from recsys.data.prepare import Prepared, load_prepared, prepare

pytestmark = pytest.mark.real


def prepared(name: str, root: Path, options: PrepareOptions | None = None) -> Prepared:
    """The dataset, prepared into `root` from the raw files below RECSYS_DATA."""
    given = os.environ.get("RECSYS_DATA")
    if given is None:
        pytest.skip("RECSYS_DATA is not set")
    files = find_raw(load_card(name, root), Path(given))
    if files is None:
        pytest.skip(f"the raw files of {name} are not below RECSYS_DATA ({given})")
    return prepare(name, root, raw=next(iter(files.values())).parent, options=options)


def by_domain(meta: dict[str, Any], what: str) -> dict[str, int]:
    return {name: counts[what] for name, counts in meta["counts"]["domains"].items()}


def test_amazon_afk(tmp_path: Path) -> None:
    meta = prepared("amazon-afk", tmp_path).meta
    assert meta["counts"]["users"] == meta["counts"]["overlapping_users"] == 7144
    assert by_domain(meta, "items") == {"food": 11837, "kitchen": 16258}
    assert by_domain(meta, "events") == {"food": 83663, "kitchen": 89885}
    assert (meta["repairs"]["duplicates"], meta["repairs"]["out_of_order"]) == (0, 0)
    loo = meta["splits"]["leave_one_out"]
    assert loo["test"] == {"food": 2419, "kitchen": 4725}
    assert loo["validation"] == {"food": 2837, "kitchen": 4307}
    assert round(loo["tied_test_share"] * 7144) == 2275
    assert loo["later_train_share"] == pytest.approx(0.103, abs=5e-4)
    assert meta["ties"]["source"]["across_domains"] == 11385
    assert meta["ties"]["source"]["by_domain_index_share"] == 1.0
    assert meta["splits"]["per_domain_last"]["test"] == {"food": 7144, "kitchen": 7144}
    assert meta["splits"]["global_time"]["later_train_share"] == 0.0


def test_amazon_afk_keeps_the_published_ids_and_order(tmp_path: Path) -> None:
    path = prepared("amazon-afk", tmp_path).path
    events = pa.parquet.read_table(path / "interactions.parquet").slice(0, 7)
    assert events["item"].to_pylist() == [821, 1860, 2986, 3735, 3738, 3741, 12016]
    assert set(events["timestamp"].to_pylist()) == {1381536000}
    items = pa.parquet.read_table(path / "items.parquet").slice(0, 1).to_pylist()
    assert items[0]["raw_item"] == "616719923X"
    assert items[0]["title"].startswith("Japanese Kit Kat")


def test_amazon_afk_under_the_other_tie_policies(tmp_path: Path) -> None:
    fair = prepared("amazon-afk", tmp_path, PrepareOptions(ties="domain_random")).meta
    # Two food and one kitchen event of one time have their one crossing pair in either direction equally often.
    assert fair["ties"]["prepared"]["by_domain_index_share"] == pytest.approx(0.5, abs=0.02)
    assert fair["ties"]["prepared"]["tied"] == 51883
    assert fair["splits"]["leave_one_out"]["test"]["food"] > 2419
    shuffled = prepared("amazon-afk", tmp_path, PrepareOptions(ties="seeded_random")).meta
    assert shuffled["ties"]["prepared"]["by_domain_index_share"] == pytest.approx(0.5, abs=0.02)
    dropped = prepared("amazon-afk", tmp_path, PrepareOptions(ties="drop")).meta
    assert dropped["splits"]["leave_one_out"]["tied_test_share"] == 0.0


def test_ciao(tmp_path: Path) -> None:
    meta = prepared("ciao", tmp_path).meta
    assert meta["source_counts"] == {"users": 7375, "items": 105114, "events": 284086}
    assert (meta["repairs"]["duplicates"], meta["repairs"]["items_in_two_domains"]) == (1436, 101)
    assert len(meta["counts"]["domains"]) == 28


def test_three_categories_of_ciao(tmp_path: Path) -> None:
    counts = prepared("ciao-three", tmp_path).meta["counts"]
    assert (counts["users"], counts["items"], counts["events"]) == (3355, 5308, 64042)
    options = PrepareOptions(
        items_in_two_domains="first",
        domains=("category_12", "category_1", "category_10"),
        filter=KCore(min_user=5, min_item=3),
    )
    assert prepared("ciao", tmp_path, options).meta["counts"] == counts


def test_five_domains_of_amazon(tmp_path: Path) -> None:
    meta = prepared("amazon5-pool", tmp_path).meta
    assert meta["source_counts"] == {"users": 64567, "items": 138147, "events": 725272}
    assert meta["time_unit"] == "order"
    sequences, _ = load_prepared("amazon5-pool", tmp_path)
    assert sequences.num_domains == 5
    assert sequences.num_users == meta["counts"]["users"]
