import cProfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.data.batches import EvalBatch, EvalBatches, TrainBatches, make_catalog, training_events
from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import CONTEXT, TEST, TRAIN, VALID, LeaveOneOut, PerDomainLast, Split, make_split
from recsys.types import NO_DOMAIN, PAD_ID, Batch

Row = tuple[int, tuple[int, ...], tuple[int, ...]]
STAGES = ("validation", "test")
NUM_ITEMS = 6


def pack(*users: list[int], times: np.ndarray | None = None, num_items: int = NUM_ITEMS) -> Sequences:
    """Users as lists of items; the first half of the ids is food, the second kitchen."""
    items = np.array([item for user in users for item in user], dtype=np.int64)
    item_domain = np.repeat([-1, 0, 1], [1, num_items // 2, num_items - num_items // 2])
    return Sequences.pack(
        items=items,
        domains=item_domain[items],
        times=100 + np.arange(len(items)) if times is None else times,
        offsets=np.cumsum([0, *map(len, users)]),
        domain_names=("food", "kitchen"),
        item_domain=item_domain,
    )


def with_roles(*roles: list[int]) -> Split:
    return Split("by hand", np.array([role for user in roles for role in user], dtype=np.uint8), "by hand")


@pytest.fixture
def sequences() -> Sequences:
    """User 0 has five events of both domains, user 1 three, user 2 two."""
    return pack([1, 4, 2, 5, 3], [6, 1, 4], [2, 3])


def train_batches(sequences: Sequences, split: Split, **changes: object) -> TrainBatches:
    options = {"max_len": 50, "batch_size": 2, "seed": 0, "device": "cpu"}
    return TrainBatches(sequences, split, **(options | changes))


def eval_batches(sequences: Sequences, split: Split, stage: str, **changes: object) -> EvalBatches:
    options = {"max_len": 50, "batch_size": 4, "device": "cpu"}
    return EvalBatches(sequences, split, stage, **(options | changes))


def real(values: Tensor) -> tuple[int, ...]:
    return tuple(value for value in values.tolist() if value != PAD_ID)


def rows_of(batches: TrainBatches) -> Counter[Row]:
    """User, items and targets of every row, without the padding."""
    rows: Counter[Row] = Counter()
    for batch in batches:
        for user, items, targets in zip(batch.user.tolist(), batch.items, batch.targets, strict=True):
            rows[user, real(items), real(targets)] += 1
    return rows


def questions(batches: EvalBatches) -> dict[tuple[int, int], tuple[tuple[int, ...], int]]:
    """(user, position) -> (history, target)."""
    found = {}
    for rows in batches:
        for user, position, items, targets in zip(
            rows.batch.user.tolist(), rows.position.tolist(), rows.batch.items, rows.batch.targets, strict=True
        ):
            found[user, position] = (real(items), int(targets[-1]))
    return found


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(column, right.columns()[name]) for name, column in left.columns().items())


# By hand


def test_training_batch_by_hand(sequences: Sequences) -> None:
    split = with_roles([TRAIN, TRAIN, TRAIN, VALID, TEST], [TRAIN, VALID, TEST], [TRAIN, TRAIN])
    batches = train_batches(sequences, split)
    (batch,) = batches
    order = batch.user.argsort()
    batch = batch.map(lambda tensor: tensor[order])
    assert batch.user.tolist() == [0, 2]
    assert batch.items.tolist() == [[1, 4], [PAD_ID, 2]]
    assert batch.domains.tolist() == [[0, 1], [NO_DOMAIN, 0]]
    assert batch.times.tolist() == [[100, 101], [0, 108]]
    assert batch.targets.tolist() == [[4, 2], [PAD_ID, 3]]  # the last TRAIN event is a target
    assert batch.target_domains.tolist() == [[1, 0], [NO_DOMAIN, 0]]
    assert {column.dtype for column in batch.columns().values()} == {torch.int64}
    assert batches.skipped == 1  # user 1 has a single TRAIN event
    assert len(batches) == 1


def test_validation_batches_by_hand(sequences: Sequences) -> None:
    split = make_split(sequences, LeaveOneOut())
    food, kitchen = eval_batches(sequences, split, "validation")
    assert food.batch.user.tolist() == [1]
    assert food.batch.items.tolist() == [[6]]
    assert food.batch.targets.tolist() == [[1]]
    assert kitchen.batch.user.tolist() == [0]
    assert kitchen.batch.items.tolist() == [[1, 4, 2]]
    assert kitchen.batch.domains.tolist() == [[0, 1, 0]]
    assert kitchen.batch.times.tolist() == [[100, 101, 102]]
    assert kitchen.batch.targets.tolist() == [[PAD_ID, PAD_ID, 5]]
    assert kitchen.batch.target_domains.tolist() == [[NO_DOMAIN, NO_DOMAIN, 1]]


def test_test_batches_by_hand(sequences: Sequences) -> None:
    split = make_split(sequences, LeaveOneOut())
    food, kitchen = eval_batches(sequences, split, "test")
    assert food.batch.items.tolist() == [[1, 4, 2, 5]]  # with the validation item
    assert food.batch.targets.tolist() == [[PAD_ID, PAD_ID, PAD_ID, 3]]
    assert food.history.tolist() == [4]
    assert food.position.tolist() == [4]
    assert kitchen.batch.items.tolist() == [[6, 1]]
    assert kitchen.batch.targets.tolist() == [[PAD_ID, 4]]
    assert kitchen.position.tolist() == [7]


def test_shorter_histories_are_padded_on_the_left() -> None:
    sequences = pack([1, 2, 3, 4, 5, 1], [2, 4, 1, 3])
    (rows,) = eval_batches(sequences, make_split(sequences, LeaveOneOut()), "test")
    assert rows.batch.user.tolist() == [1, 0]
    assert rows.batch.items.tolist() == [[PAD_ID, PAD_ID, 2, 4, 1], [1, 2, 3, 4, 5]]
    assert rows.batch.domains.tolist() == [[NO_DOMAIN, NO_DOMAIN, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert rows.batch.times.tolist() == [[0, 0, 106, 107, 108], [100, 101, 102, 103, 104]]
    assert rows.batch.targets[:, -1].tolist() == [3, 1]
    assert rows.history.tolist() == [3, 5]


def test_seen_is_the_whole_history_while_the_batch_is_cut() -> None:
    sequences = pack([1, 4, 2, 5, 3, 1, 4], [6, 4, 5])
    (rows,) = eval_batches(sequences, make_split(sequences, LeaveOneOut()), "test", max_len=2)
    assert rows.batch.user.tolist() == [1, 0]
    assert rows.batch.items.tolist() == [[6, 4], [3, 1]]
    assert rows.seen.tolist() == [[0, 0, 0, 0, 6, 4], [1, 4, 2, 5, 3, 1]]  # user 0's target, 4, repeats an item
    assert rows.history.tolist() == [2, 6]


def test_context_and_earlier_validation_events_are_history() -> None:
    sequences = pack([1, 2, 4, 3, 5, 6])
    split = with_roles([TRAIN, CONTEXT, TEST, VALID, CONTEXT, TEST])
    assert questions(eval_batches(sequences, split, "validation")) == {(0, 3): ((1, 2), 3)}
    assert questions(eval_batches(sequences, split, "test")) == {(0, 2): ((1, 2), 4), (0, 5): ((1, 2, 4, 3, 5), 6)}


def test_a_single_domain_sees_and_asks_nothing_else(sequences: Sequences) -> None:
    split = make_split(sequences, LeaveOneOut())  # of all domains: the view does not change it
    assert rows_of(train_batches(sequences, split, domain="food")) == {(0, (1,), (2,)): 1, (2, (2,), (3,)): 1}
    assert rows_of(train_batches(sequences, split, domain="kitchen")) == {}
    (rows,) = eval_batches(sequences, split, "test", domain="food")
    assert rows.batch.items.tolist() == [[1, 2]]
    assert rows.batch.targets[0, -1] == 3
    assert rows.seen.tolist() == [[1, 2]]
    assert rows.history.tolist() == [2]
    assert rows.position.tolist() == [4]  # in the packed sequences, not in the view
    events = training_events(sequences, split, domain="food")
    assert events.items.tolist() == [1, 2, 2, 3]
    assert events.offsets.tolist() == [0, 2, 2, 4]


def test_a_target_without_history_is_skipped_and_counted(sequences: Sequences) -> None:
    split = make_split(sequences, LeaveOneOut())
    batches = eval_batches(sequences, split, "validation", domain="food")  # user 1's first food event
    assert list(batches) == []
    assert len(batches) == 0
    assert batches.skipped == 1
    assert eval_batches(sequences, split, "validation").skipped == 0


def test_an_unknown_domain_is_named(sequences: Sequences) -> None:
    split = make_split(sequences, LeaveOneOut())
    with pytest.raises(DataError, match="did you mean 'kitchen'"):
        train_batches(sequences, split, domain="kitchn")
    with pytest.raises(DataError, match="no domain 'toys'"):
        eval_batches(sequences, split, "test", domain="toys")


def test_catalog_and_stream_hold_training_events_only(sequences: Sequences) -> None:
    split = with_roles([TRAIN, TRAIN, TRAIN, VALID, TEST], [TRAIN, VALID, TEST], [TRAIN, TRAIN])
    catalog = make_catalog(sequences, split)
    assert catalog.domain_names == ("food", "kitchen")
    assert catalog.item_domain.tolist() == [NO_DOMAIN, 0, 0, 0, 1, 1, 1]
    assert catalog.train_counts.tolist() == [0, 1, 2, 1, 1, 0, 1]
    events = training_events(sequences, split)
    assert events.items.tolist() == [1, 4, 2, 6, 2, 3]
    assert events.offsets.tolist() == [0, 3, 4, 6]
    assert len(events.times) == 6


# Windows

LONG = list(range(1, 9))  # 8 events of one user


@pytest.mark.parametrize(
    ("windows", "rows"),
    [
        ("last", [((5, 6, 7), (6, 7, 8))]),
        ("all", [((1,), (2,)), ((2, 3, 4), (3, 4, 5)), ((5, 6, 7), (6, 7, 8))]),
    ],
)
def test_windows_by_hand(windows: str, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    sequences = pack(LONG, num_items=8)
    batches = train_batches(sequences, with_roles([TRAIN] * 8), max_len=3, windows=windows)
    assert rows_of(batches) == Counter((0, items, targets) for items, targets in rows)
    assert batches.skipped == 0


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), max_len=st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_all_windows_make_every_event_but_the_first_a_target_once(lengths: list[int], max_len: int) -> None:
    first = np.cumsum([1, *lengths])
    users = [list(range(start, start + length)) for start, length in zip(first, lengths, strict=False)]
    total = sum(lengths)
    sequences = pack(*users, num_items=max(total, 2))
    batches = train_batches(sequences, with_roles([TRAIN] * total), max_len=max_len, windows="all", batch_size=3)
    targets = [target for _, _, row in rows_of(batches).elements() for target in row]
    assert sorted(targets) == [item for user in users for item in user[1:]]
    for _, items, follow in rows_of(batches):
        assert len(items) == len(follow) <= max_len
        assert list(follow) == [item + 1 for item in items]
    assert batches.skipped == sum(length < 2 for length in lengths)


# Leaks


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    config=st.sampled_from([None, LeaveOneOut(), PerDomainLast()]),
    max_len=st.integers(1, 5),
    domain=st.sampled_from([None, "food", "kitchen"]),
)
@settings(deadline=None, derandomize=True)
def test_no_batch_shows_what_its_split_forbids(
    lengths: list[int], seed: int, config: LeaveOneOut | PerDomainLast | None, max_len: int, domain: str | None
) -> None:
    total = sum(lengths)
    generator = np.random.default_rng(seed)
    items = 1 + generator.permutation(max(total, 2))[:total]  # an item of its own for each event: it names the event
    users = [part.tolist() for part in np.split(items, np.cumsum(lengths)[:-1])]
    sequences = pack(*users, num_items=max(total, 2))
    split = make_split(sequences, config) if config else with_roles(generator.integers(0, 4, total).tolist())
    role = dict(zip(sequences.items.tolist(), split.role.tolist(), strict=True))
    place = dict(zip(sequences.items.tolist(), range(len(role)), strict=True))
    allowed = {None: {0, 1}, "food": {0}, "kitchen": {1}}[domain]
    for batch in train_batches(sequences, split, max_len=max_len, domain=domain, windows="all"):
        shown = set(real(batch.items.flatten())) | set(real(batch.targets.flatten()))
        assert {role[item] for item in shown} <= {TRAIN}
        assert {int(sequences.item_domain[item]) for item in shown} <= allowed

    for stage, wanted in (("validation", VALID), ("test", TEST)):
        batches = eval_batches(sequences, split, stage, max_len=max_len, domain=domain)
        asked = 0
        for rows in batches:
            assert rows.batch.target_domains[:, -1].unique().numel() == 1
            assert not rows.batch.targets[:, :-1].any()
            for row, (user, target) in enumerate(
                zip(rows.batch.user.tolist(), rows.batch.targets[:, -1].tolist(), strict=True)
            ):
                asked += 1
                position = place[target]
                assert role[target] == wanted
                assert rows.position[row] == position
                assert rows.batch.target_domains[row, -1] == sequences.domains[position]
                assert sequences.domains[position] in allowed
                history = [
                    int(sequences.items[index])
                    for index in range(sequences.offsets[user], position)
                    if (stage == "test" or split.role[index] != TEST) and sequences.domains[index] in allowed
                ]
                assert list(real(rows.batch.items[row])) == history[-max_len:]
                assert list(real(rows.seen[row])) == history
                assert rows.history[row] == len(history) > 0
        in_view = np.isin(sequences.domains, list(allowed))
        assert asked + batches.skipped == ((split.role == wanted) & in_view).sum()


# Epochs


def many(num_users: int = 400, seed: int = 0) -> Sequences:
    generator = np.random.default_rng(seed)
    return pack(
        *[generator.integers(1, 61, length).tolist() for length in generator.integers(1, 30, num_users)], num_items=60
    )


@pytest.fixture(scope="module")
def large() -> tuple[Sequences, Split]:
    sequences = many()
    return sequences, make_split(sequences, LeaveOneOut())


def test_an_epoch_is_a_function_of_seed_and_epoch(large: tuple[Sequences, Split]) -> None:
    def users(seed: int, epoch: int) -> list[int]:
        batches = train_batches(*large, seed=seed, batch_size=16)
        batches.set_epoch(epoch)
        return torch.cat([batch.user for batch in batches]).tolist()

    assert users(3, 5) == users(3, 5)
    orders = [users(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_earlier_epochs_and_global_seeds_do_not_matter(large: tuple[Sequences, Split]) -> None:
    fresh, used = train_batches(*large), train_batches(*large)
    torch.manual_seed(1)
    list(used)
    for batches in (fresh, used):
        batches.set_epoch(7)
    torch.manual_seed(2)
    assert all(same(left, right) for left, right in zip(fresh, used, strict=True))


@pytest.mark.parametrize("taken", [0, 3, 20])
def test_a_loaded_state_gives_the_remaining_batches(large: tuple[Sequences, Split], taken: int) -> None:
    batches = train_batches(*large, batch_size=16)
    batches.set_epoch(2)
    iterator = iter(batches)
    for _ in range(taken):
        next(iterator)
    resumed = train_batches(*large, batch_size=16)
    resumed.load_state_dict(batches.state_dict())
    resumed.set_epoch(2)  # the epoch it is in
    remaining = list(resumed)
    assert len(remaining) == len(batches) - taken
    assert all(same(left, right) for left, right in zip(iterator, remaining, strict=True))
    assert len(list(resumed)) == len(batches)  # the rest was given once


def test_another_epoch_than_the_loaded_one_is_whole(large: tuple[Sequences, Split]) -> None:
    resumed, fresh = train_batches(*large), train_batches(*large)
    resumed.load_state_dict({"epoch": 2, "batch": 5})
    for batches in (resumed, fresh):
        batches.set_epoch(3)
    assert resumed.state_dict() == {"epoch": 3, "batch": 0}
    assert all(same(left, right) for left, right in zip(resumed, fresh, strict=True))


def test_the_state_after_an_epoch_leaves_nothing_of_it(large: tuple[Sequences, Split]) -> None:
    batches = train_batches(*large)
    list(batches)
    assert batches.state_dict() == {"epoch": 0, "batch": len(batches)}
    resumed = train_batches(*large)
    resumed.load_state_dict(batches.state_dict())
    assert list(resumed) == []


def test_an_iteration_that_was_left_starts_again(large: tuple[Sequences, Split]) -> None:
    batches = train_batches(*large)
    first = next(iter(batches))
    assert same(first, next(iter(batches)))
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize("batch_size", [3, 64, 1000])
def test_batch_size_changes_no_row(large: tuple[Sequences, Split], batch_size: int) -> None:
    sequences, split = large
    batches = train_batches(sequences, split, batch_size=batch_size, max_len=5, windows="all")
    assert rows_of(batches) == rows_of(train_batches(sequences, split, max_len=5, windows="all"))
    sizes = [len(batch.user) for batch in batches]
    assert len(sizes) == len(batches)
    assert sorted(sizes)[1:] == [batch_size] * (len(sizes) - 1)
    for stage in STAGES:
        wanted = questions(eval_batches(sequences, split, stage))
        batches = eval_batches(sequences, split, stage, batch_size=batch_size)
        assert questions(batches) == wanted
        assert len(list(batches)) == len(batches)


def test_batches_of_like_lengths_hold_little_padding(large: tuple[Sequences, Split]) -> None:
    batches = list(train_batches(*large, batch_size=16))
    assert sum(int((~batch.mask).sum()) for batch in batches) < 0.1 * sum(batch.items.numel() for batch in batches)
    assert all(batch.mask.any(dim=0).all() for batch in batches)  # trimmed to the longest row
    lengths = [batch.items.shape[1] for batch in batches]
    assert lengths != sorted(lengths)


def test_lengths_are_alike_within_pools_only(large: tuple[Sequences, Split]) -> None:
    """Sorted over all rows, the same users would meet in every epoch."""
    lengths = [batch.mask.sum(dim=1) for batch in train_batches(*large, batch_size=4)]
    ranges = sorted((int(length.min()), int(length.max())) for length in lengths)
    assert any(longest > shortest for (_, longest), (shortest, _) in pairwise(ranges))


def test_evaluation_has_a_fixed_order_and_no_needless_padding(large: tuple[Sequences, Split]) -> None:
    def rows() -> list[EvalBatch]:
        return list(eval_batches(*large, "test", batch_size=32, max_len=10))

    assert all(same(left.batch, right.batch) for left, right in zip(rows(), rows(), strict=True))
    assert all((rows.seen != PAD_ID).any(dim=0).all() for rows in rows())
    domains = [int(rows.batch.target_domains[0, -1]) for rows in rows()]
    assert domains == sorted(domains)


def test_nobody_to_train_or_test() -> None:
    sequences = pack([1], [2])
    split = make_split(sequences, LeaveOneOut())
    batches = train_batches(sequences, split)
    assert list(batches) == []
    assert len(batches) == 0
    assert batches.skipped == 2
    assert list(eval_batches(sequences, split, "test")) == []


def test_memory_maps_give_the_same_batches(large: tuple[Sequences, Split], tmp_path: Path) -> None:
    sequences, split = large
    sequences.save(tmp_path)
    mapped = Sequences.load(tmp_path)
    assert isinstance(mapped.items, np.memmap)
    split_of_mapped = make_split(mapped, LeaveOneOut())
    for left, right in zip(train_batches(sequences, split), train_batches(mapped, split_of_mapped), strict=True):
        assert same(left, right)
    for left, right in zip(
        eval_batches(sequences, split, "test"), eval_batches(mapped, split_of_mapped, "test"), strict=True
    ):
        assert same(left.batch, right.batch)


def test_a_million_events_are_gathered_without_python_per_event() -> None:
    generator = np.random.default_rng(0)
    length = generator.integers(3, 60, 32_000)
    items = generator.integers(1, 1001, length.sum())
    item_domain = np.repeat([-1, 0, 1], [1, 500, 500])
    sequences = Sequences.pack(
        items,
        item_domain[items],
        np.arange(len(items)),
        np.concatenate([[0], np.cumsum(length)]),
        ("a", "b"),
        item_domain,
    )
    assert len(items) > 990_000
    split = make_split(sequences, LeaveOneOut())
    batches = train_batches(sequences, split, batch_size=256)
    calls = cProfile.Profile()
    seen = calls.runcall(lambda: sum(int(batch.mask.sum()) for batch in batches))
    assert seen == (np.minimum(length - 3, 50)).sum()
    # Checks of types included, a batch of 256 users and some 6,000 events is 1,200 calls.
    assert sum(entry.callcount for entry in calls.getstats()) / len(batches) < 2000
