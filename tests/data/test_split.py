from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import (
    CONTEXT,
    TEST,
    TRAIN,
    VALID,
    GlobalTime,
    LeaveOneOut,
    PerDomainLast,
    make_split,
    split_report,
    train_counts,
)
from recsys.loading import ConfigError, parse_config

T, V, X, C = TRAIN, VALID, TEST, CONTEXT


def by_user(*histories: list[int]) -> list[int]:
    return [value for history in histories for value in history]


CONFIGS = [LeaveOneOut(), PerDomainLast(), GlobalTime(), GlobalTime(target="first"), GlobalTime(target="all")]


def test_leave_one_out_takes_the_last_two_of_users_with_three(sequences: Sequences) -> None:
    role = make_split(sequences, LeaveOneOut()).role
    assert role.tolist() == by_user([T, T, T, V, X], [T, T, V, X], [T, T], [T])


def test_per_domain_last_takes_the_last_two_of_every_domain_with_three(sequences: Sequences) -> None:
    # user 0: food at 0, 2, 4 (three), kitchen at 1, 3 (two); user 1: kitchen at 0, 2, 3, food at 1
    role = make_split(sequences, PerDomainLast()).role
    assert role.tolist() == by_user([T, T, V, T, X], [T, T, V, X], [T, T], [T])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # times: 10 20 20 40 50 | 5 15 60 60 | 30 70 | 80; validation from 20, test from 50
        ("last", by_user([T, C, C, V, X], [T, T, C, X], [C, X], [C])),
        ("first", by_user([T, V, C, C, X], [T, T, X, C], [C, X], [C])),
        ("all", by_user([T, V, V, V, X], [T, T, X, X], [C, X], [C])),
    ],
)
def test_global_time_has_two_windows(sequences: Sequences, target: str, expected: list[int]) -> None:
    config = parse_config({"valid_from": 20, "test_from": 50, "target": target}, GlobalTime, "test")
    assert make_split(sequences, config).role.tolist() == expected


def test_global_time_takes_quantiles_and_dates(sequences: Sequences) -> None:
    # sorted times: 5 10 15 20 20 30 40 50 60 60 70 80; 0.5 falls between 30 and 40, 0.9 between 60 and 70
    by_quantile = make_split(sequences, GlobalTime(valid_from=0.5, test_from=0.9))
    by_seconds = make_split(sequences, GlobalTime(valid_from=40, test_from=70))
    assert by_quantile.hash == by_seconds.hash
    later = Sequences.pack(
        sequences.items,
        sequences.domains,
        sequences.times + 1_388_534_400,  # 2014-01-01
        sequences.offsets,
        sequences.domain_names,
        sequences.item_domain,
    )
    config = parse_config({"valid_from": date(2014, 1, 1), "test_from": "2014-01-02"}, GlobalTime, "test")
    assert set(make_split(later, config).role.tolist()) == {CONTEXT, VALID}


def test_global_time_refuses_cutoffs_in_the_wrong_order(sequences: Sequences) -> None:
    with pytest.raises(ConfigError, match=r"valid_from \(0.9\) must come before test_from \(0.8\)"):
        parse_config({"valid_from": 0.9, "test_from": 0.8}, GlobalTime, "test")
    with pytest.raises(DataError, match="move them apart"):
        make_split(sequences, GlobalTime(valid_from=0.5, test_from=10))


def test_global_time_needs_times(sequences: Sequences) -> None:
    ordered = Sequences.pack(
        sequences.items,
        sequences.domains,
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0],
        sequences.offsets,
        sequences.domain_names,
        sequences.item_domain,
        "order",
    )
    with pytest.raises(DataError, match="leave_one_out or per_domain_last"):
        make_split(ordered, GlobalTime())
    report = split_report(ordered, make_split(ordered, LeaveOneOut()))
    assert report["tied_test_share"] is None
    assert report["later_train_share"] is None


def test_train_counts_hold_training_events_only(sequences: Sequences) -> None:
    counts = train_counts(sequences, make_split(sequences, LeaveOneOut()))
    assert counts.tolist() == [0, 2, 2, 1, 2, 0, 1]  # items 1, 4, 2 | 4, 1 | 2, 6 | 3
    assert counts.dtype == np.int64


def test_the_report_of_a_split_by_hand(sequences: Sequences) -> None:
    report = split_report(sequences, make_split(sequences, LeaveOneOut()))
    assert report["train"] == 8
    assert report["validation"] == {"food": 0, "kitchen": 2}
    assert report["test"] == {"food": 1, "kitchen": 1}
    assert report["users_not_evaluated"] == 2
    # Test events at 50 (before it 40) and 60 (before it 60, of the same domain).
    assert report["tied_test_share"] == 0.5
    assert report["tied_across_domains_share"] == 0.0
    # Training times 10 20 20 | 5 15 | 30 70 | 80: two of eight are later than 50, two later than 60.
    assert report["later_train_share"] == 0.25


