"""Small logs, evidence and a bandit whose every value is known."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.offpolicy.evidence import Evidence
from recsys.offpolicy.feedback import LoggedFeedback


def make_log(
    items: np.ndarray,
    propensity: np.ndarray,
    rewards: Mapping[str, np.ndarray],
    num_items: int,
    *,
    domain_names: tuple[str, ...] = ("one",),
    domain: np.ndarray | None = None,
    user: np.ndarray | None = None,
    marginal: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    propensities: str = "logged",
) -> LoggedFeedback:
    n, slots = items.shape
    rows = np.arange(n)
    return LoggedFeedback(
        request=rows,
        user=rows if user is None else user,
        domain=np.zeros(n, dtype=np.int64) if domain is None else domain,
        time=1000 + rows,
        items=items.astype(np.int64),
        positions=np.tile(np.arange(slots), (n, 1)) if positions is None else positions,
        rewards=rewards,
        propensity=propensity,
        marginal=propensity if marginal is None and slots == 1 else marginal,
        num_items=num_items,
        domain_names=domain_names,
        propensities=propensities,
    )


def make_evidence(
    target: np.ndarray,
    propensity: np.ndarray,
    reward: np.ndarray,
    direct: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    user: np.ndarray | None = None,
) -> Evidence:
    """Evidence of requests that show one item, from flat columns."""

    def column(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.asarray(values, dtype=np.float64)[:, None]

    n = len(reward)
    return Evidence(
        user=np.arange(n) if user is None else user,
        reward=column(reward),
        propensity=column(propensity),
        target=column(target),
        unsupported=np.zeros(n),
        support_known=True,
        direct=column(direct),
        predicted=column(predicted),
        marginal=column(propensity),
        target_marginal=column(target),
    )


@dataclass(frozen=True)
class RequestScores:
    """A row of scores by item id for every request."""

    table: Tensor

    def __call__(self, requests: Tensor, items: Tensor) -> Tensor:
        return self.table[requests][:, items]


@dataclass(frozen=True)
class TableRewards:
    """q̂ by request, slot and item id."""

    table: Tensor

    def predict(self, requests: Tensor, slot: int, items: Tensor) -> Tensor:
        return self.table[requests, slot][:, items]


class Bandit:
    """Contexts x actions with Bernoulli rewards; the log is softmax mixed with `floor` of uniform."""

    def __init__(
        self, floor: float = 0.3, sharpness: float = 0.8, seed: int = 0, contexts: int = 10, actions: int = 20
    ) -> None:
        generator = np.random.default_rng(seed)
        shape = (contexts, actions)
        self.reward = 0.1 + 0.8 * generator.beta(1.2, 1.2, shape)
        noise = generator.normal(size=(2, *shape))
        self.log = (1 - floor) * _softmax(sharpness * noise[0]) + floor / actions
        self.target = _softmax(sharpness * noise[1] + 1.5 * self.reward)
        self.crude = np.broadcast_to(self.reward.mean(0), shape)
        self.value = float((self.target * self.reward).sum(1).mean())

    @property
    def largest_weight(self) -> float:
        return float((self.target / self.log).max())

    def evidence(self, n: int, generator: np.random.Generator, model: np.ndarray | None = None) -> Evidence:
        """n requests, the direct part made of `model` (by default a crude one: the mean of each action)."""
        model = self.crude if model is None else model
        x = generator.integers(len(self.log), size=n)
        a = (generator.random((n, 1)) > self.log.cumsum(1)[x]).sum(1).clip(max=self.log.shape[1] - 1)
        r = (generator.random(n) < self.reward[x, a]).astype(np.float64)
        direct = (self.target * model).sum(1)[x]
        return make_evidence(self.target[x, a], self.log[x, a], r, direct, model[x, a])


def _softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values)
    return weights / weights.sum(1, keepdims=True)


def single_domain(num_items: int) -> Tensor:
    """`item_domain` of a catalogue of one domain."""
    domain = torch.zeros(num_items + 1, dtype=torch.int64)
    domain[0] = -1
    return domain
