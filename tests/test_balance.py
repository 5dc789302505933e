"""Weights of a step: min-norm points known by hand, and what the weighted sum does to both losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.balance import Pareto, ParetoConfig, min_norm_point


def weights(first, second, sectors=None, losses=(1.0, 1.0)):
    """Of two losses with the given values and gradients."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    values = [
        x @ torch.tensor(slope, dtype=torch.float64) + value
        for slope, value in zip((first, second), losses, strict=True)
    ]
    return Pareto(sectors).weights(*values, [x])


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([0.0, 1.0], (1, 1)),  # orthogonal: half way between the unit vectors, each counts as it is
        ([0.0, 5.0], (1, 0.2)),  # the same whatever the scale of a loss
        ([3.0, 0.0], (1, 1 / 3)),  # parallel: every point between them is the same
        ([-1.0, 0.0], (1, 1)),  # opposed: the sum of the gradients is zero
        ([-4.0, 0.0], (1, 0.25)),
        ([-3.0, 4.0], (1, 0.2)),
    ],
)
def test_two_gradients_meet_half_way(second, expected):
    assert weights([1.0, 0.0], second) == pytest.approx(expected)
    tilted = weights([2.0, 0.0], [2 * part for part in second])
    assert tilted == pytest.approx(expected)  # weights follow the ratio of the norms alone


def test_opposed_gradients_leave_no_step():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, terms = 3 * x.sum(), -0.2 * x.sum()
    of_loss, of_terms = Pareto(None).weights(loss, terms, [x])
    (of_loss * loss + of_terms * terms).backward()  # the graph is still there
    torch.testing.assert_close(x.grad, torch.zeros(2))


def test_min_norm_points_by_hand():
    assert min_norm_point([(1.0, 0.0), (0.0, 1.0)], 0.0) == pytest.approx((0.5, 0.5))
    # A triangle whose nearest side is that between the second and the third corner: t = 1.707 / 3 on the way.
    corner = (1 - math.sqrt(0.5), -math.sqrt(0.5))
    t = (1 + math.sqrt(0.5)) / (corner[0] ** 2 + (1 + math.sqrt(0.5)) ** 2)
    found = min_norm_point([(1.0, 0.0), (0.0, 1.0), corner], 0.0)
    assert found == pytest.approx((t * corner[0], 1 - t * (1 + math.sqrt(0.5))))
    # Oblique vectors, 60 degrees apart: along the first alone is nearer than any mixture with a longer one.
    assert min_norm_point([(1.0, 0.0), (0.0, 3.0)], 0.5) == pytest.approx((1.0, 0.0))


def test_sectors_ask_for_a_ratio_of_the_losses():
    """Far above the terms, the loss is let go first, and the other way round; near what is asked for, both alike."""
    first, second = [1.0, 0.0], [0.0, 1.0]
    assert weights(first, second, 2, (1.0, 1.0)) == pytest.approx((1, 1))
    heavy = weights(first, second, 2, (10.0, 0.1))
    light = weights(first, second, 2, (0.1, 10.0))
    assert heavy == pytest.approx(light[::-1])
    # The corner of the test above, scaled to a mean weight of 1.
    assert heavy[0] / heavy[1] == pytest.approx(0.1667 / 0.0287, rel=1e-2)
    assert sum(heavy) == pytest.approx(2)
    # Four sectors ask for p_1 at 22.5 degrees.
    angle = math.pi / 8
    assert weights(first, second, 4, (math.cos(angle), math.sin(angle))) == pytest.approx((1, 1))


def test_nothing_to_balance():
    assert weights([1.0, 0.0], [0.0, 0.0]) == (1, 1)
    assert weights([0.0, 0.0], [1.0, 0.0]) == (1, 1)
    assert weights([math.nan, 0.0], [1.0, 0.0]) == (1, 1)
    x = torch.zeros(2, requires_grad=True)
    assert Pareto(None).weights(x.sum(), torch.ones(()), [x]) == (1, 1)  # a term of nothing


def test_parameters_that_one_loss_alone_reaches_count_in_its_norm():
    x, y = (torch.zeros(2, requires_grad=True) for _ in range(2))
    loss, terms = 3 * x[0] + 4 * y[0], 2 * x[1]
    assert Pareto(None).weights(loss, terms, [x, y]) == pytest.approx((1, 2.5))
    assert Pareto(None).weights(loss, terms, [x]) == pytest.approx((1, 1.5))


slopes = st.lists(st.floats(-5, 5).filter(lambda value: abs(value) > 0.01), min_size=2, max_size=2)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(first=slopes, second=slopes, sectors=st.sampled_from([None, 2, 3, 5]), angle=st.floats(0.01, 1.56))
def test_no_loss_rises(first, second, sectors, angle):
    """The weighted sum's gradient points up in neither loss's descent, nor against the sector asked for."""
    losses = (math.cos(angle), math.sin(angle))
    one, two = weights(first, second, sectors, losses)
    step = [one * a + two * b for a, b in zip(first, second, strict=True)]
    for slope in (first, second):
        assert sum(a * b for a, b in zip(step, slope, strict=True)) >= -1e-6


def test_min_norm_is_no_longer_than_any_mixture():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cosine = float(torch.rand(1, generator=generator)) * 1.9 - 0.95
        points = [(1.0, 0.0), (0.0, 1.0), (0.3, -0.6)]
        gram = torch.tensor([[1, cosine], [cosine, 1]])
        shares = torch.distributions.Dirichlet(torch.ones(3)).sample((500,))
        mixtures = shares @ torch.tensor(points)
        best = torch.tensor(min_norm_point(points, cosine))
        assert best @ gram @ best <= (mixtures @ gram * mixtures).sum(1).min() + 1e-6


def test_one_sector_is_none():
    with pytest.raises(ValidationError, match="sectors"):
        ParetoConfig(sectors=1)
