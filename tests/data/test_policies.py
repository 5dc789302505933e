from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recsys.data.cards import DatasetCard
from recsys.data.filters import AbxiFilter, KCore
from recsys.data.locate import locate_raw, sources_of
from recsys.data.policies import PreparedEvents, PrepareOptions, apply_policies
from recsys.data.schema import DataError

MakeCard = Callable[..., DatasetCard]
DEFAULT = PrepareOptions()


@pytest.fixture
def prepared(card: MakeCard, write: Callable[..., Path]) -> Callable[..., PreparedEvents]:
    """The events of a CSV (without its header) after the given options."""

    def run(rows: str, options: PrepareOptions = DEFAULT, order: bool = False) -> PreparedEvents:
        kind = "{name: table, type: csv, time_unit: order, columns: {user: user, item: item, domain: domain}}"
        made = card(format=kind) if order else card()
        folder = write("user,item,domain,time,rating\n" + rows.strip().replace(" ", "\n") + "\n")
        raw = made.format.read(sources_of(made, locate_raw(made, folder, folder)), made.domains)
        return apply_policies(raw, made.domains, options)

    return run


def events(prepared: PreparedEvents) -> list[tuple[str, str, str, int]]:
    """With raw ids and names."""
    frame = prepared.frame
    domains = np.array(prepared.domain_names, dtype=object)
    columns = (
        prepared.users[frame["user"]],
        prepared.items[frame["item"] - 1],
        domains[frame["domain"]],
        frame["timestamp"],
    )
    return list(zip(*map(list, columns), strict=True))


def test_sorted_by_user_and_time_with_ids_by_domain(prepared: Callable[..., PreparedEvents]) -> None:
    result = prepared("bob,zucchini,food,5, ann,pan,kitchen,9, ann,apple,food,3, bob,zeal,kitchen,4, bob,apple,food,5,")
    assert events(result) == [
        ("ann", "apple", "food", 3),
        ("ann", "pan", "kitchen", 9),
        ("bob", "zeal", "kitchen", 4),
        ("bob", "zucchini", "food", 5),  # a tie: file order
        ("bob", "apple", "food", 5),
    ]
    assert result.items.tolist() == ["apple", "zucchini", "pan", "zeal"]
    assert result.item_domain.tolist() == [0, 0, 1, 1]
    assert result.repairs["out_of_order"] == 2
    assert result.source_ties is not None
    assert result.source_ties["tied"] == 1


DUPLICATES = "ann,tea,food,1,5 ann,cup,kitchen,2,5 ann,tea,food,3,4 ann,cup,kitchen,2,5 bob,tea,food,1,5"


@pytest.mark.parametrize(
    ("policy", "times"),
    [("keep_first", [1, 2, 1]), ("keep_last", [2, 3, 1]), ("keep_all", [1, 2, 2, 3, 1])],
)
def test_duplicates(prepared: Callable[..., PreparedEvents], policy: str, times: list[int]) -> None:
    result = prepared(DUPLICATES, PrepareOptions(duplicates=policy))
    assert result.frame["timestamp"].tolist() == times
    assert result.repairs["duplicates"] == 2
    assert result.repairs["exact_duplicates"] == 1
    assert result.repairs.get("removed_duplicates", 0) == 5 - len(times)


def test_duplicates_as_an_error(prepared: Callable[..., PreparedEvents]) -> None:
    with pytest.raises(DataError) as caught:
        prepared(DUPLICATES, PrepareOptions(duplicates="error"))
    message = str(caught.value)
    assert "2 problems" in message
    assert "events.csv line 4, user 'ann', item 'tea'" in message
    assert "events.csv line 5, user 'ann', item 'cup'" in message
    assert "keep_first" in message
    prepared("ann,tea,food,1, ann,cup,kitchen,1,", PrepareOptions(duplicates="error"))


TWO_DOMAINS = "ann,tea,kitchen,9, ann,cup,kitchen,2, bob,tea,food,1, cleo,tea,food,4, cleo,oil,food,5,"


