"""Simulated users over real interactions: what a policy would earn from them is known.

A request is the moment before something that a user really did. What the user wishes at that moment is read off what
the user did next and lately, in all domains, through vectors of the items made from who took what: knowledge that no
policy has. Clicks then follow a click model. So the histories are real, the tastes are as real as the data allow, and
the value of any policy is exact, or as exact as the slates that are drawn are many.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from pydantic import Field
from torch import Tensor

from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import TEST, VALID, Split
from recsys.loading import Config
from recsys.offpolicy.candidates import Candidate, Requests
from recsys.offpolicy.evidence import chunks, finite_scores
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.policies import marginals, sample
from recsys.types import NO_DOMAIN, Catalog

Share = Annotated[float, Field(ge=0, le=1)]


class PositionBased(Config):
    """A slot is looked at with a probability of its own, 1 / (l + 1)^decay at slot l, whatever stands above it."""

    name: Literal["position_based"] = "position_based"
    decay: float = Field(1.0, ge=0)

    def expected(self, attraction: Float[Tensor, "batch slots"]) -> Float[Tensor, "batch slots"]:
        """Probability of a click at each slot."""
        return attraction * self._examined(attraction)

    def draw(
        self, attraction: Float[Tensor, "batch slots"], generator: torch.Generator
    ) -> Float[Tensor, "batch slots"]:
        return _happens(self.expected(attraction), generator)

    def _examined(self, attraction: Float[Tensor, "batch slots"]) -> Float[Tensor, " slots"]:
        return torch.arange(1, attraction.shape[1] + 1, dtype=torch.float64) ** -self.decay


class Cascade(Config):
    """The user reads from the top and may stop after every item (Chuklin et al. 2015, the dependent click model)."""

    name: Literal["cascade"] = "cascade"
    persistence: Share = 0.9
    """Chance to read on after an item that was not clicked."""
    appetite: Share = 0.3
    """Chance to read on after a click; 0 is the classic cascade of one click."""

    def expected(self, attraction: Float[Tensor, "batch slots"]) -> Float[Tensor, "batch slots"]:
        """Probability of a click at each slot."""
        goes_on = attraction * self.appetite + (1 - attraction) * self.persistence
        reached = torch.cat([torch.ones_like(attraction[:, :1]), goes_on[:, :-1].cumprod(1)], dim=1)
        return attraction * reached

    def draw(
        self, attraction: Float[Tensor, "batch slots"], generator: torch.Generator
    ) -> Float[Tensor, "batch slots"]:
        clicks = _happens(attraction, generator)
        goes_on = _happens(torch.where(clicks == 1, self.appetite, self.persistence), generator)
        reached = torch.cat([torch.ones_like(clicks[:, :1]), goes_on[:, :-1].cumprod(1)], dim=1)
        return clicks * reached


class SimulatorConfig(Config):
    """How a user's wishes become clicks."""

    click: Annotated[PositionBased | Cascade, Field(discriminator="name")] = Cascade()
    dimensions: int = Field(32, ge=1)
    """Of the items' vectors."""
    memory: Share = 0.8
    """Weight of an event in a user's taste, per event between it and the request; the next event weighs most."""
    window: int = Field(20, ge=1)
    """Events before the request, and after it, that make the taste."""
    least: Share = 0.01
    """Attraction of an item that has nothing to do with the taste."""
    most: Share = 0.6
    """Attraction of an item that is all of it."""
    sharpness: float = Field(2.0, gt=0)
    """attraction = least + (most - least) · relevance^sharpness, with the cosine of taste and item, if positive."""
    switch_cost: Share = 0.0
    """Share of attraction that is lost where the request asks for another domain than the last event's."""
    fatigue: Share = 0.0
    """Share of attraction that an item loses to its own like higher up in the slate: times the cosine with the most
    similar of those above."""
    drift: float = Field(0.0, ge=0)
    """Items come into fashion and go out of it: from the first request to the last an item's attraction changes by
    the factor exp(drift · z), z standard normal by item."""
    seed: int = Field(0, ge=0)
    """Of the fashions."""


@dataclass(frozen=True)
class Truth:
    """The mean reward of a request under a policy."""

    value: float
    error: float
    """Standard error from drawing slates; 0 where the value is exact."""


