"""Which learning rates are tried, and which is chosen."""

import pytest

from recsys.sweeps.learning_rate import Tuned, Tuning, choose_rate, next_steps

TUNING = Tuning(center=0.01, ratio=2.0, trials=5)


def test_the_first_three_do_not_depend_on_each_other():
    assert next_steps(TUNING, {}) == [0, -1, 1]
    assert next_steps(TUNING, {0.0: 5.0, 1.0: 4.0}) == [-1]


@pytest.mark.parametrize(
    ("losses", "following"),
    [
        ((1.0, 2.0, 3.0), [-2]),  # best at the lower end: further down
        ((3.0, 2.0, 1.0), [2]),
        ((2.0, 1.0, 3.0), [-0.5]),  # inside: between the best and its better neighbour
        ((3.0, 1.0, 2.0), [0.5]),
        ((None, 1.0, 2.0), [0.5]),  # a failed trial is worse than any number
        ((1.0, 1.0, 1.0), [-2]),  # of equals the smallest
    ],
)
def test_what_follows(losses, following):
    tried = dict(zip((-1.0, 0.0, 1.0), losses, strict=True))
    assert next_steps(TUNING, tried) == following


def test_every_search_takes_its_whole_budget_and_no_more():
    for best in (-10.0, -0.3, 0.0, 0.4, 10.0):
        tried: dict[float, float | None] = {}
        while steps := next_steps(TUNING, tried):
            tried |= {step: (step - best) ** 2 for step in steps}
        assert len(tried) == TUNING.trials


def test_nothing_follows_where_nothing_works():
    tried = dict.fromkeys((-1.0, 0.0, 1.0))
    assert next_steps(TUNING, tried) == []
    assert choose_rate(TUNING, tried) is None


def test_the_vertex_of_a_parabola_is_found():
    tried = {step: 3 + (step - 0.25) ** 2 for step in (-1.0, 0.0, 1.0)}
    chosen = choose_rate(TUNING, tried)
    assert chosen is not None
    assert chosen.interior
    assert chosen.rate == pytest.approx(0.01 * 2**0.25, rel=1e-3)


@pytest.mark.parametrize("losses", [(1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (1.0, 1.0, 1.0)])
def test_a_best_value_at_the_end_is_no_optimum(losses):
    chosen = choose_rate(TUNING, dict(zip((-1.0, 0.0, 1.0), losses, strict=True)))
    assert chosen is not None
    assert not chosen.interior


def test_beside_a_failure_the_best_trial_itself_is_taken():
    assert choose_rate(TUNING, {-1.0: 2.0, 0.0: 1.0, 1.0: None}) == Tuned(0.01, interior=True)
