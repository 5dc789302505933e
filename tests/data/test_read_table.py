import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recsys.data.cards import DatasetCard
from recsys.data.locate import present_files, sources_of
from recsys.data.raw import RawEvents
from recsys.data.schema import DataError
from recsys.loading import ConfigError

MakeCard = Callable[..., DatasetCard]
Write = Callable[..., Path]

TABLE = """
  name: table
  type: {type}
  columns: {{user: user, item: item, domain: domain, timestamp: time, rating: rating}}
"""


def read(card: DatasetCard, folder: Path) -> RawEvents:
    paths = present_files(card, folder)
    assert paths is not None
    return card.format.read(sources_of(card, paths), card.domains)


def rows(raw: RawEvents) -> list[tuple[object, ...]]:
    """Events with their raw ids; a missing rating is None."""
    frame = raw.frame
    ratings = [None if np.isnan(rating) else rating for rating in frame["rating"]]
    names = (raw.users[frame["user"]], raw.items[frame["item"]], frame["domain"], frame["timestamp"], ratings)
    return list(zip(*map(list, names), strict=True))


def expected(text: str) -> list[tuple[object, ...]]:
    cells = [line.split(",") for line in text.splitlines()[1:]]
    domain = {"food": 0, "kitchen": 1}
    return [(u, i, domain[d], int(t), float(r) if r else None) for u, i, d, t, r in cells]


def test_csv(card: MakeCard, write: Write, events: str) -> None:
    raw = read(card(), write(events))
    assert rows(raw) == expected(events)
    assert raw.users.tolist() == ["ann", "bob", "cleo"]
    assert raw.items.tolist() == ["cup", "pan", "rice", "tea"]
    assert raw.frame["line"].tolist() == list(range(2, 10))
    assert raw.time_unit == "seconds"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n",
        lambda text: text.replace("ann", " ann "),
        lambda text: text.replace("ann", '"ann"'),
    ],
    ids=["bom", "crlf", "no last line end", "blank lines at the end", "blanks around", "quotes"],
)
def test_harmless_differences(card: MakeCard, write: Write, events: str, change: Callable[[str], str]) -> None:
    assert rows(read(card(), write(change(events)))) == expected(events)


