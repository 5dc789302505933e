import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.evaluation.rank import NonFiniteScores, RankInterval, cross_entropy, hide, rank, rank_sampled


def ranked(scores: Tensor, target: Tensor, excluded: Tensor | None, users: Tensor) -> RankInterval:
    """`excluded` as a mask."""
    columns = excluded
    if excluded is not None:
        columns = torch.arange(scores.shape[1]).expand_as(excluded).where(excluded, target[:, None])
    return rank(hide(scores, target, columns, users), target)


def as_lists(ranks: RankInterval) -> list[list[int]]:
    return [ranks.greater.tolist(), ranks.ties.tolist(), ranks.candidates.tolist()]


SCORES = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
TARGET = torch.tensor([2, 0, 4])
USERS = torch.tensor([7, 8, 9])


def test_rank_by_hand():
    assert as_lists(ranked(SCORES, TARGET, None, USERS)) == [[2, 0, 0], [1, 4, 0], [5, 5, 5]]


def test_excluded_candidates_do_not_count_and_the_target_is_never_excluded():
    excluded = torch.zeros_like(SCORES, dtype=torch.bool)
    excluded[0, [3, 4]] = True  # one tie and one above
    excluded[1] = True
    excluded[2, 0] = True
    assert as_lists(ranked(SCORES, TARGET, excluded, USERS)) == [[1, 0, 0], [0, 0, 0], [3, 1, 4]]
    assert SCORES.min() == 0, "the caller's scores are left alone"


def test_a_single_candidate_is_first():
    assert as_lists(ranked(torch.zeros(1, 1), torch.tensor([0]), None, torch.tensor([0]))) == [[0], [0], [1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 2])
def test_scores_that_are_not_finite_stop_everything_and_name_users(bad: float, column: int):
    scores = SCORES.clone()
    scores[0, column] = scores[2, column] = bad
    with pytest.raises(NonFiniteScores, match=r"2 scores of 2 out of 3 targets .*users 7, 9\)"):
        ranked(scores, TARGET, None, USERS)
    with pytest.raises(NonFiniteScores, match="users 7, 9"):
        rank_sampled(scores, TARGET, torch.full((3, 2), column), USERS)


def test_only_the_first_users_are_named():
    scores = torch.full((8, 3), torch.nan)
    with pytest.raises(NonFiniteScores, match=r"24 scores of 8 out of 8 .*users 0, 1, 2, 3, 4, \.\.\."):
        ranked(scores, torch.zeros(8, dtype=torch.long), None, torch.arange(8))


def test_a_score_that_does_not_count_may_be_anything():
    scores = SCORES.clone()
    scores[0, 4] = torch.nan
    excluded = scores.isnan()
    assert as_lists(ranked(scores, TARGET, excluded, USERS)) == [[1, 0, 0], [1, 4, 0], [4, 5, 5]]
    assert as_lists(rank_sampled(scores, TARGET, torch.tensor([[0, 3]] * 3), USERS)) == [
        [1, 0, 0],
        [1, 1, 0],
        [3, 2, 3],
    ]


def test_sampled_negatives_count_as_often_as_drawn_and_fillers_do_not():
    negatives = torch.tensor([[4, 4, 2], [1, 2, 3], [4, 4, 4]])
    assert as_lists(rank_sampled(SCORES, TARGET, negatives, USERS)) == [[2, 0, 0], [0, 3, 0], [3, 4, 1]]


def test_scores_within_the_margin_tie():
    scores = torch.tensor([[0.0, 1e-6, -1e-6, 1e-4, -1e-4]])
    negatives = torch.tensor([[1, 2, 3, 4]])
    first = torch.tensor([0])
    assert as_lists(rank_sampled(scores, first, negatives, first, margin=1e-5)) == [[1], [2], [5]]
    assert as_lists(rank_sampled(scores, first, negatives, first)) == [[2], [0], [5]]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 11), st.data())
def test_rank_agrees_with_counting(values: list[int], target: int, data: st.DataObject):
    target %= len(values)
    hidden = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    ranks = ranked(
        torch.tensor([values], dtype=torch.float32), torch.tensor([target]), torch.tensor([hidden]), torch.tensor([0])
    )
    others = [value for place, value in enumerate(values) if place != target and not hidden[place]]
    assert as_lists(ranks) == [
        [sum(value > values[target] for value in others)],
        [sum(value == values[target] for value in others)],
        [len(others) + 1],
    ]


def test_half_precision_scores_are_compared_exactly():
    ranks = ranked(SCORES.bfloat16(), TARGET, None, USERS)
    assert as_lists(ranks) == as_lists(ranked(SCORES, TARGET, None, USERS))
    assert cross_entropy(SCORES.bfloat16(), TARGET).dtype == torch.float32


def test_cross_entropy_by_torch():
    expected = torch.nn.functional.cross_entropy(SCORES, TARGET, reduction="none")
    torch.testing.assert_close(cross_entropy(SCORES, TARGET), expected)
    torch.testing.assert_close(cross_entropy(SCORES + 1000, TARGET), expected, atol=1e-4, rtol=0)
    hidden = torch.cat([SCORES, torch.full((3, 1), -torch.inf)], dim=1)
    torch.testing.assert_close(cross_entropy(hidden, TARGET), expected)
    assert cross_entropy(torch.tensor([[3.0, -torch.inf]]), torch.tensor([0])) == 0


def test_cross_entropy_of_a_row_does_not_depend_on_the_others():
    scores = torch.randn(300, 1237, generator=torch.Generator().manual_seed(0)) * 4
    target = torch.arange(300)
    alone = torch.cat([cross_entropy(scores[row : row + 1], target[row : row + 1]) for row in range(300)])
    assert torch.equal(cross_entropy(scores, target), alone)


def test_large_scores_are_finite_where_their_sum_is_not():
    scores = torch.tensor([[3e38, 2e38, 1e38, -3e38]])
    assert as_lists(ranked(scores, torch.tensor([1]), None, USERS[:1])) == [[1], [0], [4]]
