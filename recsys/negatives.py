"""Samplers of negatives. A draw may equal its position's target; the losses mask it, so it is never a negative."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from recsys.loading import Config
from recsys.types import NO_DOMAIN, PAD_ID, Catalog, Draw

Scope = Literal["target_domain", "each_domain", "all"]
"""Where negatives come from: the target's domain, every domain in equal number, or the whole catalogue."""


class UniformConfig(Config):
    """Every item of the scope is as likely as any other."""

    name: Literal["uniform"] = "uniform"
    num_negatives: PositiveInt = 128
    """Draws per target (per target and domain with `each_domain`), with replacement."""
    scope: Scope = "target_domain"
    shared: bool = False
    """One set of draws for all targets of a batch: far cheaper, and the batch's positions are no longer independent."""

    def build(self, catalog: Catalog, generator: torch.Generator) -> "CatalogSampler":
        return CatalogSampler(
            catalog=catalog,
            weights=torch.ones_like(catalog.train_counts, dtype=torch.float64),
            num_negatives=self.num_negatives,
            scope=self.scope,
            shared=self.shared,
            generator=generator,
        )


class PopularityConfig(Config):
    """Items in proportion to max(training count, 1)^alpha.

    The floor of one event lets every item be drawn: the proposal of an importance-weighted softmax must cover
    the catalogue, and `log_q` stays finite.
    """

    name: Literal["popularity"] = "popularity"
    num_negatives: PositiveInt = 128
    """Draws per target (per target and domain with `each_domain`), with replacement."""
    alpha: NonNegativeFloat = 1.0
    """0 is uniform, 1 is the training frequency."""
    scope: Scope = "target_domain"
    shared: bool = False
    """One set of draws for all targets of a batch: far cheaper, and the batch's positions are no longer independent."""

    def build(self, catalog: Catalog, generator: torch.Generator) -> "CatalogSampler":
        return CatalogSampler(
            catalog=catalog,
            weights=_frequency(catalog) ** self.alpha,
            num_negatives=self.num_negatives,
            scope=self.scope,
            shared=self.shared,
            generator=generator,
        )


class InBatchConfig(Config):
    """The targets of the other positions of the batch."""

    name: Literal["in_batch"] = "in_batch"
    scope: Literal["target_domain", "all"] = "target_domain"

    def build(self, catalog: Catalog, generator: torch.Generator) -> "InBatchSampler":
        return InBatchSampler(catalog=catalog, scope=self.scope, generator=generator)


NegativesConfig = Annotated[UniformConfig | PopularityConfig | InBatchConfig, Field(discriminator="name")]


