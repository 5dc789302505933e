"""Policies: probabilities that are distributions, that draws follow, and that two ways of computing agree on."""

import itertools
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from recsys.loading import Config, ConfigError, parse_config
from recsys.offpolicy.policies import (
    Categorical,
    EpsilonGreedy,
    Mixture,
    PlackettLuce,
    Policy,
    PolicyConfig,
    marginals,
    sample,
)

SLATES = torch.tensor(list(itertools.permutations(range(8), 3)))  # 336
SCORES = torch.tensor([0.3, -1.2, 2.0, 0.0, 1.1, -0.4, 0.9, 1.1])
POLICIES = [
    PlackettLuce(),
    PlackettLuce(temperature=0.5, epsilon=0.2),
    PlackettLuce(epsilon=1.0),
    EpsilonGreedy(epsilon=0.3),
    EpsilonGreedy(epsilon=1.0),
    Mixture(policies=(PlackettLuce(temperature=0.7), EpsilonGreedy(epsilon=0.5)), weights=(0.75, 0.25)),
    Mixture(policies=(PlackettLuce(), Mixture(policies=(Categorical(),), weights=(1.0,))), weights=(0.5, 0.5)),
]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy)[:40])


def weights_of(policy: Policy) -> Tensor:
    """Scores that the policy can read: a categorical one takes weights."""
    return SCORES.exp() if "categorical" in str(policy) else SCORES


def of_every_slate(policy: Policy, scores: Tensor, slates: Tensor = SLATES) -> Tensor:
    return policy.log_probs(scores.expand(len(slates), -1), slates).sum(1).exp()


@policies
def test_all_slates_have_probability_one(policy: Policy) -> None:
    assert of_every_slate(policy, weights_of(policy)).sum().item() == pytest.approx(1, abs=1e-12)


@policies
def test_log_probs_are_those_of_the_next_item(policy: Policy) -> None:
    scores = weights_of(policy).expand(len(SLATES), -1)
    found = policy.log_probs(scores, SLATES).exp()
    for slot in range(3):
        following = policy.next(scores, SLATES[:, :slot])
        np.testing.assert_allclose(following.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(following.gather(1, SLATES[:, slot : slot + 1])[:, 0], found[:, slot], atol=1e-12)
        assert (following.gather(1, SLATES[:, :slot]) == 0).all()


@policies
def test_a_draw_comes_with_its_propensity(policy: Policy) -> None:
    scores = weights_of(policy).expand(500, -1)
    drawn = sample(policy, scores, 3, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(drawn.log_probs, policy.log_probs(scores, drawn.slates), atol=1e-12)
    assert all(len(set(slate)) == 3 for slate in drawn.slates.tolist())
    again = sample(policy, scores, 3, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.slates, again.slates)


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[3], POLICIES[5]], ids=lambda policy: str(policy)[:40])
def test_draws_follow_the_propensities(policy: Policy) -> None:
    rows = 200_000
    drawn = sample(policy, weights_of(policy).expand(rows, -1), 3, torch.Generator().manual_seed(1)).slates
    code = (drawn * torch.tensor([64, 8, 1])).sum(1)
    counts = torch.bincount(code, minlength=512)[(SLATES * torch.tensor([64, 8, 1])).sum(1)]
    expected = of_every_slate(policy, weights_of(policy)) * rows
    enough = expected > 5
    observed, wanted = counts[enough].double(), expected[enough]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.001


def test_plackett_luce_is_the_order_of_gumbel_noise() -> None:
    noise = torch.rand((1_000_000, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    order = (SCORES / 0.8 - (-noise.log()).log()).topk(3, dim=1).indices
    code = torch.tensor([64, 8, 1])
    counts = torch.bincount((order * code).sum(1), minlength=512)[(SLATES * code).sum(1)]
    expected = of_every_slate(PlackettLuce(temperature=0.8), SCORES) * 1_000_000
    assert chisquare(counts.double(), expected).pvalue > 0.001


def test_plackett_luce_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log()
    slate = torch.tensor([[2, 0]])
    assert PlackettLuce().log_probs(scores, slate).exp().tolist() == [pytest.approx([3 / 6, 1 / 3])]
    assert PlackettLuce(temperature=0.5).log_probs(scores, slate).exp().tolist() == [pytest.approx([9 / 14, 1 / 5])]
    mixed = PlackettLuce(epsilon=0.4).log_probs(scores, slate).exp().tolist()
    assert mixed == [pytest.approx([0.6 * 3 / 6 + 0.4 / 3, 0.6 / 3 + 0.4 / 2])]


def test_epsilon_greedy_by_hand() -> None:
    scores = torch.tensor([[5.0, 7.0, 7.0, -torch.inf]])
    policy = EpsilonGreedy(epsilon=0.3)
    nothing = torch.empty((1, 0), dtype=torch.int64)
    assert policy.next(scores, nothing).tolist() == [pytest.approx([0.1, 0.45, 0.45, 0])]  # a tie shares
    assert policy.log_probs(scores, torch.tensor([[0, 1]])).exp().tolist() == [pytest.approx([0.1, 0.5])]
    greedy = EpsilonGreedy(epsilon=0.0).next(scores, torch.tensor([[1]]))
    assert greedy.tolist() == [[0, 0, 1, 0]]


def test_categorical_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0, 3.0]])
    assert Categorical().log_probs(weights, torch.tensor([[2, 0]])).exp().tolist() == [pytest.approx([0.75, 1.0])]
    assert Categorical().log_probs(weights, torch.tensor([[1]])).exp().tolist() == [[0.0]]
    with pytest.raises(ValueError, match="plackett_luce for scores"):
        Categorical().next(-weights, torch.empty((1, 0), dtype=torch.int64))


