"""A small dataset in files: a card, its raw folder, and the root that holds the card."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from recsys.data.cards import DatasetCard
from recsys.data.sequences import Sequences
from recsys.loading import parse_config, parse_yaml

CARD = """
name: shop
title: A shop
source: made up
licence: none
format:
  name: table
  type: csv
  columns: {user: user, item: item, domain: domain, timestamp: time, rating: rating}
files:
  events.csv: {}
domains: [food, kitchen]
"""

# ann has a tie across domains at 200, bob one within kitchen at 300; cleo has a single event.
EVENTS = """\
user,item,domain,time,rating
ann,tea,food,100,5
ann,pan,kitchen,200,4
ann,rice,food,200,
bob,tea,food,150,3
bob,cup,kitchen,300,2
bob,pan,kitchen,300,1
bob,rice,food,400,5
cleo,tea,food,500,5
"""


@pytest.fixture
def card() -> Callable[..., DatasetCard]:
    """The card of the small shop, with the YAML of some keys laid over it."""

    def make(**changes: str) -> DatasetCard:
        values = parse_yaml(CARD, "card") | {key: parse_yaml(dedent(text), key) for key, text in changes.items()}
        return parse_config(values, DatasetCard, "card")

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of the raw folder `tmp_path / "raw-files"`, and returns the folder."""

    def to(content: str | bytes = EVENTS, name: str = "events.csv") -> Path:
        folder = tmp_path / "raw-files"
        folder.mkdir(exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder

    return to


@pytest.fixture
def sequences() -> Sequences:
    """Two domains (items 1–3 and 4–6) and four users of 5, 4, 2 and 1 events."""
    item_domain = [-1, 0, 0, 0, 1, 1, 1]
    items = [1, 4, 2, 5, 3, 4, 1, 5, 6, 2, 6, 3]
    times = [10, 20, 20, 40, 50, 5, 15, 60, 60, 30, 70, 80]
    return Sequences.pack(
        items=items,
        domains=[item_domain[item] for item in items],
        times=times,
        offsets=[0, 5, 9, 11, 12],
        domain_names=("food", "kitchen"),
        item_domain=item_domain,
    )


@pytest.fixture
def events() -> str:
    return EVENTS
