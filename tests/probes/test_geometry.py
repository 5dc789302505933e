"""Ranks, angles, regressions: numbers worked out by hand, and nothing undefined that looks like a number."""

import math

import pytest
import torch

from recsys.probes.geometry import (
    centred,
    effective_rank,
    participation_ratio,
    principal_cosines,
    r_squared,
    regress,
    stable_rank,
    unbiased_hsic,
    varies,
)

LAMBDA = torch.diag(torch.tensor([4.0, 2, 1, 1], dtype=torch.float64) ** 2)  # singular values 4, 2, 1, 1


def test_ranks_of_a_known_spectrum():
    assert float(effective_rank(LAMBDA)) == pytest.approx(3.363586, abs=1e-6)
    assert float(participation_ratio(LAMBDA)) == pytest.approx(1.766423, abs=1e-6)
    assert float(stable_rank(LAMBDA)) == pytest.approx(1.375)
    for rank in (effective_rank, participation_ratio, stable_rank):
        assert float(rank(torch.eye(8, dtype=torch.float64))) == pytest.approx(8)
        assert float(rank(torch.ones(3, 3, dtype=torch.float64))) == pytest.approx(1, abs=1e-6)
        assert float(rank(torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(1)


def test_ranks_do_not_depend_on_scale_or_rotation(cloud):
    turn, _ = torch.linalg.qr(cloud(4, 4))
    for rank in (effective_rank, participation_ratio, stable_rank):
        torch.testing.assert_close(rank(1e12 * turn @ LAMBDA @ turn.T), rank(LAMBDA))


def test_principal_angles_of_two_planes():
    """Planes that share no direction: turned by 30 and 60 degrees."""
    basis = torch.eye(4, dtype=torch.float64)
    turned = torch.zeros(2, 4, dtype=torch.float64)
    for row, degrees in enumerate((30, 60)):
        turned[row, row] = math.cos(math.radians(degrees))
        turned[row, row + 2] = math.sin(math.radians(degrees))
    cosines = principal_cosines(basis[:2].T @ basis[:2], turned.T @ turned, 2)
    angles = cosines.acos().rad2deg()
    torch.testing.assert_close(angles, torch.tensor([30.0, 60.0], dtype=torch.float64))


def test_hsic_is_that_of_the_gram_form(cloud):
    x, y = cloud(50, 3), cloud(50, 5, seed=1) + 2
    y[:, :3] += x
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    n = 50
    one = torch.ones(n, dtype=torch.float64)
    expected = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    expected = (expected - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))
    square_x, square_y = x.square().sum(1), y.square().sum(1)
    found = unbiased_hsic(
        torch.tensor(50.0, dtype=torch.float64),
        x.sum(0),
        y.sum(0),
        x.T @ y,
        square_x.sum(),
        square_y.sum(),
        (square_x * square_y).sum(),
        square_y @ x,
        square_x @ y,
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_regression_leaves_the_residual_and_counts_what_it_spends(cloud):
    x = cloud(200, 3)
    x = torch.cat([x, x[:, :1]], dim=1)  # a predictor twice: three degrees of freedom, not four
    y = x[:, :2] @ cloud(2, 2, seed=1) + cloud(200, 2, seed=2)
    joint = torch.cat([x, y], dim=1)
    scatter = centred(torch.tensor(200.0, dtype=torch.float64), joint.sum(0), joint.T @ joint)
    left, freedom = regress(scatter[4:, 4:], scatter[:4, 4:], scatter[:4, :4])
    assert float(freedom) == pytest.approx(3, abs=1e-4)
    design = torch.cat([x[:, :3], torch.ones(200, 1, dtype=torch.float64)], dim=1)
    residual = y - design @ torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(left, residual.T @ residual, rtol=1e-6, atol=1e-4)
    adjusted = 1 - residual.square().sum() / (y - y.mean(0)).square().sum() * 199 / 196
    count = torch.tensor(200.0, dtype=torch.float64)
    assert float(r_squared(scatter[4:, 4:], left, count, freedom)) == pytest.approx(float(adjusted), abs=1e-5)


def test_a_fit_without_freedom_left_is_undefined():
    eye = torch.eye(2, dtype=torch.float64)
    few = torch.tensor(3.0, dtype=torch.float64)
    assert r_squared(eye, 0 * eye, few, torch.tensor(2.0, dtype=torch.float64)).isnan()


def test_constants_do_not_vary(cloud):
    x = torch.full((1000, 4), 1e6 / 3, dtype=torch.float64)
    count = torch.tensor(1000.0, dtype=torch.float64)
    assert not varies(centred(count, x.sum(0), x.T @ x), x.T @ x)
    x = x + cloud(1000, 4)
    assert varies(centred(count, x.sum(0), x.T @ x), x.T @ x)
