"""Chance levels: the exact law of isotropic vectors, pairs of other users, Gaussians of the same covariance."""

import numpy as np
import pytest
import torch

from recsys.models.attention import CrossAttention
from recsys.models.initialization import initialize
from recsys.probes.measures import Alignment, Dependence
from recsys.probes.nulls import covariance_matched, isotropic, isotropic_histogram, other_users, unrelated


def zeros(count):
    return torch.zeros(count, dtype=torch.int64)


def align(x, y):
    metric = Alignment()
    metric.update(x, y[:, None], zeros(len(x)))
    return metric


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [(8, 0.291026), (16, 0.202610), (32, 0.142153), (64, 0.100126), (128, 0.070662), (256, 0.049917), (1, 1.0)],
)
def test_mean_absolute_cosine_of_random_directions(dimension, expected):
    assert isotropic(dimension)["cos_abs_mean"] == pytest.approx(expected, abs=1e-6)


def test_the_isotropic_law_is_that_of_samples(cloud):
    found = align(cloud(200_000, 5), cloud(200_000, 5, seed=1))
    for name, value in isotropic(5).items():
        assert float(found.compute()[name]) == pytest.approx(value, abs=5e-3), name
    shares = found.histogram[0].numpy() / 200_000
    np.testing.assert_allclose(isotropic_histogram(5, 200), shares, atol=1e-3)


@pytest.mark.parametrize("dimension", [1, 2, 3, 64])
def test_the_isotropic_histogram_is_a_symmetric_distribution(dimension):
    shares = isotropic_histogram(dimension, 50)
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, shares[::-1], atol=1e-12)
    if dimension == 1:
        assert shares[0] == 0.5
    if dimension == 3:
        np.testing.assert_allclose(shares, 0.02, atol=1e-12)  # Archimedes: uniform


def test_two_layer_norms_cost_a_dimension(cloud):
    norm = torch.nn.LayerNorm(8, elementwise_affine=False, dtype=torch.float64)
    found = align(norm(cloud(100_000, 8)), norm(cloud(100_000, 8, seed=1))).compute()
    assert float(found["cos2_mean"]) == pytest.approx(isotropic(7)["cos2_mean"], rel=0.02)
    found = align(norm(cloud(100_000, 8)), cloud(100_000, 8, seed=1)).compute()
    assert float(found["cos2_mean"]) == pytest.approx(isotropic(8)["cos2_mean"], rel=0.02)


@pytest.mark.parametrize("d_model", [32, 64])
def test_an_untrained_module_is_at_chance(d_model):
    """The claim's trap: nothing has been learned, and query and output are as orthogonal as chance makes them."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(8):
        module = CrossAttention(d_model, 2, layer_norm=True)
        initialize(module, generator)
        query, context = torch.randn(2, 200, 20, d_model, generator=generator).unbind()
        with torch.no_grad():
            output = module(query, context, torch.ones(200, 20, 20, dtype=torch.bool))
        found = align(query.flatten(0, 1), output.flatten(0, 1)).compute()
        ratios.append(float(found["cos2_mean"]) * d_model)
    assert 0.9 <= sum(ratios) / len(ratios) <= 1.1


def test_covariance_matched_pairs_have_the_mean_of_anisotropy(cloud):
    """With a common mean, mean cos = |mu|² / (tr Sigma + |mu|²) in many dimensions, where isotropy says 0."""
    d = 64
    mean = torch.full((d,), 0.5, dtype=torch.float64)
    x, y = mean + cloud(3000, d), mean + cloud(3000, d, seed=1)
    pairs = Dependence(d)
    pairs.update(x, x, y, zeros(3000))
    chance = covariance_matched(pairs, samples=20_000, seed=0, bins=20)
    expected = float(mean @ mean / (d + mean @ mean))
    assert float(chance.compute()["cos_mean"]) == pytest.approx(expected, rel=0.03)
    actual = align(x, y).compute()
    for name in ("cos_abs_mean", "cos2_mean", "parallel_energy"):
        assert float(chance.compute()[name]) == pytest.approx(float(actual[name]), rel=0.05)
    again = covariance_matched(pairs, samples=20_000, seed=0, bins=20)
    assert torch.equal(chance.histogram, again.histogram)
    assert covariance_matched(Dependence(d), 10, 0, 10) is None
    assert unrelated(pairs)["subspace_overlap"] == 8 / 64


@pytest.mark.parametrize("seed", range(20))
def test_partners_are_other_users_at_the_same_place(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, length = int(torch.randint(1, 9, (1,), generator=generator)), 5
    user = torch.randint(0, 5, (rows,), generator=generator) + 100
    tokens = torch.rand(rows, length, generator=generator) < 0.7
    partner, paired = other_users(user, tokens, generator)
    assert not (paired & ~tokens).any()
    for column in range(length):
        here = tokens[:, column]
        chosen = partner[:, column][here]
        assert sorted(chosen.tolist()) == here.nonzero().flatten().tolist()  # each once
        assert (user[partner[:, column]] != user)[paired[:, column]].all()
        counts = torch.bincount(user[here] - 100)
        if len(counts) and 2 * int(counts.max()) <= int(counts.sum()):
            assert torch.equal(paired[:, column], here)  # whoever can be paired is


def test_partners_change_with_the_draw():
    user, tokens = torch.arange(30), torch.ones(30, 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    first, _ = other_users(user, tokens, generator)
    second, _ = other_users(user, tokens, generator)
    assert not torch.equal(first, second)
