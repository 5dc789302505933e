"""Slate estimators: golden values, by hand, and unbiased exactly where their assumption holds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from offpolicy_world import RequestScores, TableRewards, make_log, single_domain

from recsys.data.schema import DataError
from recsys.offpolicy.candidates import Candidate
from recsys.offpolicy.estimators import IPS, SNIPS, Terms
from recsys.offpolicy.evidence import Evidence, gather
from recsys.offpolicy.policies import PlackettLuce
from recsys.offpolicy.slates import CascadeDR, IndependentIPS, RewardInteractionIPS
from recsys.types import Catalog

REQUESTS, ITEMS, SLOTS = 24, 6, 3
SLATES = np.array(list(itertools.permutations(range(ITEMS), SLOTS)))


def conditional(scores: np.ndarray, slates: np.ndarray) -> np.ndarray:
    """Plackett-Luce probability of each item of the slates given those above it, row by row."""
    weights = np.exp(np.take_along_axis(scores, slates, 1))
    above = np.concatenate([np.zeros((len(slates), 1)), weights.cumsum(1)[:, :-1]], axis=1)
    return weights / (np.exp(scores).sum(1, keepdims=True) - above)


def by_position(scores: np.ndarray, slates: np.ndarray) -> np.ndarray:
    """Exact probability of each item at its position, over all slates."""
    found = np.zeros(slates.shape)
    for row, shown in enumerate(slates):
        joint = conditional(np.broadcast_to(scores[row], (len(SLATES), ITEMS)), SLATES).prod(1)
        for slot, item in enumerate(shown):
            found[row, slot] = joint[SLATES[:, slot] == item].sum()
    return found


@pytest.fixture(scope="module")
def golden_evidence() -> Evidence:
    """24 requests made of sines; the values below were computed from them by Open Bandit Pipeline 0.5.7."""
    row, item, slot = np.arange(REQUESTS)[:, None], np.arange(ITEMS)[None], np.arange(SLOTS)[None]
    logged, target = np.sin(1 + row + 2 * item), 1.5 * np.cos(row + 3 * item)
    slates = SLATES[7 * np.arange(REQUESTS) % len(SLATES)]
    reward = ((3 * row + 5 * slot) % 4 == 0) + 0.1 * slot
    model = np.stack([(row + 2 * item + k) % 5 * 0.1 for k in range(SLOTS)], axis=1)
    log = make_log(
        slates + 1,
        conditional(logged, slates),
        {"click": reward},
        ITEMS,
        marginal=by_position(logged, slates),
    )
    catalog = Catalog(("one",), single_domain(ITEMS), torch.zeros(ITEMS + 1, dtype=torch.int64))
    padded = torch.from_numpy(np.pad(target, ((0, 0), (1, 0))))
    rewards = TableRewards(torch.from_numpy(np.pad(model, ((0, 0), (0, 0), (1, 0)))))
    candidate = Candidate("cosines", PlackettLuce(), RequestScores(padded))
    evidence = gather(log, candidate, catalog, reward, reward_model=rewards)
    return replace(evidence, target_marginal=by_position(target, slates))


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        (IPS(), 5.149010059860135),
        (SNIPS(), 0.9910826130262734),
        (IndependentIPS(), 1.2428651523839134),
        (IndependentIPS(self_normalized=True), 0.8228961285384987),
        (RewardInteractionIPS(), 4.9443997797332555),
        (RewardInteractionIPS(self_normalized=True), 1.1026758778746584),
        (CascadeDR(), 4.458018981431359),
    ],
    ids=str,
)
def test_golden(golden_evidence: Evidence, estimator: IPS, value: float) -> None:
    assert estimator.terms(golden_evidence).value == pytest.approx(value, abs=1e-12)


TWO = Evidence(
    user=np.arange(2),
    reward=np.array([[1.0, 2.0], [0.0, 1.0]]),
    propensity=np.array([[0.5, 0.5], [0.25, 0.5]]),
    target=np.array([[0.25, 1.0], [0.5, 0.25]]),
    unsupported=np.zeros(2),
    support_known=True,
    direct=np.array([[1.0, 0.5], [0.6, 0.2]]),
    predicted=np.array([[0.8, 0.4], [0.5, 0.1]]),
    marginal=np.array([[0.5, 0.4], [0.25, 0.2]]),
    target_marginal=np.array([[0.25, 0.2], [0.5, 0.6]]),
)


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        (IPS(), (1 * 3 + 1 * 1) / 2),  # joint weights .5·2 and 2·.5
        (RewardInteractionIPS(), ((0.5 * 1 + 1 * 2) + (2 * 0 + 1 * 1)) / 2),
        (RewardInteractionIPS(self_normalized=True), 0.5 / 2.5 + 3 / 2),
        (IndependentIPS(), ((0.5 * 1 + 0.5 * 2) + (0 + 3 * 1)) / 2),
        (IndependentIPS(self_normalized=True), 0.5 / 2.5 + 4 / 3.5),
        # (w₁(r - Q) + Q̄) + (w₁w₂(r - Q) + w₁Q̄) per request
        (CascadeDR(), ((0.5 * 0.2 + 1.0 + 1.6 + 0.25) + (2 * -0.5 + 0.6 + 0.9 + 0.4)) / 2),
    ],
    ids=str,
)
def test_by_hand(estimator: IPS, value: float) -> None:
    assert estimator.terms(TWO).value == pytest.approx(value)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(DataError, match="the log has no marginals"):
        IndependentIPS().terms(replace(TWO, marginal=None))
    with pytest.raises(DataError, match=r"marginal_draws.* target's marginals"):
        IndependentIPS().terms(replace(TWO, target_marginal=None))
    with pytest.raises(DataError, match="cascade_dr needs a reward model"):
        CascadeDR().terms(replace(TWO, direct=None))


def test_one_item_needs_no_assumption() -> None:
    columns = {
        name: value[:, :1] for name, value in vars(TWO).items() if isinstance(value, np.ndarray) and value.ndim == 2
    }
    one = replace(TWO, **columns)
    assert RewardInteractionIPS().terms(one).assumes is None
    assert RewardInteractionIPS().terms(one).value == IPS().terms(one).value
    assert RewardInteractionIPS().terms(TWO).assumes is not None


def simulate(click: str, requests: int, seed: int) -> tuple[Evidence, float]:
    """Slates of 3 of 8 items, one log; users of a position-based or a cascade model. And the target's true value."""
    generator = np.random.default_rng(seed)
    items, slots = 8, 3
    slates = np.array(list(itertools.permutations(range(items), slots)))
    scores = 1.5 * generator.normal(size=(2, items))
    steps = [conditional(np.broadcast_to(s, (len(slates), items)), slates) for s in scores]
    joint = [step.prod(1) for step in steps]
    places = [
        np.stack([np.bincount(slates[:, k], p, items)[slates[:, k]] for k in range(slots)], axis=1) for p in joint
    ]
    relevance = generator.uniform(0.1, 0.9, items)[slates]
    examined = np.array([1, 0.6, 0.4])
    chance = relevance * examined
    if click == "cascade":  # a click above turns a user away from what is below
        chance = relevance * np.concatenate(
            [np.ones((len(slates), 1)), (1 - 0.8 * relevance).cumprod(1)[:, :-1]], axis=1
        )
    row = generator.choice(len(slates), size=requests, p=joint[0])
    evidence = Evidence(
        user=np.arange(requests),
        reward=(generator.random((requests, slots)) < chance[row]).astype(np.float64),
        propensity=steps[0][row],
        target=steps[1][row],
        unsupported=np.zeros(requests),
        support_known=True,
        marginal=places[0][row],
        target_marginal=places[1][row],
    )
    return evidence, float((joint[1] * chance.sum(1)).sum())


def error(terms: Terms, value: float) -> float:
    """Distance from the truth in standard errors."""
    return (terms.value - value) / (terms.influence.std() / np.sqrt(len(terms.influence)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_is_unbiased_where_its_assumption_holds(seed: int) -> None:
    """As many requests as 2,000 logs of 200: a mean over all is the mean over the logs."""
    requests = 400_000
    position_based, value = simulate("position", requests, seed)
    assert abs(error(IndependentIPS().terms(position_based), value)) < 3
    assert abs(error(RewardInteractionIPS().terms(position_based), value)) < 3
    assert abs(error(IPS().terms(position_based), value)) < 3
    cascade, value = simulate("cascade", requests, seed)
    assert abs(error(IndependentIPS().terms(cascade), value)) > 3
    assert abs(error(RewardInteractionIPS().terms(cascade), value)) < 3
    spread = {
        e.name: e.terms(position_based).influence.std() for e in (IPS(), IndependentIPS(), RewardInteractionIPS())
    }
    assert spread["ips"] / spread["independent"] >= 3
    assert spread["ips"] / spread["rips"] >= 1.3
