"""Who the target competes with: the named ranking protocols."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from recsys.evaluation.rank import Ties
from recsys.types import PAD_ID, Catalog

ProtocolName = Literal[
    "full", "all", "abxi_999", "abxi_999_compat", "c2dsr_999", "uni_100", "pop_100", "llm4cdsr_100_compat"
]


@dataclass(frozen=True)
class Negatives:
    """How a sampled protocol draws from its pool. It never draws the target."""

    count: int
    unseen: bool = True
    """Leave out every item of the user's history too."""
    replace: bool = False
    """Draw with replacement; without it, a pool that is too small is used up."""
    by_popularity: bool = False
    """In proportion to training events, so that an item without any is never drawn; else uniformly."""


@dataclass(frozen=True)
class RankingProtocol:
    """A named way to rank. Sampled metrics are not consistent with full ones, not even in expectation
    (Krichene and Rendle, KDD 2020): they are there to be compared with published tables, under their own name."""

    name: ProtocolName
    pool: Callable[[Catalog, int], Tensor]
    """Ascending candidate ids for a target of the given domain."""
    negatives: Negatives | None = None
    """None: every item of the pool is ranked."""
    ties: Ties | None = None
    """The tie rule the protocol was published with; None: the one of the evaluation."""
    margin: float = 0.0
    """Scores this close to the target's count as tied."""
    by_thread: bool = False
    """Each thread of a model has a draw of its own, and a negative's score adds up the threads' scores of different
    items. For models with `HasThreads` only."""


def _domain(catalog: Catalog, domain: int) -> Tensor:
    return catalog.items_of(domain)


def _all_domains(catalog: Catalog, domain: int) -> Tensor:
    return torch.nonzero(catalog.item_domain >= 0).flatten()


def _domain_and_one(catalog: Catalog, domain: int) -> Tensor:
    """The published code starts the range of a domain's ids one too early: at the last id of the domain before."""
    if domain == 0:
        return catalog.items_of(domain)
    stray = catalog.items_of(domain - 1)[-1:]
    return torch.cat([stray, catalog.items_of(domain)]).sort().values


PROTOCOLS: dict[str, RankingProtocol] = {
    protocol.name: protocol
    for protocol in (
        # Every item of the target's domain.
        RankingProtocol("full", _domain),
        # Every item of every domain.
        RankingProtocol("all", _all_domains),
        # ABXI (WWW 2025) as its paper has it: 999 items of the target's domain that the user never met.
        RankingProtocol("abxi_999", _domain, Negatives(999)),
        # ABXI as its released code has it.
        RankingProtocol("abxi_999_compat", _domain_and_one, Negatives(999), ties="optimistic"),
        # C2DSR (CIKM 2022): repeats and items of the history are allowed; a rival must win by more than 1e-5.
        RankingProtocol(
            "c2dsr_999", _domain, Negatives(999, unseen=False, replace=True), ties="optimistic", margin=1e-5
        ),
        # The 100 negatives of BERT4Rec (CIKM 2019) and its kin, uniform and by training popularity.
        RankingProtocol("uni_100", _domain, Negatives(100)),
        RankingProtocol("pop_100", _domain, Negatives(100, by_popularity=True)),
        # LLM4CDSR (SIGIR 2025) as its released code has it: the mixed and the domain's thread draw their 100 negatives
        # apart from each other, and the j-th of one is added to the j-th of the other. The target's two scores are of
        # one item and rise together, a negative's are of two and do not: sums of negatives spread less than they
        # should, the more so the more the threads agree. Simulated, NDCG@10 comes out too high by 17 to 33 % where the
        # threads' scores of an item correlate at .3, by 34 to 63 % at .6, by 49 to 90 % at .9; at 0 it is right. A
        # change of the model that moves this correlation moves the number too. There to read published tables by.
        RankingProtocol("llm4cdsr_100_compat", _domain, Negatives(100), by_thread=True),
    )
}


def positions(pool: Int[Tensor, " pool"], catalog: Catalog) -> Int[Tensor, " items"]:
    """Place of every item id in `pool`; `len(pool)` for an item outside it and for padding."""
    place = torch.full_like(catalog.item_domain, len(pool), dtype=torch.int64)
    place[pool] = torch.arange(len(pool), device=pool.device)
    assert place[PAD_ID] == len(pool), "padding is no candidate"
    return place


def among(pool: Int[Tensor, " pool"], items: Int[Tensor, "batch some"], catalog: Catalog) -> Bool[Tensor, "batch pool"]:
    """Which of the pool occur among a row's `items`, of which those outside the pool and padding do not matter."""
    mask = torch.zeros(len(items), len(pool) + 1, dtype=torch.bool, device=items.device)
    return mask.scatter_(1, positions(pool, catalog)[items], True)[:, :-1]
