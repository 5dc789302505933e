"""The types every part agrees on: a batch of histories, the catalogue, what a recommender and a sampler offer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys.sizes import Sizes

PAD_ID = 0
"""Item id of padding. Real items are 1..num_items; ids are global across domains."""

NO_DOMAIN = -1
"""Domain of padding, and of a position that asks for nothing."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Histories of all domains merged in time order, left padded, each position asking for the next item.

    A model reads everything but `targets`. `target_domains` is the question that is put at a position
    ("which item of this domain comes next?"): the protocols of the field rank within the target's domain,
    so the domain is known when the scores are made, and a model may use it.
    """

    user: Int[Tensor, " batch"]
    """User index."""
    items: Int[Tensor, "batch length"]
    """Item ids, `PAD_ID` on the left."""
    domains: Int[Tensor, "batch length"]
    """Domain of each item, `NO_DOMAIN` at padding."""
    times: Int[Tensor, "batch length"]
    """Unix seconds, non-decreasing along a history; 0 at padding."""
    targets: Int[Tensor, "batch length"]
    """The next item; `PAD_ID` where nothing is predicted."""
    target_domains: Int[Tensor, "batch length"]
    """The domain asked for; `NO_DOMAIN` where nothing is predicted."""
    sizes: Sizes | None = field(default=None, kw_only=True)
    """What is counted above, for whoever needs it on the host; None: count it, which waits for the device."""

    @property
    def mask(self) -> Tensor:
        """True at real events, shape `batch length`."""
        return self.items != PAD_ID

    def to(self, device: torch.device | str) -> "Batch":
        return replace(self.map(lambda tensor: tensor.to(device, non_blocking=True)), sizes=self.sizes)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor (a move, a slice along the batch), without its sizes."""
        return Batch(**{name: function(column) for name, column in self.columns().items()}, sizes=None)

    def columns(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sizes"}


@dataclass(frozen=True)
class Catalog:
    """Which items exist, in which domain, and how often each was seen in training."""

    domain_names: tuple[str, ...]
    item_domain: Int[Tensor, " items"]
    """Domain index of every item id, `NO_DOMAIN` at `PAD_ID`; length `num_items + 1`."""
    train_counts: Int[Tensor, " items"]
    """Training events per item id; length `num_items + 1`."""

    @property
    def num_items(self) -> int:
        """Number of real items, padding not counted."""
        return len(self.item_domain) - 1

    @property
    def num_domains(self) -> int:
        return len(self.domain_names)

    @cached_property
    def _domain_items(self) -> tuple[Tensor, ...]:
        return tuple(torch.nonzero(self.item_domain == domain).flatten() for domain in range(self.num_domains))

    def items_of(self, domain: int) -> Int[Tensor, " candidates"]:
        """Ids of one domain's items, ascending."""
        return self._domain_items[domain]

    @cached_property
    def local_index(self) -> Int[Tensor, " items"]:
        """Row of every item within `items_of(its domain)`; 0 at `PAD_ID`, where it means nothing."""
        index = torch.zeros_like(self.item_domain)
        for items in self._domain_items:
            index[items] = torch.arange(len(items), device=items.device)
        return index

    def to(self, device: torch.device | str) -> "Catalog":
        return Catalog(self.domain_names, self.item_domain.to(device), self.train_counts.to(device))


@dataclass(frozen=True)
class TrainingEvents:
    """What may be read off the data before training: the users' TRAIN events, laid end to end."""

    items: Int[Tensor, " events"]
    times: Int[Tensor, " events"]
    """Unix seconds."""
    offsets: Int[Tensor, " boundaries"]
    """User u's events are `offsets[u]:offsets[u + 1]`."""
    text: Float[Tensor, "items d_text"] | None = None
    """A vector per item id made of its text, where the experiment asks for one (`data.text`)."""


@runtime_checkable
class Fitted(Protocol):
    """A model that reads something off the training events before its first batch: counts, a graph, a support set.

    A model trained by gradient keeps what it reads in buffers that are not persistent: it is fitted again where its
    weights are loaded.
    """

    def fit(self, events: TrainingEvents) -> None: ...


@dataclass(frozen=True)
class Objective:
    """What a training step descends, where that is more than the run's loss on the states of `forward`."""

    batch: Batch
    """The questions; others than those put to the model where it asks its own (masked items)."""
    answers: tuple[tuple[float, Float[Tensor, "batch length d_model"]], ...]
    """States that each answer the questions of `batch`; the run's loss of each counts with its weight."""
    terms: Mapping[str, Float[Tensor, ""]]
    """Further losses by name, weighted as they are to be added."""


@runtime_checkable
class HasObjective(Protocol):
    """A model whose published training has terms beside the loss on its states."""

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        """Called in training instead of `forward`; what it draws comes from `generator`, on the batch's device."""
        ...


@runtime_checkable
class Recommender(Protocol):
    """A model trained by gradient: a state per position, and one vector per item to compare it with.

    `packs_events = True` says that it leaves padding out, and so makes shapes of its own however its batch is padded.
    """

    def __call__(self, batch: Batch) -> Float[Tensor, "batch length d_model"]: ...

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        """Row per item id, row `PAD_ID` included (and never a candidate)."""
        ...


@runtime_checkable
class HasThreads(Protocol):
    """A recommender whose score adds up those of several threads: a part of the state with a part of the table each."""

    @property
    def threads(self) -> tuple[int, ...]:
        """Width of each part, in the order they stand in `hidden` and in the item vectors."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Anything that can be ranked: neural, counted or random."""

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        """fp32 score of each candidate as the item that follows each history (the last position's question)."""
        ...


class Draw(NamedTuple):
    """Negatives for a flat list of targets: a row for each position, or rows that positions share.

    A draw may equal a position's target; a loss must mask it.
    """

    items: Int[Tensor, "rows negatives"]
    log_q: Float[Tensor, "rows negatives"]
    """Log-probability of one draw under the sampler. -inf bars an item from a position: it is no negative there;
    `items` may then have one row for all positions, while this has a row for each."""
    target_log_q: Float[Tensor, " positions"]
    """The same for the target itself."""
    row: Int[Tensor, " positions"] | None = None
    """The row that each position sees, where positions share rows, which bar nothing; None: its own."""


@runtime_checkable
class NegativeSampler(Protocol):
    """Draws from an explicit generator that it owns, whose state goes into the checkpoint."""

    generator: torch.Generator

    def draw(self, targets: Int[Tensor, " positions"]) -> Draw: ...
