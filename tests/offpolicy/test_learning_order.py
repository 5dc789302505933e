"""What objectives make of a log whose weights have heavy tails: 30 actions, 2,000 requests, three seeds of training."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.offpolicy.objectives import (
    AsymREObjective,
    DRObjective,
    IPSObjective,
    ObjectiveConfig,
    SmoothingObjective,
    View,
)

REQUESTS, FEATURES, ACTIONS = 2000, 8, 30


@dataclass(frozen=True)
class Bandit:
    """Requests with features; the first column of `features` is 1."""

    features: Tensor
    action: Tensor
    reward: Tensor
    log_propensity: Tensor
    model: Tensor
    """q̂: ridge regression per action."""
    test_features: Tensor
    test_reward: Tensor
    """Expected reward of every action."""
    logging_value: float


@pytest.fixture(scope="module")
def bandit() -> Bandit:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wish, noise, bias = normal(FEATURES, ACTIONS), normal(FEATURES, ACTIONS), normal(ACTIONS)
    wish, noise = wish / FEATURES**0.5, noise / FEATURES**0.5

    def log_policy(x: Tensor) -> Tensor:
        return (1.5 * (x @ (0.5 * wish + noise)) + 0.7 * bias).log_softmax(1)

    def expected(x: Tensor) -> Tensor:
        return torch.sigmoid(2.5 * (x @ wish) - 1.5)

    def with_one(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x], dim=1)

    x, test = normal(REQUESTS, FEATURES), normal(4000, FEATURES)
    logged = log_policy(x)
    action = torch.multinomial(logged.exp(), 1, generator=generator)
    chance = torch.rand(action.shape, generator=generator, dtype=torch.float64)
    reward = (chance < expected(x).gather(1, action)).double()
    assert 1 / logged.gather(1, action).exp().min() > 1000, "the log has heavy tails"
    f = with_one(x)
    model = torch.empty(REQUESTS, ACTIONS, dtype=torch.float64)
    for a in range(ACTIONS):
        rows = action[:, 0] == a
        gram = f[rows].T @ f[rows] + 5 * torch.eye(FEATURES + 1, dtype=torch.float64)
        model[:, a] = f @ torch.linalg.solve(gram, f[rows].T @ (reward[rows, 0] - reward.mean())) + reward.mean()
    value = float((log_policy(test).exp() * expected(test)).sum(1).mean())
    return Bandit(
        features=f,
        action=action,
        reward=reward,
        log_propensity=logged.gather(1, action),
        model=model.clamp(0, 1),
        test_features=with_one(test),
        test_reward=expected(test),
        logging_value=value,
    )


def learnt(bandit: Bandit, objective: ObjectiveConfig | None, seed: int, batch: int = 250, epochs: int = 30) -> float:
    """True value of a linear softmax policy after training; None imitates the log."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn((FEATURES + 1, ACTIONS), generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(REQUESTS, generator=generator).split(batch):
            policy = (bandit.features[rows] @ weights).log_softmax(1)
            action, model = bandit.action[rows], bandit.model[rows]
            shown, propensity = policy.gather(1, action), bandit.log_propensity[rows]
            view = View(
                slate=shown[:, 0],
                slate_propensity=propensity[:, 0],
                shown=shown,
                propensity=propensity,
                reward=bandit.reward[rows],
                policy=policy,
                model=model,
                shown_model=model.gather(1, action),
            )
            loss = -shown.mean() if objective is None else objective.loss(view)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        policy = (bandit.test_features @ weights).softmax(1)
        return float((policy * bandit.test_reward).sum(1).mean())


@pytest.mark.slow
def test_the_order_of_objectives(bandit: Bandit) -> None:
    objectives: dict[str, ObjectiveConfig | None] = {
        "imitation": None,
        "ips": IPSObjective(),
        "exp_smoothing": SmoothingObjective(alpha=0.8),
        "clipped": IPSObjective(cap=5.0),
        "dr": DRObjective(),
        "plain": AsymREObjective(shift=0.0, group="batch"),
        "asymre": AsymREObjective(shift=-0.1, group="batch"),
    }
    found = {name: [learnt(bandit, objective, seed) for seed in range(3)] for name, objective in objectives.items()}
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    assert mean["imitation"] == pytest.approx(bandit.logging_value, abs=0.01)
    for name in ("exp_smoothing", "clipped", "dr", "asymre"):
        assert mean[name] >= mean["ips"] + 0.02, (name, mean)
    assert np.std(found["asymre"]) < np.std(found["plain"])