def test_a_training_event_at_the_time_of_a_test_event_is_not_later() -> None:
    two = Sequences.pack([1, 1, 1, 1, 1, 1], [0] * 6, [1, 2, 5, 5, 6, 7], [0, 3, 6], ("food",), [-1, 0])
    report = split_report(two, make_split(two, LeaveOneOut()))
    assert report["later_train_share"] == 0.0  # training at 1 and 5, tests at 5 and 7


def test_a_split_that_tests_nobody_reports_so(sequences: Sequences) -> None:
    short = Sequences.pack([1, 4], [0, 1], [1, 2], [0, 1, 2], ("food", "kitchen"), [-1, 0, 0, 0, 1, 1, 1])
    report = split_report(short, make_split(short, LeaveOneOut()))
    assert report["test"] == {"food": 0, "kitchen": 0}
    assert report["users_not_evaluated"] == 2
    assert report["tied_test_share"] is None


def test_the_hash_tells_splits_and_data_apart(sequences: Sequences) -> None:
    hashes = {make_split(sequences, config).hash for config in CONFIGS}
    assert len(hashes) == len(CONFIGS)
    items = sequences.items.copy()
    items[0] = 2
    other = Sequences.pack(
        items, sequences.domains, sequences.times, sequences.offsets, sequences.domain_names, sequences.item_domain
    )
    assert make_split(other, LeaveOneOut()).hash not in hashes


EVENT = st.tuples(st.integers(2, 12), st.integers(1, 5))
"""A time and an item: few of both, so that ties and repeats are common."""


@given(st.lists(st.lists(EVENT, max_size=9), min_size=1, max_size=6))
@settings(deadline=None, derandomize=True)
def test_roles_keep_their_promises(histories: list[list[tuple[int, int]]]) -> None:
    item_domain = [-1, 0, 0, 1, 1, 2]
    merged = [event for history in histories for event in sorted(history)]
    items = [item for _, item in merged]
    sequences = Sequences.pack(
        items=items,
        domains=[item_domain[item] for item in items],
        times=[time for time, _ in merged],
        offsets=np.cumsum([0, *map(len, histories)]),
        domain_names=("a", "b", "c"),
        item_domain=item_domain,
    )
    users = sequences.event_users()

    loo = make_split(sequences, LeaveOneOut()).role
    for user in range(sequences.num_users):
        own = loo[users == user].tolist()
        expected = [T] * len(own) if len(own) < 3 else [T] * (len(own) - 2) + [V, X]
        assert own == expected

    per_domain = make_split(sequences, PerDomainLast()).role
    for user in range(sequences.num_users):
        for domain in range(sequences.num_domains):
            own = per_domain[(users == user) & (sequences.domains == domain)].tolist()
            assert own == ([T] * len(own) if len(own) < 3 else [T] * (len(own) - 2) + [V, X])

    for target in ("first", "last", "all"):
        timeline = make_split(sequences, GlobalTime(valid_from=5, test_from=9, target=target)).role
        assert (sequences.times[timeline == T] < 5).all()
        assert (sequences.times[timeline == X] >= 9).all()
        valid_times = sequences.times[timeline == V]
        assert ((valid_times >= 5) & (valid_times < 9)).all()
        starts = sequences.offsets[:-1][np.diff(sequences.offsets) > 0]
        assert not np.isin(timeline[starts], [V, X]).any()
        if target != "all":
            for role in (V, X):
                assert (np.bincount(users[timeline == role], minlength=1) <= 1).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_fewer_trained_users_leave_every_target_and_its_history(
    config: LeaveOneOut | PerDomainLast | GlobalTime, sequences: Sequences
) -> None:
    whole = make_split(sequences, config)
    before = np.zeros(sequences.num_users, dtype=bool)
    users = sequences.event_users()
    for share in (0.01, 0.5, 1.0):
        part = make_split(sequences, config, train_users=share)
        changed = part.role != whole.role
        assert set(whole.role[changed]) <= {TRAIN}
        assert set(part.role[changed]) <= {CONTEXT}
        kept = ~np.isin(np.arange(sequences.num_users), users[changed])
        assert not (before & ~kept).any()  # a smaller share is part of a larger one
        before = kept
        assert not (part.role[~kept[users]] == TRAIN).any()
    assert kept.all()
    assert part.hash == whole.hash
