import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from recsys.data.cards import DatasetCard
from recsys.data.describe import describe
from recsys.data.prepare import prepare

TIMED = [
    "A shop (shop/",
    "3 (2 in two domains or more)",
    "2.7 on average, 1 to 4",
    "1970-01-01 to 1970-01-01",
    "food       3       2        5",
    "kitchen       2       2        3",
    "users with one event",
    "share of adjacent pairs 40.0 % 40.0 %",
    "test food 2",
    "users not evaluated 1",
    "test events tied with the one before 50.0 %",
    "training events later than a test event 37.5 %",
]


@pytest.fixture
def shown() -> Callable[[DatasetCard, Path, Path], str]:
    """The description of a dataset as text, runs of blanks made one."""

    def show(card: DatasetCard, root: Path, raw: Path) -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(describe(prepare(card, root, raw=raw, allow_changed_raw=True).meta))
        return " ".join(console.export_text().split())

    return show


def test_all_there_is_to_know(
    card: Callable[..., DatasetCard], write: Callable[..., Path], tmp_path: Path, shown: Callable[..., str]
) -> None:
    text = shown(card(source="'[our] till'"), tmp_path, write())
    for part in TIMED:
        assert " ".join(part.split()) in text
    assert "source [our] till" in text
    assert "not as published" not in text


def test_order_only_and_departures_from_the_card(
    card: Callable[..., DatasetCard], write: Callable[..., Path], tmp_path: Path, shown: Callable[..., str]
) -> None:
    made = card(
        format="{name: table, type: csv, time_unit: order, columns: {user: user, item: item, domain: domain}}",
        files="events.csv: {bytes: 1}",
        published="{prepared: {users: 30}}",
        prepare="{filter: {name: k_core, min_user: 2}}",
    )
    text = shown(made, tmp_path, write())
    assert "time order only" in text
    assert "none: the dataset keeps only an order" in text
    assert "filter: k_core min_user=2 min_item=1" in text
    assert "not as published: users after preparation: published 30, found 2" in text
    assert "the raw files are not those of the card" in text