def test_other_formats_give_the_same_events(card: MakeCard, write: Write, events: str) -> None:
    frame = pd.read_csv(io.StringIO(events))
    lines = [json.dumps(row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]
    parquet = io.BytesIO()
    frame.to_parquet(parquet)
    contents = {
        ("tsv", "events.tsv"): events.replace(",", "\t").encode(),
        ("csv", "events.csv.gz"): gzip.compress(events.encode()),
        ("jsonl", "events.jsonl"): "\n".join(lines).encode(),
        ("jsonl", "events.jsonl.gz"): gzip.compress("\r\n".join(lines).encode()),
        ("parquet", "events.parquet"): parquet.getvalue(),
    }
    for (kind, name), content in contents.items():
        made = card(format=TABLE.format(type=kind), files=f"{name}: {{}}")
        assert rows(read(made, write(content, name))) == expected(events), name


def test_a_file_without_header_another_separator_and_stray_quotes(card: MakeCard, write: Write, events: str) -> None:
    body = events.partition("\n")[2].replace(",", "|").replace("ann", '"ann')
    made = card(
        format="""
        name: table
        type: csv
        separator: "|"
        header: false
        quoting: false
        columns: {user: 0, item: 1, domain: 2, timestamp: 3, rating: 4}
        """
    )
    raw = read(made, write(body))
    assert rows(raw) == expected(events.replace("ann", '"ann'))
    assert raw.frame["line"].tolist() == list(range(1, 9))


def test_a_separator_of_several_characters(card: MakeCard, write: Write) -> None:
    made = card(
        format="{name: table, type: csv, separator: '::', header: false, columns: {user: 0, item: 1, timestamp: 3}}",
        domains="[film]",
    )
    raw = read(made, write("1::1193::5::978300760\n1::661::3::978302109\n"))
    assert rows(raw) == [("1", "1193", 0, 978300760, None), ("1", "661", 0, 978302109, None)]
    with pytest.raises(DataError, match="line 2: 3 fields, not 4"):
        read(made, write("1::1193::5::978300760\n1::661::3\n"))


def test_line_ends_within_quotes(card: MakeCard, write: Write) -> None:
    text = 'user,item,review,domain,time,rating\nann,tea,"so\n\n\ngood",food,1,\nbob,tea,,food,2,\ncleo,tea,,food,3,\n'
    assert [row[0] for row in rows(read(card(), write(text)))] == ["ann", "bob", "cleo"]


def test_a_domain_per_file(card: MakeCard, write: Write) -> None:
    write("user,item,time\nann,1,10\n", "food.csv")
    folder = write("user,item,time\nann,1,20\nbob,2,30\n", "kitchen.csv")
    made = card(
        format="{name: table, type: csv, columns: {user: user, item: item, timestamp: time}}",
        files="{kitchen.csv: {domain: kitchen}, food.csv: {domain: food}}",
    )
    raw = read(made, folder)
    assert rows(raw) == [("ann", "1", 1, 20, None), ("bob", "2", 1, 30, None), ("ann", "1", 0, 10, None)]
    assert raw.places(np.array([1, 2])) == [
        "kitchen.csv line 3, user 'bob', item '2'",
        "food.csv line 2, user 'ann', item '1'",
    ]


def test_a_single_domain_needs_no_column(card: MakeCard, write: Write) -> None:
    made = card(format="{name: table, type: csv, columns: {user: user, item: item, timestamp: time}}", domains="[only]")
    assert rows(read(made, write("user,item,time\nann,1,10\n"))) == [("ann", "1", 0, 10, None)]


@pytest.mark.parametrize(
    ("unit", "text", "seconds"),
    [
        ("s", "1388534400", 1388534400),
        ("s", "1388534400.75", 1388534400),
        ("s", "1.3885344e9", 1388534400),
        ("ms", "1388534400750", 1388534400),
        ("iso", "2014-01-01", 1388534400),
        ("iso", "2014-01-01T01:00:00+01:00", 1388534400),
        ("iso", "2014-01-01 00:00:00.5Z", 1388534400),
    ],
)
def test_time_units(card: MakeCard, write: Write, unit: str, text: str, seconds: int) -> None:
    made = card(format=TABLE.format(type="csv") + f"  time_unit: {unit}\n")
    raw = read(made, write(f"user,item,domain,time,rating\nann,tea,food,{text},\n"))
    assert raw.frame["timestamp"].tolist() == [seconds]


def test_a_time_cut_short_is_not_taken_for_1970(card: MakeCard, write: Write) -> None:
    lines = [f"ann,tea{n},food,{1_388_534_400 + n},3" for n in range(4)]
    whole = "\n".join(["user,item,domain,time,rating", *lines])
    with pytest.raises(DataError, match=r"line 5: the timestamp 138853 \(1970-01-02\) lies long before .* cut short"):
        read(card(), write(whole.replace("1388534403,3", "138853,3")))
    early = whole.replace("13885", "3885")  # all of them in 1982: then it is no accident
    assert len(read(card(), write(early)).frame) == 4


def test_seconds_that_the_card_calls_milliseconds(card: MakeCard, write: Write) -> None:
    made = card(format=TABLE.format(type="csv") + "  time_unit: ms\n")
    with pytest.raises(DataError, match="these are seconds, not milliseconds; say `time_unit: s`"):
        read(made, write("user,item,domain,time,rating\nann,tea,food,1388534400,3\n"))


def test_parquet_times_and_missing_numbers(card: MakeCard, write: Write) -> None:
    frame = pd.DataFrame(
        {
            "user": [7, 8],
            "item": ["tea", "pan"],
            "domain": pd.Categorical(["food", "kitchen"]),
            "time": pd.to_datetime(["2014-01-01", "2014-01-02"], utc=True),
            "rating": [4.5, np.nan],
        }
    )
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    made = card(format=TABLE.format(type="parquet") + "  time_unit: iso\n", files="events.parquet: {}")
    raw = read(made, write(buffer.getvalue(), "events.parquet"))
    assert rows(raw) == [("7", "tea", 0, 1388534400, 4.5), ("8", "pan", 1, 1388620800, None)]


def test_order_by_a_column_or_by_the_file(card: MakeCard, write: Write, events: str) -> None:
    by_column = read(card(format=TABLE.format(type="csv") + "  time_unit: order\n"), write(events))
    assert by_column.time_unit == "order"
    assert by_column.frame["timestamp"].tolist() == [100, 200, 200, 150, 300, 300, 400, 500]
    by_file = read(
        card(format="{name: table, type: csv, time_unit: order, columns: {user: user, item: item, domain: domain}}"),
        write(events),
    )
    assert by_file.frame["timestamp"].tolist() == list(range(8))


def test_missing_times(card: MakeCard, write: Write, events: str) -> None:
    folder = write(events.replace("ann,pan,kitchen,200", "ann,pan,kitchen,"))
    with pytest.raises(DataError, match=r"line 3: the time is missing") as caught:
        read(card(), folder)
    assert "missing_time" in str(caught.value)
    dropped = read(card(format=TABLE.format(type="csv") + "  missing_time: drop\n"), folder)
    assert dropped.time_unit == "seconds"
    assert [row[1] for row in rows(dropped)][:2] == ["tea", "rice"]
    ordered = read(card(format=TABLE.format(type="csv") + "  missing_time: order\n"), folder)
    assert ordered.time_unit == "order"
    assert ordered.frame["timestamp"].argmax() == 1


def test_numeric_ids_are_in_numeric_order(card: MakeCard, write: Write) -> None:
    text = "user,item,domain,time,rating\n10,100,food,1,\n9,20,food,1,\n"
    raw = read(card(), write(text))
    assert raw.users.tolist() == ["9", "10"]
    assert raw.items.tolist() == ["20", "100"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bob,tea,food,150,3", "bob,tea,food", ["events.csv: 1 problem", "line 5: 3 fields, not 5"]),
        ("bob,tea,food,150,3", "bob,tea,green, food,150,3", ["line 5: 6 fields, not 5", "not quoted"]),
        ("bob,tea,food,150,3", "bob,,food,150,3", ["line 5: the item id is missing (column item)"]),
        ("bob,tea,food,150,3", "NaN,tea,food,150,3", ["line 5: the user id is missing (column user)"]),
        ("bob,tea,food,150,3", "bob,tea,,150,3", ["line 5: the domain is missing"]),
        ("bob,tea,food,150,3", "bob,tea,fod,150,3", ["line 5: there is no domain 'fod'; did you mean 'food'?"]),
        ("bob,tea,food,150,3", "bob,tea,toys,150,3", ["there is no domain 'toys'", "are: food, kitchen"]),
        ("bob,tea,food,150,3", "bob,tea,food,yesterday,3", ["line 5: the time 'yesterday' is not a number"]),
        ("bob,tea,food,150,3", "bob,tea,food,inf,3", ["line 5: the time 'inf' is not a number"]),
        ("bob,tea,food,150,3", "bob,tea,food,150,good", ["line 5: the rating 'good' is not a number"]),
        ("bob,tea,food,150,3", "bob,tea,food,-150,3", ["line 5: the timestamp -150 is negative"]),
        ("bob,tea,food,150,3", "bob,tea,food,4070908800,3", ["4070908800 (2099-01-01) lies in the future"]),
        ("bob,tea,food,150,3", "bob,tea,food,1388534400000,3", ["is in milliseconds", "`time_unit: ms`"]),
        ("bob,tea,food,150,3", "bob,tea,food,99999999999999999,3", ["lies in the future"]),
        ("user,item,domain,time", "user,item,domain,when", ["no column 'time'", "user, item, domain, when, rating"]),
        ("user,item", "User,Item", ["no columns 'user', 'item'", "User, Item, domain"]),
    ],
)
def test_bad_lines(card: MakeCard, write: Write, events: str, old: str, new: str, said: list[str]) -> None:
    assert old in events
    with pytest.raises(DataError) as caught:
        read(card(), write(events.replace(old, new)))
    for part in said:
        assert part in str(caught.value)


