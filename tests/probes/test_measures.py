"""The metrics: answers known by hand, sums that add up over batches and processes, intervals that keep their word."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.probes.measures import (
    Alignment,
    AttentionEntropy,
    Dependence,
    GateStatistics,
    NormBudget,
    Silence,
    fold_of,
    jackknife,
    total,
)

METRICS = [
    lambda: Alignment(num_parts=2, num_folds=3, bins=10),
    lambda: Dependence(4, num_folds=3, subspace=2),
    lambda: NormBudget(3),
    lambda: AttentionEntropy(2, 3),
    lambda: GateStatistics(3),
    lambda: Silence(3),
]


def zeros(count):
    return torch.zeros(count, dtype=torch.int64)


def feed(metric, x, y, z, fold):
    """Some update that fits the metric."""
    if isinstance(metric, Alignment):
        metric.update(x, torch.stack([y, z], dim=1), fold)
    elif isinstance(metric, Dependence):
        metric.update(x, z, y, fold)
    elif isinstance(metric, NormBudget):
        metric.update(x, y, fold)
    elif isinstance(metric, AttentionEntropy):
        valid = z > -0.5
        valid[:, 0] = True
        weights = torch.stack([x, y], dim=1).masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        metric.update(weights, valid, fold)
    elif isinstance(metric, GateStatistics):
        metric.update(x.sigmoid(), y, x.sigmoid() * y, fold)
    else:
        metric.update(x[:, 0] > 0, fold)
    return metric


def align(x, y, **sizes):
    metric = Alignment(**sizes)
    metric.update(x, y[:, None], zeros(len(x)))
    return metric.compute()


def depend(x, z, y, **sizes):
    metric = Dependence(x.shape[1], **sizes)
    metric.update(x, z, y, zeros(len(x)))
    return metric.compute()


@pytest.mark.parametrize("make", METRICS)
@settings(deadline=None, derandomize=True, max_examples=10)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 99))
def test_batches_and_processes_add_up(make, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y, z = torch.randn(3, 60, 4, generator=generator, dtype=torch.float64).unbind()
    fold = fold_of(torch.randint(0, 1000, (60,), generator=generator), 3)
    whole = feed(make(), x, y, z, fold)
    edges = [0, *sorted(cuts), 60]
    parts = [make(), make()]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        feed(parts[number % 2], x[a:b], y[a:b], z[a:b], fold[a:b])
    if not parts[1].update_called:
        feed(parts[1], x[:0], y[:0], z[:0], fold[:0])
    parts[0].merge_state(parts[1])  # as two processes would
    for name, value in whole.folds().items():
        torch.testing.assert_close(parts[0].folds()[name], value, rtol=1e-12, atol=1e-12)
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts[0].compute()[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("make", METRICS)
def test_states_are_fp64_sums_that_do_not_grow(make, cloud):
    metric = make()
    reductions = set(metric._reductions.values())
    assert len(reductions) == 1
    assert reductions.pop().__name__ == "dim_zero_sum"
    sizes = {name: value.shape for name, value in metric.metric_state.items()}
    x, y, z = cloud(3, 500, 4).float()
    feed(metric, x, y, z, fold_of(torch.arange(500), 3))
    metric.float()  # a model in half precision must not take its metrics along
    for name, value in metric.metric_state.items():
        assert value.dtype == torch.float64
        assert value.shape == sizes[name]


@pytest.mark.parametrize("make", METRICS)
def test_no_tokens_give_no_values_and_no_warning(make, cloud):
    metric = make()
    feed(metric, *cloud(3, 0, 4), zeros(0))
    assert all(value.isnan().all() for value in metric.compute().values())


def test_one_pair_by_hand():
    x, y = torch.tensor([[3.0, 0, 4]]), torch.tensor([[1.0, 2, 0]])
    found = align(x, y)
    assert float(found["cos_mean"]) == pytest.approx(0.268328, abs=1e-6)
    assert float(found["cos2_mean"]) == pytest.approx(0.072)
    assert float(found["parallel_energy"]) == pytest.approx(0.072)
    assert float(found["orthogonal_energy"]) == pytest.approx(0.928)


def test_energy_weights_the_tokens():
    """A long vector along its query, a short one across: 100 of 101 parts lie along, in the mean of tokens 1 of 2."""
    x = torch.tensor([[1.0, 0], [0, 2]])
    y = torch.tensor([[10.0, 0], [1, 0]])
    found = align(x, y)
    assert float(found["parallel_energy"]) == pytest.approx(100 / 101)
    assert float(found["cos2_mean"]) == pytest.approx(0.5)


def test_the_histogram_counts_every_cosine():
    angles = torch.tensor([0.0, math.pi, math.pi / 2 - 1e-9, 2.0], dtype=torch.float64)
    metric = Alignment(bins=4)
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0]], dtype=torch.float64).expand(4, 2)
    metric.update(query, vectors[:, None], zeros(4))
    assert metric.histogram.tolist() == [[1, 1, 1, 1]]  # cos 1, -1, just above 0, -.416


def test_signed_shares_of_parts_add_up(cloud):
    x, heads = cloud(40, 6), cloud(40, 3, 6, seed=1)
    metric = Alignment(num_parts=4)
    metric.update(x, torch.cat([heads.sum(1, keepdim=True), heads], dim=1), zeros(40))
    shares = metric.signed_shares(total(metric))["signed_share"]
    assert float(shares[1:].sum()) == pytest.approx(1)
    expected = (x[:, None] * heads).sum((0, 2)) / (x[:, None] * heads).sum()
    torch.testing.assert_close(shares[1:], expected)


def test_zero_vectors_have_no_direction(cloud):
    x, y = cloud(6, 3), cloud(6, 3, seed=1)
    kept = align(x[2:], y[2:])
    x[0], y[1] = 0, 0
    found = align(x, y)
    assert float(found["zero_share"]) == pytest.approx(2 / 6)
    for name in ("cos_mean", "cos_abs_mean", "cos2_mean", "cos4_mean", "parallel_energy"):
        torch.testing.assert_close(found[name], kept[name])
    metric = Alignment(bins=7)
    metric.update(x, y[:, None], zeros(6))
    assert metric.histogram.sum() == 4
    alone = Alignment(bins=7)
    alone.update(x[2:], y[2:, None], zeros(4))
    assert torch.equal(metric.histogram, alone.histogram)
    nothing = align(torch.zeros(3, 2), torch.zeros(3, 2))
    assert float(nothing["zero_share"]) == 1
    assert nothing["cos_mean"].isnan()


def test_norms_as_large_or_small_as_fp32_holds(cloud):
    x, y, z = cloud(3, 40, 4).float()
    for scale in (1e37, 1e-37):
        for name, value in align(x * scale, y * scale).items():
            torch.testing.assert_close(value, align(x, y)[name], rtol=1e-6, atol=1e-7)
        for name, value in depend(x * scale, z * scale, y * scale).items():
            torch.testing.assert_close(value, depend(x, z, y)[name], rtol=1e-5, atol=1e-5)


def test_one_dimension_and_one_token(cloud):
    found = align(cloud(5, 1), cloud(5, 1, seed=1))
    assert float(found["cos2_mean"]) == 1
    found = depend(cloud(50, 1), cloud(50, 1, seed=1), cloud(50, 1, seed=2))
    assert not any(value.isnan().any() for value in found.values())
    assert float(found["subspace_overlap"]) == pytest.approx(1)
    found = depend(cloud(1, 3), cloud(1, 3), cloud(1, 3))
    assert found["effective_rank"].tolist() == pytest.approx([1, 1, 1])
    assert all(found[name].isnan() for name in ("cka", "r2_query", "novelty", "information", "centred_cosine"))


def test_the_opposite_vector(cloud):
    x = cloud(300, 6)
    assert float(align(x, -x)["cos_mean"]) == pytest.approx(-1)
    found = depend(x, cloud(300, 6, seed=1), -x)
    assert float(found["cka"]) == pytest.approx(1)
    assert float(found["centred_cosine"]) == pytest.approx(-1)


def test_a_rotated_query_is_orthogonal_and_says_nothing_new(cloud, rotation):
    x = cloud(300, 6)
    y = x @ rotation(6)
    found = align(x, y) | depend(x, cloud(300, 6, seed=1), y, subspace=3)
    assert float(found["cos_abs_mean"]) == pytest.approx(0, abs=1e-12)
    assert float(found["cka"]) == pytest.approx(1)
    assert float(found["novelty"]) == pytest.approx(0, abs=1e-5)
    assert float(found["cross_domain_share"]) == pytest.approx(0, abs=1e-5)


def test_a_common_mean_is_no_alignment(cloud):
    """The cosine is near 1; about the mean there is nothing."""
    x, y = 50 + cloud(4000, 8), 50 + cloud(4000, 8, seed=1)
    assert float(align(x, y)["cos_mean"]) > 0.99
    found = depend(x, cloud(4000, 8, seed=2), y)
    assert abs(float(found["centred_cosine"])) < 0.02
    assert abs(float(found["cka"])) < 0.02


def test_what_query_and_context_say_about_the_output(cloud):
    """Y = XA + ZB + e: the shares of X, Z and e in the variance are .28, .6547 and .0653."""
    n, noise = 200_000, 0.0653 / 3
    sources = cloud(n, 9)
    sources = torch.linalg.qr(sources - sources.mean(0)).Q * math.sqrt(n)  # uncorrelated to the last digit
    x, z, e = sources.split(3, dim=1)
    through_z = torch.tensor([0.32003, 0.32003, 0.6547 - 2 * 0.32003], dtype=torch.float64)
    y = x * math.sqrt(0.28 / 3) + z * through_z.sqrt() + e * math.sqrt(noise)
    found = depend(x, z, y)
    assert float(found["r2_query"]) == pytest.approx(0.2799, abs=2e-4)
    assert float(found["r2_context"]) == pytest.approx(0.6547, abs=2e-4)
    assert float(found["r2_both"]) == pytest.approx(0.9345, abs=3e-4)
    assert float(found["information"]) == pytest.approx(3.01, abs=0.01)
    exact = (1 + through_z / noise).log().sum() / 2
    assert float(found["information"]) == pytest.approx(float(exact), abs=1e-3)
    assert float(found["novelty"]) == pytest.approx(1 - 0.28, abs=1e-4)
    assert float(found["cross_domain_share"]) == pytest.approx(0.6547, abs=1e-4)


def test_nothing_is_explained_by_chance(cloud):
    """64 predictors, 200 tokens: the plain R² would be .32."""
    found = depend(cloud(200, 32), cloud(200, 32, seed=1), cloud(200, 32, seed=2))
    for name in ("r2_query", "r2_context", "r2_both", "cross_domain_share", "cka"):
        assert abs(float(found[name])) < 0.06, name


def test_a_constant_output_is_undefined(cloud):
    found = depend(cloud(50, 4), cloud(50, 4, seed=1), torch.full((50, 4), 0.1, dtype=torch.float64))
    assert all(found[name].isnan() for name in ("cka", "r2_query", "novelty", "information", "subspace_overlap"))
    assert found["effective_rank"][2] == pytest.approx(1, abs=1e-3)
    assert found["participation_ratio"][2].isnan()
    found = depend(torch.zeros(50, 4), torch.zeros(50, 4), cloud(50, 4).float())  # nothing to explain it with
    assert float(found["novelty"]) == pytest.approx(1)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(cuts=st.lists(st.integers(0, 300), max_size=5), offset=st.sampled_from([0.0, 5.0, 50.0]))
def test_cka_in_one_pass_is_that_of_the_gram_form(cuts, offset):
    generator = torch.Generator().manual_seed(len(cuts))
    x = torch.randn(301, 6, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)) + offset
    x = x + offset
    n, one = 301, torch.ones(301, dtype=torch.float64)

    def hsic(a, b):
        k, m = (c @ c.T - torch.diag(c.square().sum(1)) for c in (a, b))
        inner = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (inner - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    a, b = x - x.mean(0), y - y.mean(0)  # what the Gram form does not depend on, except by rounding
    expected = hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()
    metric = Dependence(6, num_folds=4)
    edges = [0, *sorted(cuts), 301]
    for first, last in itertools.pairwise(edges):
        fold = fold_of(torch.arange(first, last), 4)
        metric.update(x[first:last], x[first:last], y[first:last], fold)
    assert float(metric.compute()["cka"]) == pytest.approx(float(expected), abs=1e-10 if offset < 50 else 1e-7)


def test_norm_budget_by_hand():
    x, g = torch.tensor([[3.0, 4], [0, 2], [0, 0]]), torch.tensor([[4.0, -3], [0, 1], [1, 1]])
    metric = NormBudget()
    metric.update(x, g, zeros(3))
    found = metric.compute()
    assert float(found["norm_ratio"]) == pytest.approx((1 + 0.5) / 2)
    assert float(found["norm_ratio_rms"]) == pytest.approx(math.sqrt((25 + 1 + 2) / (25 + 4)))
    assert float(found["cos_result"]) == pytest.approx((math.sqrt(0.5) + 1) / 2)


def test_entropy_by_hand():
    weights = torch.tensor([[[0.5, 0.5, 0]], [[1, 0, 0]], [[0, 0, 1]], [[0.25, 0.25, 0.5]]])
    valid = torch.tensor([[True, True, False], [True, True, True], [False, False, True], [True, True, True]])
    metric = AttentionEntropy(1)
    metric.update(weights, valid, zeros(4))
    found = metric.compute()
    assert float(found["attention_entropy"]) == pytest.approx((1 + 0 + 1.5 * math.log(2) / math.log(3)) / 3)
    assert float(found["attention_largest"]) == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert float(found["attention_keys"]) == pytest.approx((2 + 3 + 1 + 3) / 4)


def test_gate_by_hand():
    gate = torch.tensor([[0.5, 0.01], [-0.99, 0.5]])
    output = torch.tensor([[2.0, 0], [0, 4]])
    metric = GateStatistics()
    metric.update(gate, output, gate * output, zeros(2))
    found = metric.compute()
    assert float(found["gate_mean"]) == pytest.approx(0.02 / 4, abs=1e-7)
    assert float(found["gate_variance"]) == pytest.approx(float(gate.double().var(correction=0)), abs=1e-7)
    assert float(found["gate_closed"]) == 0.25
    assert float(found["gate_open"]) == 0.25
    assert float(found["gate_passes"]) == pytest.approx(math.sqrt(5 / 20))


def test_users_stay_in_their_folds():
    user = torch.arange(50_000)
    fold = fold_of(user, 10)
    assert torch.equal(fold, fold_of(user.int(), 10))
    assert torch.equal(fold.flip(0), fold_of(user.flip(0), 10))
    assert torch.bincount(fold, minlength=10).min() > 4_800
    assert torch.bincount(fold[::2], minlength=10).min() > 2_300  # whatever regularity the ids have


def test_intervals_cluster_by_user(cloud):
    """100 tokens of a user say no more than one: the interval of the mean is that of the users' means."""
    covered, widths = 0, []
    for seed in range(200):
        per_user = cloud(100, 1, seed=seed)
        cos = torch.tanh(per_user).expand(100, 20).flatten()
        user = torch.arange(100).repeat_interleave(20)
        vectors = torch.stack([cos, (1 - cos**2).sqrt()], dim=1)
        metric = Alignment(num_folds=10)
        metric.update(torch.tensor([[1.0, 0]]).double().expand(2000, 2), vectors[:, None], fold_of(user, 10))
        found = jackknife(Alignment.measures, metric)["cos_mean"]
        covered += bool(found.low[0] < 0 < found.high[0])  # tanh of a normal has mean 0
        widths.append(float(found.high[0] - found.low[0]))
    assert 0.9 <= covered / 200 <= 0.99
    assert sum(widths) / 200 == pytest.approx(2 * 2.26 * 0.628 / 10, rel=0.15)  # sd(tanh) = .628, t(9) = 2.26


def test_an_interval_needs_two_folds(cloud):
    metric = Alignment(num_folds=5)
    metric.update(cloud(30, 3), cloud(30, 1, 3, seed=1), zeros(30))
    found = jackknife(Alignment.measures, metric)["cos_mean"]
    assert not found.value.isnan().any()
    assert found.low.isnan().all()
    assert found.high.isnan().all()


def test_energies_are_shares_times_the_size_of_the_update(cloud):
    x, z, noise = cloud(400, 4), cloud(400, 4, seed=1), cloud(400, 4, seed=2)
    y = x + 2 * z + 0.1 * noise
    pairs, budget = Dependence(4), NormBudget()
    pairs.update(x, z, y, zeros(400))
    budget.update(x, 0.5 * y, zeros(400))
    found, shares = pairs.energies(total(pairs), total(budget)), pairs.compute()
    size = float((0.25 * y.square().sum()) / x.square().sum())
    assert float(found["cross_domain_energy"]) == pytest.approx(float(shares["cross_domain_share"]) * size)
    assert float(found["novel_energy"]) == pytest.approx(float(shares["novelty"]) * size)
    assert float(shares["cross_domain_share"]) == pytest.approx(0.8, abs=0.05)