class UserSimulator:
    """Users at the moments of `requests`, among the items of `catalog`."""

    def __init__(
        self,
        config: SimulatorConfig,
        sequences: Sequences,
        catalog: Catalog,
        requests: Requests,
        following: Int64[np.ndarray, " requests"],
    ) -> None:
        """`following` is the packed position of the event that each request comes before."""
        self.config = config
        self.catalog = catalog
        self.requests = requests
        self.vectors = torch.from_numpy(item_vectors(sequences, config.dimensions))
        position, kind = np.unique(following, return_inverse=True)
        self._kind = torch.from_numpy(kind)
        self._taste = torch.from_numpy(_tastes(sequences, position, self.vectors.numpy(), config))
        order = requests.time.argsort(kind="stable")
        elapsed = np.empty(len(order))
        elapsed[order] = np.arange(len(order)) / max(1, len(order) - 1)
        self._elapsed = torch.from_numpy(elapsed)
        fashion = torch.Generator().manual_seed(config.seed)
        self._fashion = torch.randn(len(self.vectors), generator=fashion, dtype=torch.float64)
        switched = np.asarray(sequences.domains[following - 1] != requests.domain)
        self._kept = torch.from_numpy(1 - config.switch_cost * switched)

    def attraction(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Probability that a user who looks at an item clicks it, before any fatigue."""
        relevance = self._taste[self._kind[requests]] @ self.vectors[items].T
        return self._attraction(requests, relevance, self._fashion[items].expand_as(relevance))

    def expected(
        self, requests: Int[Tensor, " batch"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        """Probability of a click at each slot of slates of item ids."""
        return self.config.click.expected(self._of_slates(requests, slates))

    def clicks(
        self, requests: Int[Tensor, " batch"], slates: Int[Tensor, "batch slots"], generator: torch.Generator
    ) -> Float[Tensor, "batch slots"]:
        """Clicks, 0 or 1."""
        return self.config.click.draw(self._of_slates(requests, slates), generator)

    def _of_slates(
        self, requests: Int[Tensor, " batch"], slates: Int[Tensor, "batch slots"]
    ) -> Float[Tensor, "batch slots"]:
        shown = self.vectors[slates]
        relevance = torch.einsum("bd,bld->bl", self._taste[self._kind[requests]], shown)
        attraction = self._attraction(requests, relevance, self._fashion[slates])
        if self.config.fatigue == 0:
            return attraction
        alike = torch.einsum("bld,bmd->blm", shown, shown).clamp(min=0).tril(-1)
        return attraction * (1 - self.config.fatigue * alike.amax(2))

    def _attraction(
        self,
        requests: Int[Tensor, " batch"],
        relevance: Float[Tensor, "batch candidates"],
        fashion: Float[Tensor, "batch candidates"],
    ) -> Float[Tensor, "batch candidates"]:
        config = self.config
        base = config.least + (config.most - config.least) * relevance.clamp(0, 1) ** config.sharpness
        changed = (config.drift * self._elapsed[requests, None] * fashion).exp()
        return (base * changed * self._kept[requests, None]).clamp(max=1)


def make_requests(
    sequences: Sequences, split: Split, count: int, generator: np.random.Generator
) -> tuple[Requests, Int64[np.ndarray, " requests"]]:
    """`count` moments before held-out events (VALID and TEST), in the order of time, and the positions of the events.

    Drawn with replacement, among events that something of the same user precedes in time. Raises DataError where
    there is none.
    """
    users = sequences.event_users()
    held_out = np.flatnonzero((split.role == VALID) | (split.role == TEST))
    first = sequences.times[sequences.offsets[users[held_out]]]
    held_out = held_out[sequences.times[held_out] > first]
    if not len(held_out):
        raise DataError(f"the split {split.name} holds out no event with a history; choose another split")
    chosen = generator.choice(held_out, size=count)
    chosen = chosen[np.lexsort((chosen, sequences.times[chosen]))]
    columns = (users[chosen], sequences.domains[chosen], sequences.times[chosen])
    user, domain, time = (np.asarray(column, dtype=np.int64) for column in columns)
    return Requests(user, domain, time), chosen


def offer(catalog: Catalog, items_per_domain: int | None) -> Catalog:
    """The catalogue with only the items of each domain that were seen most often in training; None keeps all.

    Item ids stay as they are: what is not on offer has no domain.
    """
    if items_per_domain is None:
        return catalog
    item_domain = torch.full_like(catalog.item_domain, NO_DOMAIN)
    for domain in range(catalog.num_domains):
        items = catalog.items_of(domain)
        order = catalog.train_counts[items].argsort(descending=True, stable=True)
        item_domain[items[order[:items_per_domain]]] = domain
    return Catalog(catalog.domain_names, item_domain, catalog.train_counts)


def item_vectors(sequences: Sequences, dimensions: int) -> Float64[np.ndarray, "items dimensions"]:
    """Unit vectors of the items from who took what, all events of all domains: a truncated SVD of users by items.

    Entries are 1 / √(events of the user · events of the item); the first singular direction, which only tells how
    popular an item is, is left out. Items that nobody took have zeros, which are like nothing.
    """
    from scipy.sparse import csr_array  # takes most of a second to import
    from scipy.sparse.linalg import svds

    user, item = np.unique(np.stack([sequences.event_users(), sequences.items.astype(np.int64)]), axis=1)
    of_user, of_item = np.bincount(user, minlength=sequences.num_users), np.bincount(item)
    weight = 1 / np.sqrt(of_user[user] * of_item[item])
    shape = (sequences.num_users, sequences.num_items + 1)
    if min(shape) <= dimensions + 1:
        raise DataError(
            f"{min(shape)} users or items are too few for vectors of {dimensions} dimensions; lower "
            "simulator.dimensions"
        )
    start = np.random.default_rng(0).standard_normal(min(shape))
    _, singular, right = svds(csr_array((weight, (user, item)), shape=shape), k=dimensions + 1, v0=start)
    order = np.argsort(-singular)[1:]
    vectors = right[order].T * singular[order]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-12)


def simulate(
    simulator: UserSimulator,
    logging: Candidate,
    slots: int,
    generator: torch.Generator,
    marginal_draws: int | None = None,
) -> LoggedFeedback:
    """What a policy shows to all requests, with its propensities, and what the users click.

    `marginal_draws` also logs the probability of each item at its position, as a mean over so many drawn tops.
    """
    requests, catalog = simulator.requests, simulator.catalog
    n = len(requests.user)
    shown, clicks = torch.empty((n, slots), dtype=torch.int64), torch.empty((n, slots), dtype=torch.float64)
    propensity, marginal = torch.empty_like(clicks), torch.empty_like(clicks)
    for domain, chunk in chunks(requests.domain, catalog):
        rows, items = torch.from_numpy(chunk), catalog.items_of(domain)
        _require(slots, items, catalog.domain_names[domain])
        scores = finite_scores(logging, rows, items)
        drawn = sample(logging.policy, scores, slots, generator)
        shown[rows], propensity[rows] = items[drawn.slates], drawn.log_probs.exp()
        clicks[rows] = simulator.clicks(rows, shown[rows], generator)
        if marginal_draws is not None:
            marginal[rows] = marginals(logging.policy, scores, drawn.slates, marginal_draws, generator)
    known = propensity if slots == 1 else marginal if marginal_draws is not None else None
    return LoggedFeedback(
        request=np.arange(n),
        user=requests.user,
        domain=requests.domain,
        time=requests.time,
        items=shown.numpy(),
        positions=np.tile(np.arange(slots), (n, 1)),
        rewards={"click": clicks.numpy()},
        propensity=propensity.numpy(),
        marginal=None if known is None else known.numpy(),
        num_items=catalog.num_items,
        domain_names=catalog.domain_names,
    )


def true_value(
    simulator: UserSimulator, candidate: Candidate, slots: int, draws: int, generator: torch.Generator
) -> Truth:
    """Clicks per request under a policy: a sum over all items for slates of one, else a mean over drawn slates.

    `draws` slates (2 at least) are drawn per request; of each its expected clicks count, so that only the slates are
    left to chance. The value is that of these requests, not of all that users might ask.
    """
    assert slots == 1 or draws > 1
    requests, catalog = simulator.requests, simulator.catalog
    found = torch.empty((1 if slots == 1 else draws, len(requests.user)), dtype=torch.float64)
    for domain, chunk in chunks(requests.domain, catalog):
        rows, items = torch.from_numpy(chunk), catalog.items_of(domain)
        _require(slots, items, catalog.domain_names[domain])
        scores = finite_scores(candidate, rows, items)
        if slots == 1:
            top = candidate.policy.next(scores, torch.empty((len(rows), 0), dtype=torch.int64))
            found[0, rows] = (top * simulator.attraction(rows, items)).sum(1)
            continue
        for draw in found:
            slates = items[sample(candidate.policy, scores, slots, generator).slates]
            draw[rows] = simulator.expected(rows, slates).sum(1)
    # the requests are given: what varies is the mean of each request's draws
    error = 0.0 if slots == 1 else float((found.var(0) / draws).sum().sqrt()) / found.shape[1]
    return Truth(float(found.mean()), error)


def _require(slots: int, items: Int[Tensor, " candidates"], domain: str) -> None:
    if len(items) < slots:
        raise DataError(
            f"{domain} offers {len(items)} items, which fill no slate of {slots}; raise offer or lower slots"
        )


def _happens(chance: Float[Tensor, "batch slots"], generator: torch.Generator) -> Float[Tensor, "batch slots"]:
    return (torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance).double()


def _tastes(
    sequences: Sequences,
    position: Int64[np.ndarray, " kinds"],
    vectors: Float64[np.ndarray, "items dimensions"],
    config: SimulatorConfig,
) -> Float64[np.ndarray, "kinds dimensions"]:
    """Unit vectors: the sum of the vectors of the events around each position, the nearest weighing most."""
    user = np.searchsorted(sequences.offsets, position, side="right") - 1
    start, stop = sequences.offsets[user], sequences.offsets[user + 1]
    taste = np.zeros((len(position), vectors.shape[1]))
    for step in range(-config.window, config.window):
        event = position + step
        inside = (event >= start) & (event < stop)
        away = step if step >= 0 else -step
        taste[inside] += config.memory**away * vectors[sequences.items[event[inside]]]
    length = np.linalg.norm(taste, axis=1, keepdims=True)
    return np.divide(taste, length, out=np.zeros_like(taste), where=length > 1e-12)