class CatalogSampler:
    """Draws items with given weights, independently and with replacement, by Walker's alias method.

    One uniform number picks a slot and decides between its two items, so that a draw costs the same for any
    weights and any catalogue (a binary search of the cumulative weights takes five times as long). The tables lie
    on the generator's device, which must be that of the targets. The generator's state is all the state there is.

    Raises ValueError if a domain that is drawn from (the catalogue, with scope `all`) has fewer than two items.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        weights: Float[Tensor, " items"],
        num_negatives: int,
        scope: Scope,
        shared: bool,
        generator: torch.Generator,
    ) -> None:
        self.generator = generator
        self.num_negatives = num_negatives
        self.shared = shared
        self.per_target = scope == "target_domain"
        device = generator.device
        pools = _pools(catalog, by_domain=scope != "all")
        tables = [_alias(weights[pool]) for pool in pools]
        self.items = torch.cat(pools).to(device)
        self.keep = torch.cat([keep for keep, _ in tables]).to(device)
        self.uniform = bool((self.keep == 1).all())
        self.alias = torch.cat([pool[other] for pool, (_, other) in zip(pools, tables, strict=True)]).to(device)
        self.size = torch.tensor([len(pool) for pool in pools], device=device)
        self.start = self.size.cumsum(0) - self.size
        self.item_pool = _pool_of_item(pools, len(weights)).to(device)
        self.log_q = _log_q(pools, weights).to(device)

    def draw(self, targets: Int[Tensor, " positions"]) -> Draw:
        """With `shared`, one row for all targets, or with scope `target_domain` one for each domain."""
        target_pool, pools = self.item_pool[targets], torch.arange(len(self.size), device=targets.device)
        if not self.per_target:
            pool, row = pools.repeat_interleave(self.num_negatives)[None], torch.zeros_like(target_pool)
        elif self.shared:
            pool, row = pools[:, None], target_pool
        else:
            pool, row = target_pool[:, None], None
        rows = len(pool) if self.shared else len(targets)
        columns = self.num_negatives if self.per_target else pool.shape[1]
        # In double precision, 53 bits suffice for the slot and the choice within it, and the product stays below size.
        point = torch.rand(rows, columns, dtype=torch.float64, device=targets.device, generator=self.generator)
        point *= self.size[pool]
        slot = point.long()
        if self.uniform:  # every slot is its own item's, and one log q is that of all
            items = self.items[slot + self.start[pool]]
            log_q = self.log_q[self.items[self.start[pool]]].expand(items.shape)
        else:
            fraction = point.sub_(slot)
            slot += self.start[pool]
            items = torch.where(fraction < self.keep[slot], self.items[slot], self.alias[slot])
            log_q = self.log_q[items]
        return Draw(items, log_q, self.log_q[targets], row if self.shared else None)


class InBatchSampler:
    """Every target of the batch, once per occurrence, for every position; with scope `target_domain` those of other
    domains are barred by a `log_q` of -inf.

    `log_q` is the training frequency (at least one event), within the domain or the catalogue by scope. Nothing is
    random here; the generator is held because every sampler has one.

    Raises ValueError if a domain (the catalogue, with scope `all`) has fewer than two items.
    """

    def __init__(self, *, catalog: Catalog, scope: Literal["target_domain", "all"], generator: torch.Generator) -> None:
        self.generator = generator
        pools = _pools(catalog, by_domain=scope == "target_domain")
        self.item_pool = _pool_of_item(pools, catalog.num_items + 1).to(generator.device)
        self.log_q = _log_q(pools, _frequency(catalog)).to(generator.device)

    def draw(self, targets: Int[Tensor, " positions"]) -> Draw:
        pool, target_log_q = self.item_pool[targets], self.log_q[targets]
        log_q = target_log_q.where(pool == pool[:, None], -torch.inf)
        return Draw(targets[None], log_q, target_log_q)


def _frequency(catalog: Catalog) -> Float[Tensor, " items"]:
    return catalog.train_counts.clamp(min=1).double()


def _pools(catalog: Catalog, *, by_domain: bool) -> list[Tensor]:
    """The sets of items within which a probability is normalised."""
    if not by_domain:
        items = torch.nonzero(catalog.item_domain != NO_DOMAIN).flatten()
        if len(items) < 2:
            raise ValueError(f"the catalogue has {len(items)} item(s), which leaves no negative; use the softmax loss")
        return [items]
    pools = [catalog.items_of(domain) for domain in range(catalog.num_domains)]
    for name, items in zip(catalog.domain_names, pools, strict=True):
        if len(items) < 2:
            raise ValueError(
                f"domain {name!r} has {len(items)} item(s), and a domain with one item has no negative; "
                "drop the domain from the data, or draw negatives with scope: all"
            )
    return pools


def _pool_of_item(pools: list[Tensor], length: int) -> Int[Tensor, " items"]:
    pool_of_item = torch.full((length,), NO_DOMAIN, device=pools[0].device)
    for index, pool in enumerate(pools):
        pool_of_item[pool] = index
    return pool_of_item


def _log_q(pools: list[Tensor], weights: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Log-probability of each item within its pool; -inf at `PAD_ID`."""
    log_q = torch.full_like(weights, -torch.inf)
    for pool in pools:
        log_q[pool] = weights[pool].log() - weights[pool].sum().log()
    assert log_q[PAD_ID] == -torch.inf
    return log_q.float()


def _alias(weights: Float[Tensor, " items"]) -> tuple[Float[Tensor, " items"], Int[Tensor, " items"]]:
    """Vose (1991): slot i is item i with probability keep[i], else item other[i]."""
    excess = (weights / weights.mean()).tolist()
    keep, other = [1.0] * len(excess), list(range(len(excess)))
    small = [i for i, weight in enumerate(excess) if weight < 1]
    large = [i for i, weight in enumerate(excess) if weight >= 1]
    while small and large:
        slot, donor = small.pop(), large[-1]
        keep[slot], other[slot] = excess[slot], donor
        excess[donor] -= 1 - excess[slot]
        if excess[donor] < 1:
            small.append(large.pop())
    device = weights.device
    return torch.tensor(keep, dtype=torch.float64, device=device), torch.tensor(other, device=device)
