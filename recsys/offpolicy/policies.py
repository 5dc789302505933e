"""Policies: how scores become slates, and with what probability.

A policy reads scores of shape `batch candidates`, a row per request, and speaks of candidates by their column. -inf
bars a candidate from a request. Slates are drawn from the top, without replacement. Probabilities are in fp64.
"""

import math
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from recsys.loading import Config


@runtime_checkable
class Policy(Protocol):
    """What estimators, learners and loggers ask of a policy."""

    def next(
        self, scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
    ) -> Float[Tensor, "batch candidates"]:
        """Probability of every candidate at the first free position of slates whose top is `above`."""
        ...

    def log_probs(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        """Log-probability of each item of the slates given those above it; their sum is that of the slate."""
        ...


class PlackettLuce(Config):
    """Softmax of scores / temperature over what is left; with probability epsilon one of what is left, uniformly.

    The scores decide nothing as epsilon goes to 1, and everything as the temperature goes to 0.
    """

    name: Literal["plackett_luce"] = "plackett_luce"
    temperature: float = Field(1.0, gt=0)
    epsilon: float = Field(0.0, ge=0, le=1)
    """Of every position, not of the slate."""

    def next(
        self, scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
    ) -> Float[Tensor, "batch candidates"]:
        left = _left(scores, above)
        chosen = (left / self.temperature).softmax(1)
        return chosen if self.epsilon == 0 else torch.lerp(chosen, _uniform(left), self.epsilon)

    def log_probs(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        """One pass over the candidates, whatever the number of slots."""
        shown = scores.gather(1, slates).double() / self.temperature
        rest = (_left(scores, slates) / self.temperature).logsumexp(1, keepdim=True)
        left = torch.logaddexp(shown.flip(1).logcumsumexp(1).flip(1), rest)
        log_probs = shown - left
        if self.epsilon == 0:
            return log_probs
        count = torch.isfinite(scores).sum(1, keepdim=True) - torch.arange(slates.shape[1], device=slates.device)
        explored = math.log(self.epsilon) - count.double().log()
        mixed = torch.logaddexp(log_probs + math.log1p(-self.epsilon), explored) if self.epsilon < 1 else explored
        return mixed.masked_fill(shown == -torch.inf, -torch.inf)


class EpsilonGreedy(Config):
    """The best of what is left; with probability epsilon one of what is left, uniformly. Ties share the first part."""

    name: Literal["epsilon_greedy"] = "epsilon_greedy"
    epsilon: float = Field(ge=0, le=1)
    """0 is a deterministic policy: it can be evaluated, but no log of it can evaluate another."""

    def next(
        self, scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
    ) -> Float[Tensor, "batch candidates"]:
        left = _left(scores, above)
        best = (left == left.amax(1, keepdim=True)).double()
        return torch.lerp(best / best.sum(1, keepdim=True), _uniform(left), self.epsilon)

    def log_probs(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        return _step_by_step(self, scores, slates)


class Categorical(Config):
    """Scores are weights (counts, probabilities), not negative: each item by its share of the weight that is left."""

    name: Literal["categorical"] = "categorical"

    def next(
        self, scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
    ) -> Float[Tensor, "batch candidates"]:
        return PlackettLuce().next(_log_weights(scores), above)

    def log_probs(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        return PlackettLuce().log_probs(_log_weights(scores), slates)


class Mixture(Config):
    """One of several policies over the same scores, chosen anew for every slate with these probabilities."""

    name: Literal["mixture"] = "mixture"
    policies: tuple["PolicyConfig", ...]
    weights: tuple[float, ...]

    @model_validator(mode="after")
    def _distribution(self) -> "Mixture":
        if len(self.weights) != len(self.policies) or not self.policies:
            raise ValueError(f"a mixture needs one weight per policy, not {len(self.weights)} of {len(self.policies)}")
        if min(self.weights) <= 0 or not math.isclose(sum(self.weights), 1, rel_tol=1e-9):
            raise ValueError(f"the weights of a mixture are positive and sum to 1, not {list(self.weights)}")
        return self

    def next(
        self, scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
    ) -> Float[Tensor, "batch candidates"]:
        shares = self._joint(scores, above)[:, :, -1:].softmax(0)
        parts = [policy.next(scores, above) * share for policy, share in zip(self.policies, shares, strict=True)]
        return torch.stack(parts).sum(0)

    def log_probs(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        joint = self._joint(scores, slates).logsumexp(0)
        impossible = joint[:, 1:] == -torch.inf
        return (joint[:, 1:] - joint[:, :-1]).masked_fill(impossible, -torch.inf)

    def _joint(
        self, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "policies batch tops"]:
        """Log-probability that a policy is chosen and draws the top l items of the slates, for l = 0, 1, …, slots."""
        parts = [policy.log_probs(scores, slates).cumsum(1) for policy in self.policies]
        prior = torch.tensor(self.weights, dtype=torch.float64, device=scores.device).log()[:, None, None]
        drawn = torch.stack(parts)
        return torch.cat([drawn.new_zeros((*drawn.shape[:2], 1)), drawn], dim=2) + prior


PolicyConfig = Annotated[PlackettLuce | EpsilonGreedy | Categorical | Mixture, Field(discriminator="name")]
Mixture.model_rebuild()


class Drawn(NamedTuple):
    """Slates as they were drawn, with what a log must keep of the draw."""

    slates: Int[Tensor, "batch slots"]
    """Columns, top first."""
    log_probs: Float[Tensor, "batch slots"]
    """Log-propensity of each item given those above it."""


def sample(policy: Policy, scores: Float[Tensor, "batch candidates"], slots: int, generator: torch.Generator) -> Drawn:
    """A slate of `slots` items for every request. Raises ValueError for a request with fewer candidates than that."""
    available = int((scores > -torch.inf).sum(1).amin())
    if not 1 <= slots <= available:
        raise ValueError(f"slates of {slots} items cannot be filled: a request has {available} candidates")
    slates = torch.empty((len(scores), 0), dtype=torch.int64, device=scores.device)
    probabilities = []
    for _ in range(slots):
        following = policy.next(scores, slates)
        item = torch.multinomial(following, 1, generator=generator)
        probabilities.append(following.gather(1, item))
        slates = torch.cat([slates, item], dim=1)
    return Drawn(slates, torch.cat(probabilities, dim=1).log())


def marginals(
    policy: Policy,
    scores: Float[Tensor, "batch candidates"],
    slates: Int[Tensor, "batch slots"],
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "batch slots"]:
    """Probability of each item at its position, whatever stands above: exact at the top, a mean over `draws` below.

    The mean is of conditional probabilities given drawn tops, so an item that is never drawn still gets its own.
    """
    found = torch.zeros(slates.shape, dtype=torch.float64, device=scores.device)
    slots = slates.shape[1]
    for _ in range(draws if slots > 1 else 1):
        above = slates[:, :0]
        for slot in range(slots):
            following = policy.next(scores, above)
            found[:, slot] += following.gather(1, slates[:, slot : slot + 1])[:, 0]
            if slot < slots - 1:
                above = torch.cat([above, torch.multinomial(following, 1, generator=generator)], dim=1)
    return found / (draws if slots > 1 else 1)


def _step_by_step(
    policy: Policy, scores: Float[Tensor, "batch candidates"], slates: Int[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots"]:
    """Conditional log-probabilities by a pass over the candidates for every slot."""
    slots = range(slates.shape[1])
    steps = [policy.next(scores, slates[:, :slot]).gather(1, slates[:, slot : slot + 1]) for slot in slots]
    nothing = torch.empty((len(scores), 0), dtype=torch.float64, device=scores.device)
    return torch.cat([nothing, *steps], dim=1).log()


def _left(
    scores: Float[Tensor, "batch candidates"], above: Int[Tensor, "batch above"]
) -> Float[Tensor, "batch candidates"]:
    """The scores, -inf for what stands above already."""
    return scores.double().scatter(1, above, -torch.inf)


def _uniform(left: Float[Tensor, "batch candidates"]) -> Float[Tensor, "batch candidates"]:
    allowed: Bool[Tensor, "batch candidates"] = left > -torch.inf
    return allowed.double() / allowed.sum(1, keepdim=True)


def _log_weights(scores: Float[Tensor, "batch candidates"]) -> Float[Tensor, "batch candidates"]:
    if (scores < 0).any():
        raise ValueError("a categorical policy reads weights, and some are negative; use plackett_luce for scores")
    return scores.double().log()
