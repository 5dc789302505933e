"""Tables and notes of runs."""

from typing import Any

from recsys.report.tables import caveats

SPLIT = {"name": "leave_one_out", "tied_test_share": 0.318, "later_train_share": 0.103}
NOTHING = {
    "candidates": 12,
    "cold_candidates": 0,
    "users": 5,
    "targets": 5,
    "cold_targets": 0,
    "repeated_targets": 0,
}


def final(split: dict[str, Any], counts: dict[str, Any], protocols: list[str] | None = None) -> dict[str, Any]:
    return {"data": {"split": split}, "counts": counts, "evaluation": {"protocols": protocols or ["full"]}}


def test_caveats_name_what_there_is_and_nothing_else() -> None:
    counts = {"food": NOTHING, "kitchen": NOTHING | {"cold_candidates": 3, "cold_targets": 1, "repeated_targets": 2}}
    ties, kitchen = caveats(final(SPLIT, counts))
    assert ties.startswith("split leave_one_out: 31.8 % of the test events share their timestamp")
    assert kitchen == (
        "kitchen: 3 of 12 items and 1 of 5 targets were never seen in training; "
        "2 targets repeat an item of their history"
    )


def test_no_share_of_ties_where_there_are_no_times() -> None:
    split = SPLIT | {"tied_test_share": None, "later_train_share": None}
    assert list(caveats(final(split, {"food": NOTHING}))) == []


def test_a_pool_smaller_than_its_protocol() -> None:
    split = SPLIT | {"tied_test_share": None, "later_train_share": None}
    [note] = caveats(final(split, {"food": NOTHING}, ["full", "uni_100"]))
    assert note == "food: uni_100 takes in all of the 12 items, as there are no more"
