"""The layout of lines by length: every event has a cell of its own, in a block that fits its line."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.models.lines import line_lengths, sort_lines


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any))
def test_lines_lie_in_one_piece_at_the_start_of_a_row(lengths: list[int]) -> None:
    place, blocks = sort_lines(torch.tensor(lengths))
    starts, total = {}, 0
    for rows, length in blocks:
        starts |= {total + row * length: length for row in range(rows)}
        total += rows * length
    lines = [line.tolist() for line in place.split(lengths) if len(line)]
    for line in lines:
        assert line == list(range(line[0], line[0] + len(line)))
        assert len(line) <= starts[line[0]]
    assert len({line[0] for line in lines}) == len(lines) == len(starts), "a row for each line that has events"


def test_short_lines_do_not_share_a_block_with_long_ones() -> None:
    _, blocks = sort_lines(torch.tensor([40, 1] * 40))
    assert {length for _, length in blocks} == {1, 40}


def test_only_the_events_of_the_lines_are_sorted() -> None:
    masks = [torch.tensor([[True, True, False]]), torch.tensor([[False, False], [True, True]])]
    lengths = line_lengths(masks, torch.zeros(4, 2))
    assert lengths is not None
    assert lengths.tolist() == [2, 0, 2]
    assert line_lengths(masks, torch.zeros(5, 2)) is None, "filled up to a fixed size"
    assert line_lengths([torch.zeros(2, 3, dtype=torch.bool)], torch.zeros(0, 2)) is None, "there are none"