def test_a_mixture_remembers_what_it_drew() -> None:
    """After an item that only one component shows, the next is that component's."""
    scores = torch.tensor([[4.0, 2.0, 1.0]])
    greedy, uniform = EpsilonGreedy(epsilon=0.0), EpsilonGreedy(epsilon=1.0)
    mixture = Mixture(policies=(greedy, uniform), weights=(0.9, 0.1))
    assert mixture.next(scores, torch.tensor([[2]])).tolist() == [pytest.approx([0.5, 0.5, 0])]
    after_best = mixture.next(scores, torch.tensor([[0]]))[0]
    share = 0.9 / (0.9 + 0.1 / 3)
    assert after_best.tolist() == pytest.approx([0, share + (1 - share) / 2, (1 - share) / 2])
    never = Mixture(policies=(greedy,), weights=(1.0,))
    assert never.log_probs(scores, torch.tensor([[2, 0]])).tolist() == [[-torch.inf, -torch.inf]]


@pytest.mark.parametrize("policy", [PlackettLuce(epsilon=0.3), EpsilonGreedy(epsilon=0.3)], ids=str)
def test_a_barred_item_is_never_shown(policy: Policy) -> None:
    scores = SCORES.clone()
    scores[2] = -torch.inf
    assert of_every_slate(policy, scores)[(SLATES == 2).any(1)].max() == 0
    assert of_every_slate(policy, scores).sum().item() == pytest.approx(1, abs=1e-12)


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[1e4, 0.0, -1e4]])
    found = PlackettLuce().log_probs(scores, torch.tensor([[1, 0, 2]]))
    assert found.tolist() == [pytest.approx([-1e4, 0, 0])]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=7), st.floats(0.2, 3), st.floats(0, 1), st.floats(-50, 50))
def test_properties(values: list[float], temperature: float, epsilon: float, shift: float) -> None:
    scores = torch.tensor([values], dtype=torch.float64)
    policy = PlackettLuce(temperature=temperature, epsilon=epsilon)
    slate = torch.tensor([[2, 0, 3]])
    found = policy.log_probs(scores, slate)
    np.testing.assert_allclose(policy.log_probs(scores + shift, slate), found, atol=1e-9)
    order = torch.arange(len(values) - 1, -1, -1)
    np.testing.assert_allclose(policy.log_probs(scores[:, order], len(values) - 1 - slate), found, atol=1e-9)


def test_gradients_flow() -> None:
    scores = SCORES.double().expand(2, -1).clone().requires_grad_()
    slates = SLATES[[5, 77]]
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(temperature=0.7, epsilon=0.1).log_probs(s, slates), scores)
    above = slates[:, :1]
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(temperature=0.7, epsilon=0.1).next(s, above), scores)


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[3], POLICIES[5]], ids=lambda policy: str(policy)[:40])
def test_marginals(policy: Policy) -> None:
    joint = of_every_slate(policy, SCORES)
    shown = torch.tensor([[2, 4, 7], [1, 0, 2]])
    exact = np.array(
        [[float(joint[SLATES[:, k] == item].sum()) for k, item in enumerate(row)] for row in shown.tolist()]
    )
    copies = 20_000
    found = marginals(
        policy, SCORES.expand(2 * copies, -1), shown.repeat(copies, 1), 2, torch.Generator().manual_seed(0)
    )
    found = found.view(copies, 2, 3).mean(0)
    np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=1e-6)  # exact at the top
    np.testing.assert_allclose(found, exact, rtol=0.05)


def test_slates_longer_than_the_candidates() -> None:
    scores = torch.tensor([[1.0, 2.0, -torch.inf]])
    with pytest.raises(ValueError, match="a request has 2 candidates"):
        sample(PlackettLuce(), scores, 3, torch.Generator())


class Holder(Config):
    policy: PolicyConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "plackett_luce", "temperature": 0.0}, "policy.temperature"),
        ({"name": "plackett_luce", "epsilon": 1.5}, "policy.epsilon"),
        ({"name": "epsilon_greedy"}, "policy.epsilon: this key is missing"),
        ({"name": "mixture", "policies": [{"name": "categorical"}], "weights": [0.5]}, "sum to 1"),
        ({"name": "mixture", "policies": [{"name": "categorical"}], "weights": [0.5, 0.5]}, "one weight per policy"),
        ({"name": "placket_luce"}, "did you mean plackett_luce"),
    ],
)
def test_bad_configs(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"policy": values}, Holder, "policies.yaml")


def test_a_config_round_trip() -> None:
    values = {
        "name": "mixture",
        "policies": [{"name": "plackett_luce"}, {"name": "categorical"}],
        "weights": [0.5, 0.5],
    }
    policy = cast(Mixture, parse_config({"policy": values}, Holder, "policies.yaml").policy)
    assert policy.policies == (PlackettLuce(), Categorical())