def test_line_numbers_count_blank_lines(card: MakeCard, write: Write, events: str) -> None:
    text = events.replace("bob,tea", "\n\nbob,tea").replace("cleo,tea,food,500", "cleo,tea,food,-5")
    with pytest.raises(DataError, match="line 11: the timestamp -5 is negative"):
        read(card(), write(text))


def test_many_bad_lines_are_counted_and_the_first_few_shown(card: MakeCard, write: Write, events: str) -> None:
    with pytest.raises(DataError) as caught:
        read(card(), write(events.replace(",food", ",fuud").replace(",kitchen", ",kitchens")))
    message = str(caught.value)
    assert "events.csv: 8 problems" in message
    assert message.count("there is no domain") == 5
    assert "… and 3 more" in message


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file(card: MakeCard, write: Write, content: str) -> None:
    with pytest.raises(DataError, match=r"events\.csv: the file is empty"):
        read(card(), write(content))


def test_a_file_with_a_header_only(card: MakeCard, write: Write) -> None:
    with pytest.raises(DataError, match=r"events\.csv: the file has no events"):
        read(card(), write("user,item,domain,time,rating\n"))


def test_files_of_another_kind(card: MakeCard, write: Write, events: str) -> None:
    packed = card(files="events.csv.gz: {}")
    whole = gzip.compress(events.encode())
    for content in (whole[:-10], events.encode()):
        with pytest.raises(DataError, match="damaged or cut short"):
            read(packed, write(content, "events.csv.gz"))
    with pytest.raises(DataError, match="UTF-16"):
        read(card(), write(events.encode("utf-16")))
    with pytest.raises(DataError, match="UTF"):
        read(card(), write(events.replace("tea", "thé").encode("latin-1")))
    parquet = card(format=TABLE.format(type="parquet"))
    with pytest.raises(DataError, match="not a Parquet file"):
        read(parquet, write(events))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"user": "bob", "item"', "line 2"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"user": ["bob"], "item": "tea", "domain": "food", "time": 1}', "line 2: not a JSON object of texts and"),
        ('{"user": null, "item": "tea", "domain": "food", "time": 1}', "line 2: the user id is missing"),
        ('{"item": "tea", "domain": "food", "time": 1}', "line 2: the user id is missing"),
        ('{"user": NaN, "item": "tea", "domain": "food", "time": 1}', "line 2: the user id is missing"),
    ],
)
def test_bad_json_lines(card: MakeCard, write: Write, line: str, said: str) -> None:
    good = '{"user": "ann", "item": "tea", "domain": "food", "time": 1, "rating": 5}'
    made = card(format=TABLE.format(type="jsonl"), files="events.jsonl: {}")
    with pytest.raises(DataError) as caught:
        read(made, write(f"{good}\n{line}\n", "events.jsonl"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "{name: table, type: csv, columns: {user: u, item: i}}"}, "say time_unit: order"),
        ({"format": TABLE.format(type="csv") + "  separator: ''\n"}, "some text without quotes and line ends"),
        ({"files": "events.csv: {domain: food}"}, "not from both"),
        (
            {"format": "{name: table, type: csv, time_unit: order, columns: {user: u, item: i}}"},
            "the domain of events.csv is unknown",
        ),
        ({"format": TABLE.format(type="excel")}, "format.type"),
    ],
)
def test_a_card_that_cannot_work(card: MakeCard, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        card(**changes)
    assert said in str(caught.value)
