import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.filters import AbxiFilter, KCore


def events(rows: list[tuple[int, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["user", "item", "domain"]).astype(np.int64)


def test_k_core_goes_on_until_nothing_changes() -> None:
    # Item 9 is rare; without it user 2 is short; without user 2 item 3 is rare; users 0 and 1 stay.
    rows = [(0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 1, 0), (1, 2, 0), (2, 3, 0), (2, 9, 0)]
    kept = KCore(min_user=2, min_item=2).keep(events(rows), 1)
    assert kept.tolist() == [True, True, False, True, True, False, False]


def test_k_core_of_one_keeps_everything_and_a_large_one_nothing() -> None:
    frame = events([(0, 1, 0), (1, 2, 0)])
    assert KCore().keep(frame, 1).all()
    assert not KCore(min_user=2).keep(frame, 1).any()


def test_k_core_per_domain_counts_a_users_events_in_each_domain() -> None:
    frame = events([(0, 1, 0), (0, 2, 0), (0, 5, 1), (1, 1, 0), (1, 5, 1)])
    assert KCore(min_user=2, per_domain=True).keep(frame, 2).tolist() == [True, True, False, False, False]
    assert KCore(min_user=2).keep(frame, 2).all()


def test_abxi_filter_by_hand() -> None:
    # min_item 2 after the overlap filter, the last 4 events, 2 in each domain.
    rows = [
        *[(0, 1, 0), (0, 5, 1), (0, 6, 1), (0, 2, 0), (0, 1, 0)],  # its first event falls to max_events
        *[(1, 1, 0), (1, 2, 0), (1, 5, 1), (1, 6, 1), (1, 3, 0)],  # item 3 is in the other domain's user only
        *[(2, 3, 0), (2, 3, 0)],  # one domain: goes before items are counted
        *[(3, 5, 1), (3, 1, 0), (3, 2, 0)],  # one event in domain 1
    ]
    kept = AbxiFilter(min_item=2, max_events=4, min_user=2).keep(events(rows), 2)
    assert (
        kept.tolist() == [False, True, True, True, True] + [True, True, True, True, False] + [False] * 2 + [False] * 3
    )


def test_abxi_filter_counts_the_last_events_among_those_it_keeps() -> None:
    rows = [(0, 9, 0), (0, 1, 0), (0, 5, 1), (0, 8, 1), (0, 1, 0), (0, 5, 1), (0, 7, 1)]  # 7, 8, 9 are rare
    kept = AbxiFilter(min_item=2, max_events=3, min_user=1).keep(events(rows), 2)
    assert kept.tolist() == [False, False, True, False, True, True, False]


def test_abxi_filter_does_not_go_round_again() -> None:
    # User 1 goes at the last step; item 5 is then rarer than min_item, and stays.
    rows = [(0, 1, 0), (0, 1, 0), (0, 5, 1), (0, 6, 1), (0, 6, 1), (1, 1, 0), (1, 5, 1)]
    kept = AbxiFilter(min_item=2, max_events=50, min_user=2).keep(events(rows), 2)
    assert kept.tolist() == [True] * 5 + [False] * 2


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 1)), max_size=50),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(deadline=None, derandomize=True)
def test_what_a_k_core_keeps_has_enough(rows: list[tuple[int, int, int]], min_user: int, min_item: int) -> None:
    frame = events(rows)
    core = KCore(min_user=min_user, min_item=min_item)
    kept = frame[core.keep(frame, 2)]
    assert (kept["user"].value_counts() >= min_user).all()
    assert (kept["item"].value_counts() >= min_item).all()
    assert core.keep(kept, 2).all()
