import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.ties import settle_ties, tie_report


def events(rows: list[tuple[int, int, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["user", "timestamp", "domain", "item"])


# User 0: a tie of four at 10, the food items before the kitchen items; user 1: no tie; user 2: a tie of two.
ROWS = [
    (0, 10, 0, 1),
    (0, 10, 0, 2),
    (0, 10, 1, 3),
    (0, 10, 1, 4),
    (0, 20, 1, 5),
    (1, 10, 0, 1),
    (1, 11, 1, 3),
    (2, 10, 1, 3),
    (2, 10, 0, 1),
]
NAMES = np.array(["ann", "bob", "cleo"], dtype=object)


def test_report_by_hand() -> None:
    report = tie_report(events(ROWS))
    assert report == {
        "adjacent_pairs": 6,  # 4 + 1 + 1
        "tied": 4,
        "tied_share": 4 / 6,
        "across_domains": 2,
        "across_domains_share": 2 / 6,
        "by_domain_index_share": 0.5,  # item 2 -> 3 ascends, user 2's pair descends
    }


def test_report_with_nothing_to_divide_by() -> None:
    report = tie_report(events([(0, 1, 0, 1), (1, 1, 0, 1)]))
    assert report["tied_share"] is None
    assert report["by_domain_index_share"] is None


def test_file_order_changes_nothing() -> None:
    pd.testing.assert_frame_equal(settle_ties("file_order", events(ROWS), NAMES, 0), events(ROWS))


def test_drop_keeps_events_that_are_alone_at_their_time() -> None:
    kept = settle_ties("drop", events(ROWS), NAMES, 0)
    assert list(kept.itertuples(index=False, name=None)) == [ROWS[4], ROWS[5], ROWS[6]]


def test_seeded_random_gives_every_order_about_equally_often() -> None:
    orders = [
        tuple(settle_ties("seeded_random", events(ROWS[:3]), NAMES, seed)["item"].tolist()) for seed in range(600)
    ]
    counts = pd.Series(orders).value_counts()
    assert len(counts) == 6
    assert counts.min() > 60  # 100 expected, sd 9
    assert counts.max() < 140


def test_domain_random_interleaves_fairly_and_keeps_the_order_within_domains() -> None:
    orders = [tuple(settle_ties("domain_random", events(ROWS[:4]), NAMES, seed)["item"]) for seed in range(600)]
    counts = pd.Series(orders).value_counts()
    assert len(counts) == 6  # four places, two of them for food
    assert counts.min() > 60
    assert counts.max() < 140
    for order in counts.index:
        assert order.index(1) < order.index(2)
        assert order.index(3) < order.index(4)


@pytest.mark.parametrize("policy", ["seeded_random", "domain_random"])
def test_a_users_order_does_not_depend_on_other_users(policy: str) -> None:
    rows = [(user, 10, item % 2, item) for user in range(5) for item in range(8)]
    names = np.array(list("vwxyz"), dtype=object)
    together = settle_ties(policy, events(rows), names, 3)
    alone = [(0, *rest) for user, *rest in rows if user == 3]
    single = settle_ties(policy, events(alone), names[3:4], 3)
    assert single["item"].tolist() == together.loc[together["user"] == 3, "item"].tolist()
    orders = [tuple(group["item"]) for _, group in together.groupby("user")]
    assert len(set(orders)) > 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.integers(1, 50)), max_size=40),
    st.integers(0, 2**32),
)
@settings(deadline=None, derandomize=True)
def test_policies_move_events_within_their_tie_only(rows: list[tuple[int, int, int, int]], seed: int) -> None:
    frame = events(sorted(rows, key=lambda row: row[:2])).astype(np.int64)
    names = np.array(list("abcd"), dtype=object)
    for policy in ("seeded_random", "domain_random"):
        settled = settle_ties(policy, frame, names, seed)
        assert sorted(settled.index) == sorted(frame.index)
        columns = ["user", "timestamp"]
        np.testing.assert_array_equal(settled[columns].to_numpy(), frame[columns].to_numpy())
        pd.testing.assert_frame_equal(settled, settle_ties(policy, frame, names, seed))
    within = ["user", "timestamp", "domain"]
    assert (settled.reset_index().groupby(within)["index"].diff().dropna() > 0).all()
    alone = settle_ties("drop", frame, names, seed)
    assert not alone.duplicated(["user", "timestamp"]).any()
    assert set(alone.index) == set(frame.index[~frame.duplicated(["user", "timestamp"], keep=False)])