def test_items_in_two_domains(prepared: Callable[..., PreparedEvents]) -> None:
    with pytest.raises(DataError) as caught:
        prepared(TWO_DOMAINS)
    message = str(caught.value)
    assert "1 items stand in two domains" in message
    assert "events.csv line 2, user 'ann', item 'tea', domain 'kitchen'" in message
    assert "events.csv line 4, user 'bob', item 'tea', domain 'food'" in message

    dropped = prepared(TWO_DOMAINS, PrepareOptions(items_in_two_domains="drop"))
    assert events(dropped) == [("ann", "cup", "kitchen", 2), ("cleo", "oil", "food", 5)]
    first = prepared(TWO_DOMAINS, PrepareOptions(items_in_two_domains="first"))
    assert events(first) == [("ann", "cup", "kitchen", 2), ("ann", "tea", "kitchen", 9), ("cleo", "oil", "food", 5)]
    split = prepared(TWO_DOMAINS, PrepareOptions(items_in_two_domains="split"))
    assert len(split.frame) == 5
    assert split.items.tolist() == ["oil", "tea", "cup", "tea"]
    assert split.item_domain.tolist() == [0, 0, 1, 1]
    by_file = prepared("zoe,tea,kitchen,9, ann,tea,food,1,", PrepareOptions(items_in_two_domains="first"))
    assert events(by_file) == [("zoe", "tea", "kitchen", 9)]
    for result in (dropped, first, split):
        assert result.repairs["items_in_two_domains"] == 1


def test_an_item_of_two_domains_is_a_duplicate_unless_split(prepared: Callable[..., PreparedEvents]) -> None:
    rows = "ann,1,food,1, ann,1,kitchen,2,"
    assert len(prepared(rows, PrepareOptions(items_in_two_domains="split")).frame) == 2
    assert events(prepared(rows)) == [("ann", "1", "food", 1)]


def test_a_subset_of_the_domains(prepared: Callable[..., PreparedEvents]) -> None:
    rows = "ann,tea,food,1, ann,cup,kitchen,2, bob,pan,kitchen,3,"
    result = prepared(rows, PrepareOptions(domains=("kitchen",)))
    assert result.domain_names == ("kitchen",)
    assert events(result) == [("ann", "cup", "kitchen", 2), ("bob", "pan", "kitchen", 3)]
    assert result.repairs["removed_other_domains"] == 1
    assert result.repairs["users_with_one_event"] == 2
    with pytest.raises(DataError, match="there is no domain 'kitchn' in this dataset; did you mean 'kitchen'"):
        prepared(rows, PrepareOptions(domains=("kitchn",)))
    with pytest.raises(DataError, match="names no domain"):
        prepared(rows, PrepareOptions(domains=()))


def test_order_only_data_have_ranks_and_no_ties(prepared: Callable[..., PreparedEvents]) -> None:
    rows = "ann,tea,food,, bob,tea,food,, ann,cup,kitchen,, ann,oil,food,,"
    for ties in ("file_order", "seeded_random", "drop"):
        result = prepared(rows, PrepareOptions(ties=ties, filter=KCore(min_user=2)), order=True)
        assert events(result) == [("ann", "tea", "food", 0), ("ann", "cup", "kitchen", 1), ("ann", "oil", "food", 2)]
        assert result.source_ties is None
        assert result.time_unit == "order"


def test_tie_policies_reach_the_events(prepared: Callable[..., PreparedEvents]) -> None:
    rows = " ".join(f"ann,i{n},food,7," for n in range(9)) + " ann,last,food,8,"
    dropped = prepared(rows, PrepareOptions(ties="drop"))
    assert events(dropped) == [("ann", "last", "food", 8)]
    assert dropped.repairs["removed_ties"] == 9
    shuffles = [PrepareOptions(ties="seeded_random", tie_seed=seed) for seed in (0, 1)]
    orders = {tuple(item for _, item, _, _ in events(prepared(rows, options))) for options in shuffles}
    assert len(orders) == 2
    assert all(order[-1] == "last" for order in orders)


def test_filters_reach_the_events(prepared: Callable[..., PreparedEvents]) -> None:
    rows = "ann,tea,food,1, ann,cup,kitchen,2, bob,tea,food,3, bob,cup,kitchen,4, cleo,tea,food,5,"
    abxi = PrepareOptions(filter=AbxiFilter(min_item=2, min_user=1))
    result = prepared(rows, abxi)
    assert result.users.tolist() == ["ann", "bob"]
    assert result.repairs["removed_by_filter"] == 1


def test_nothing_left_says_what_went(prepared: Callable[..., PreparedEvents]) -> None:
    with pytest.raises(DataError, match=r"no event is left .* removed_by_filter 2"):
        prepared("ann,tea,food,1, ann,cup,kitchen,2,", PrepareOptions(filter=KCore(min_user=3)))
    with pytest.raises(DataError, match=r"no event is left .* removed_ties 2"):
        prepared("ann,tea,food,1, ann,cup,kitchen,1,", PrepareOptions(ties="drop", filter=AbxiFilter()))
