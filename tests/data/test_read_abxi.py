import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.data.cards import DatasetCard
from recsys.data.locate import locate_raw, sources_of
from recsys.data.prepare import prepare
from recsys.data.raw import RawEvents
from recsys.data.schema import DataError
from recsys.loading import ConfigError

MakeCard = Callable[..., DatasetCard]
Write = Callable[..., Path]

FORMAT = """
  name: abxi
  sequences: xy_50_preprocessed.txt
  item_map: map_item_50.txt
  user_map: map_user_50.txt
  titles: titles.tsv
"""
FILES = """
  xy_50_preprocessed.txt: {}
  map_item_50.txt: {optional: true}
  map_user_50.txt: {optional: true}
  titles.tsv: {optional: true}
"""
SEQUENCES = "1 3|100 1|100 5|200\n0 2|50 4|60\n12 5|70\n"
ITEMS = {"B05": [5, 1], "B01": [1, 0], "B02": [2, 0], "B03": [3, 0], "B04": [4, 1]}
USERS = {"ann": 0, "bob": 1, "cleo": 12}


@pytest.fixture
def pair(card: MakeCard) -> MakeCard:
    """The card of a pair of domains with items 1–3 and 4–5, `sizes` added where given."""

    def make(sizes: str = "") -> DatasetCard:
        return card(format=FORMAT + (f"  domain_sizes: {sizes}\n" if sizes else ""), files=FILES)

    return make


@pytest.fixture
def folder(write: Write) -> Path:
    write(json.dumps(ITEMS), "map_item_50.txt")
    write(json.dumps(USERS), "map_user_50.txt")
    write("asin\tdomain\ttitle\nB03\tfood\tGreen tea\n", "titles.tsv")
    return write(SEQUENCES, "xy_50_preprocessed.txt")


def read(card: DatasetCard, folder: Path) -> RawEvents:
    return card.format.read(sources_of(card, locate_raw(card, folder, folder)), card.domains)


def rows(raw: RawEvents) -> list[tuple[str, str, int, int]]:
    frame = raw.frame
    names = (raw.users[frame["user"]], raw.items[frame["item"]], frame["domain"], frame["timestamp"])
    return list(zip(*map(list, names), strict=True))


def test_events_with_maps(pair: MakeCard, folder: Path) -> None:
    raw = read(pair(), folder)
    assert rows(raw) == [
        ("bob", "B03", 0, 100),
        ("bob", "B01", 0, 100),
        ("bob", "B05", 1, 200),
        ("ann", "B02", 0, 50),
        ("ann", "B04", 1, 60),
        ("cleo", "B05", 1, 70),
    ]
    assert raw.items.tolist() == ["B01", "B02", "B03", "B04", "B05"]
    assert raw.users.tolist() == ["ann", "bob", "cleo"]
    assert raw.frame["line"].tolist() == [1, 1, 1, 2, 2, 3]
    assert raw.titles == {"B03": "Green tea"}


def test_events_without_maps(pair: MakeCard, folder: Path) -> None:
    with_maps = rows(read(pair("[3, 2]"), folder))
    for name in ("map_item_50.txt", "map_user_50.txt", "titles.tsv"):
        (folder / name).unlink()
    raw = read(pair("[3, 2]"), folder)
    assert rows(raw)[0] == ("1", "3", 0, 100)
    assert [row[2:] for row in rows(raw)] == [row[2:] for row in with_maps]
    with pytest.raises(DataError, match="the domain of an item is unknown"):
        read(pair(), folder)


