import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.stats import chisquare

from recsys.negatives import InBatchConfig, NegativesConfig, PopularityConfig, UniformConfig
from recsys.types import NO_DOMAIN, PAD_ID, Catalog

# Ids of the domains are interleaved, counts are uneven, item 5 was never seen in training.
ITEM_DOMAIN = torch.tensor([NO_DOMAIN, 0, 1, 0, 1, 0, 0, 1, 0])
COUNTS = torch.tensor([0, 8, 3, 1, 30, 0, 4, 7, 15])
CATALOG = Catalog(("food", "kitchen"), ITEM_DOMAIN, COUNTS)
IN_DOMAIN = {0: [1, 3, 5, 6, 8], 1: [2, 4, 7]}
REAL = list(range(1, 9))

PER_TARGET = ["target_domain", "each_domain", "all"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(items: list[int], alpha: float) -> torch.Tensor:
    weights = COUNTS[items].clamp(min=1).double() ** alpha
    return weights / weights.sum()


def assert_drawn_from(draws: torch.Tensor, items: list[int], alpha: float) -> None:
    observed = torch.bincount(draws.flatten(), minlength=9)
    assert observed.sum() == observed[items].sum(), "an item outside the pool was drawn"
    expected = probabilities(items, alpha) * draws.numel()
    assert chisquare(observed[items].numpy(), expected.numpy()).pvalue > 0.01


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_draws_follow_the_stated_distribution(alpha, shared):
    num_negatives, targets = (20_000, torch.tensor([6, 2])) if shared else (200, torch.tensor([6, 2]).repeat(100))
    options = {"alpha": alpha, "num_negatives": num_negatives, "shared": shared}

    def draw(scope):
        return PopularityConfig(scope=scope, **options).build(CATALOG, seeded()).draw(targets)

    everywhere = draw("all")
    assert everywhere.items.shape == (1 if shared else 200, num_negatives)
    assert_drawn_from(everywhere.items, REAL, alpha)

    each = draw("each_domain")
    assert each.items.shape == (1 if shared else 200, 2 * num_negatives)
    assert_drawn_from(each.items[:, :num_negatives], IN_DOMAIN[0], alpha)
    assert_drawn_from(each.items[:, num_negatives:], IN_DOMAIN[1], alpha)

    own = draw("target_domain")
    assert own.items.shape == (2 if shared else 200, num_negatives)
    for domain in (0, 1):
        of_domain = torch.tensor([0, 1]) == domain if shared else ITEM_DOMAIN[targets] == domain
        assert_drawn_from(own.items[of_domain], IN_DOMAIN[domain], alpha)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scope", PER_TARGET)
def test_log_q_is_the_log_probability_of_one_draw(scope, shared):
    targets = torch.tensor([1, 2, 5, 4])
    config = PopularityConfig(alpha=0.7, scope=scope, shared=shared, num_negatives=50)
    draw = config.build(CATALOG, seeded()).draw(targets)
    log_q = torch.full((9,), math.nan)
    for pool in [REAL] if scope == "all" else IN_DOMAIN.values():
        log_q[pool] = probabilities(pool, 0.7).log().float()
    torch.testing.assert_close(draw.target_log_q, log_q[targets])
    torch.testing.assert_close(draw.log_q, log_q[draw.items])
    if shared and scope == "target_domain":
        assert torch.equal(draw.row, ITEM_DOMAIN[targets])
        assert (ITEM_DOMAIN[draw.items] == torch.tensor([[0], [1]])).all()


def test_uniform_is_popularity_without_popularity():
    targets = torch.tensor([1, 2, 5, 4])
    uniform = UniformConfig(num_negatives=9).build(CATALOG, seeded()).draw(targets)
    flat = PopularityConfig(num_negatives=9, alpha=0.0).build(CATALOG, seeded()).draw(targets)
    for mine, its in zip(uniform[:3], flat[:3], strict=True):
        assert torch.equal(mine, its)
    torch.testing.assert_close(uniform.target_log_q, torch.tensor([5.0, 3.0, 5.0, 3.0]).log().neg())


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40), st.floats(0, 2))
def test_slots_give_each_item_exactly_its_share(counts, alpha):
    catalog = Catalog(("only",), torch.tensor([NO_DOMAIN] + [0] * len(counts)), torch.tensor([0, *counts]))
    sampler = PopularityConfig(alpha=alpha, scope="all").build(catalog, seeded())
    share = torch.zeros(len(counts) + 1, dtype=torch.float64)
    share.index_add_(0, sampler.items, sampler.keep)
    share.index_add_(0, sampler.alias, 1 - sampler.keep)
    weights = torch.tensor([0, *[max(count, 1) ** alpha for count in counts]], dtype=torch.float64)
    torch.testing.assert_close(share / len(counts), weights / weights.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scope", PER_TARGET)
def test_a_saved_generator_state_repeats_the_draws(scope, shared):
    targets = torch.tensor([1, 2, 5, 4, 4])
    config = UniformConfig(num_negatives=7, scope=scope, shared=shared)
    sampler = config.build(CATALOG, seeded(3))
    sampler.draw(targets)
    state = sampler.generator.get_state()
    ambient = torch.get_rng_state()
    first, second = sampler.draw(targets), sampler.draw(targets)
    assert torch.equal(torch.get_rng_state(), ambient), "the global generator was used"
    assert not torch.equal(first.items, second.items)
    resumed = config.build(CATALOG, seeded(99))
    resumed.generator.set_state(state)
    assert torch.equal(resumed.draw(targets).items, first.items)
    assert torch.equal(resumed.draw(targets).items, second.items)


@pytest.mark.parametrize("config", [UniformConfig(num_negatives=3000), PopularityConfig(num_negatives=3000)])
def test_padding_is_never_drawn(config):
    for scope in PER_TARGET:
        draw = config.model_copy(update={"scope": scope}).build(CATALOG, seeded()).draw(torch.tensor([1, 2]))
        assert (draw.items != PAD_ID).all()
        assert (draw.log_q > -torch.inf).all()


def test_in_batch_offers_every_target_of_the_same_domain():
    targets = torch.tensor([1, 2, 1, 6])
    draw = InBatchConfig().build(CATALOG, seeded()).draw(targets)
    assert draw.items.tolist() == [[1, 2, 1, 6]]
    # Frequencies with a floor of one event: domain 0 has 8 + 1 + 1 + 4 + 15 = 29, domain 1 has 3 + 30 + 7 = 40.
    q = [8 / 29, 3 / 40, 8 / 29, 4 / 29]
    expected = torch.tensor([[q[0], 0, q[2], q[3]], [0, q[1], 0, 0], [q[0], 0, q[2], q[3]], [q[0], 0, q[2], q[3]]])
    torch.testing.assert_close(draw.log_q.exp(), expected)
    torch.testing.assert_close(draw.target_log_q.exp(), torch.tensor(q))


def test_in_batch_over_all_domains_bars_nothing():
    draw = InBatchConfig(scope="all").build(CATALOG, seeded()).draw(torch.tensor([1, 2, 6]))
    torch.testing.assert_close(draw.log_q.exp(), torch.tensor([[8.0, 3, 4]] * 3) / 69)


@pytest.mark.parametrize(
    "config",
    [
        UniformConfig(),
        UniformConfig(scope="each_domain"),
        UniformConfig(shared=True),
        PopularityConfig(),
        InBatchConfig(),
    ],
)
def test_a_domain_of_one_item_is_an_error_that_names_it(config):
    catalog = Catalog(("food", "toys"), torch.tensor([NO_DOMAIN, 0, 0, 1]), torch.tensor([0, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"domain 'toys' has 1 item.*one item has no negative"):
        config.build(catalog, seeded())
    config.model_copy(update={"scope": "all"}).build(catalog, seeded())


def test_a_catalogue_of_one_item_is_an_error():
    catalog = Catalog(("food",), torch.tensor([NO_DOMAIN, 0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="the catalogue has 1 item"):
        UniformConfig(scope="all").build(catalog, seeded())


def test_configs_are_one_union_by_name():
    union = TypeAdapter(NegativesConfig)
    assert union.validate_python({"name": "popularity", "alpha": 0.5}) == PopularityConfig(alpha=0.5)
    for bad in ({"name": "hardest"}, {"name": "uniform", "num_negatives": 0}, {"name": "in_batch", "shared": True}):
        with pytest.raises(ValidationError):
            union.validate_python(bad)