@pytest.mark.parametrize(
    "change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t.rstrip() + " \n\n"]
)
def test_harmless_differences(pair: MakeCard, folder: Path, write: Write, change: Callable[[str], str]) -> None:
    expected = rows(read(pair(), folder))
    write(change(SEQUENCES), "xy_50_preprocessed.txt")
    assert rows(read(pair(), folder)) == expected


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0 2|50", "0 x2|50", "line 2: the item id 'x2' is not a number"),
        ("0 2|50", "0 nan|50", "line 2: the item id 'nan' is not a number"),
        ("0 2|50", "0 |50", "line 2: the item id '' is not a number"),
        ("0 2|50", "u0 2|50", "line 2: the user id 'u0' is not a number"),
        ("0 2|50", "0 2|5o", "line 2: the time '5o' is not a number"),
        ("0 2|50 4|60", "0 2|50 4", "line 2: '4' has no time; the line is cut short"),
        ("0 2|50 4|60", "0 2|50 4|", "line 2: '4|' has no time; the line is cut short"),
        ("0 2|50 4|60", "0", "line 2: user 0 has no events; the line is cut short"),
        ("0 2|50 4|60", "1 2|50 4|60", "line 2: user 1 has a line already (line 1)"),
        ("0 2|50", "0 9|50", "line 2: the item 9 is not among the 5 items of map_item_50.txt"),
        ("0 2|50", "0 0|50", "line 2: the item 0 is not among the 5 items"),
        ("0 2|50", "0 2|-50", "line 2: the timestamp -50 is negative"),
        ("4|60", "4|4070908800", "line 2: the timestamp 4070908800 (2099-01-01) lies in the future"),
        ("4|60", "4|1388534400000", "line 2: the timestamp 1388534400000 is in milliseconds, not in seconds"),
        ("0 2|50", "7 2|50", "user 7 of xy_50_preprocessed.txt is not in the map"),
        ("12 5|70\n", "12 5|70 5|7", "line 3: the file ends in the middle of the time 7"),
    ],
)
def test_bad_lines(pair: MakeCard, folder: Path, write: Write, old: str, new: str, said: str) -> None:
    assert old in SEQUENCES
    write(SEQUENCES.replace(old, new), "xy_50_preprocessed.txt")
    with pytest.raises(DataError) as caught:
        read(pair(), folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


def test_all_bad_lines_are_counted(pair: MakeCard, folder: Path, write: Write) -> None:
    write("".join(f"{user} 1|x\n" for user in range(20)), "xy_50_preprocessed.txt")
    with pytest.raises(DataError) as caught:
        read(pair(), folder)
    assert "20 problems" in str(caught.value)
    assert "… and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("map_item_50.txt", '{"B01": [1, 0', "line 1, column 14: not valid JSON"),
        ("map_item_50.txt", "[]", "must hold one JSON object"),
        ("map_item_50.txt", '{"B01": [1, 2]}', "the entry of item 'B01' is [1, 2]"),
        ("map_item_50.txt", '{"B01": [1, 0, 0]}', "the entry of item 'B01' is [1, 0, 0]"),
        ("map_item_50.txt", '{"B01": 1}', "the entry of item 'B01' is 1"),
        ("map_item_50.txt", '{"B01": [1, 0], "B02": [1, 0]}', "the index 1 is given to two items"),
        ("map_item_50.txt", "", "the file is empty"),
        ("map_user_50.txt", '{"ann": "0"}', "the entry of user 'ann' is '0', not a number"),
        ("titles.tsv", "item\ttitle\n", "no column 'asin'; the columns are: item, title"),
        ("titles.tsv", "asin\ttitle\nB01\n", "line 2: 1 fields, not 2"),
    ],
)
def test_bad_maps(pair: MakeCard, folder: Path, write: Write, name: str, content: str, said: str) -> None:
    write(content, name)
    with pytest.raises(DataError) as caught:
        read(pair(), folder)
    assert said in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("sizes", ["[2, 3]", "[3, 3]", "[3, 1]"])
def test_map_and_domain_sizes_must_agree(pair: MakeCard, folder: Path, tmp_path: Path, sizes: str) -> None:
    assert read(pair("[3, 2]"), folder).differences == ()
    with pytest.raises(DataError, match=r"items in map_item_50.txt: \{'food': 3, 'kitchen': 2\}, the card's"):
        prepare(pair(sizes), tmp_path, raw=folder)
    accepted = prepare(pair(sizes), tmp_path, raw=folder, allow_changed_raw=True)
    assert len(accepted.meta["published_differences"]) == 1
    assert accepted.meta["counts"]["domains"]["food"]["items"] == 3  # the map is believed
    with pytest.raises(DataError, match="does not have its published counts"):
        prepare(pair(sizes), tmp_path, raw=folder)


def test_a_card_must_say_where_the_domain_comes_from(card: MakeCard) -> None:
    with pytest.raises(ConfigError, match="needs item_map or domain_sizes"):
        card(format="{name: abxi, sequences: a.txt}", files="a.txt: {}")
    with pytest.raises(ConfigError, match="3 numbers for 2 domains"):
        card(format="{name: abxi, sequences: a.txt, domain_sizes: [1, 2, 3]}", files="a.txt: {}")
    with pytest.raises(ConfigError, match=r"names the file b\.txt, which is not under files"):
        card(format="{name: abxi, sequences: b.txt, domain_sizes: [1, 2]}", files="a.txt: {}")
