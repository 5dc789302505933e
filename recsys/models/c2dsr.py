"""C2DSR (Cao et al., CIKM 2022): a graph of item transitions, and single-domain states that inform of mixed ones."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import CrossConfig, check_heads
from recsys.models.dropout import Dropout
from recsys.models.embeddings import ItemEmbedding, check_length, event_positions
from recsys.models.encoders import EncoderBlock, causal_mask
from recsys.models.exchange import check_cross, exchange, look, make_units
from recsys.models.initialization import STD, initialize
from recsys.models.streams import Streams, cut_streams
from recsys.types import Batch, Catalog, Objective, TrainingEvents


class C2DSRConfig(Config):
    """The defaults are the published ones."""

    name: Literal["c2dsr"] = "c2dsr"
    d_model: Annotated[int, Field(ge=1)] = 256
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Blocks of each encoder."""
    num_heads: Annotated[int, Field(ge=1)] = 1
    graph_layers: Annotated[int, Field(ge=0)] = 1
    """Steps along the graph of item transitions; 0 leaves the item tables as they are."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    answer_weight: Annotated[float, Field(gt=0)] = 0.7
    """Weight of the run's loss on each of the two answers."""
    infomax_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the contrastive term of each domain."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: C2DSR as published, which has none."""

    @model_validator(mode="after")
    def _check(self) -> "C2DSRConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, self.num_layers)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "C2DSR":
        if catalog.num_domains < 2:
            raise ValueError("c2dsr contrasts domains and the data has one; use `sasrec` on a single domain")
        return C2DSR(self, catalog, max_len, generator)


class C2DSR(nn.Module):
    """One encoder on the merged history and one per domain. For a history S and its events S^k in domain k

        G_0 = E, G_l = Norm(A) G_{l-1}, G = mean(G_0, …, G_L)      likewise G' of the table E' and the graph A'
        H   = Encoder(G[S] + positions)
        H^k = Encoder^k(G'[S^k] + positions^k)
        hidden = h + h^k          scores of the items of domain k: hidden W^k

    where k is asked for at t, with the state of H at t and that of H^k at k's latest event up to t; h^k is 0 where k
    has no event yet. W^k are the rows of `item_embeddings` that belong to k, a table of their own.

    A_ij = 1 if some user's TRAIN event of j comes right after that of i; Norm divides a row by its sum, so a row is
    the mean over the items that followed. A' has the transitions within each domain; E' holds each item once, in its
    own domain, and is all the domains' tables in one. The graph knows TRAIN events only, their targets among them.

    Training descends, with weight `answer_weight`, the run's loss of `hidden` and that of h alone (the shared-only
    answer), and with weight `infomax_weight`, for each domain k and averaged over the users with events in k and
    elsewhere,

        -log D_k(z^k, z) - log(1 - D_k(z^k, z~)),   D_k(a, b) = sigmoid(a^T B_k b)

    z^k is the mean of H^k over the events of k, z the mean of H over the events of the other domains, z~ the same of
    the history in which the events of the other domains are replaced by random items of their domains.

    Written from the equations for two domains, where "the other domain" is one; with more it is all others together.
    Apart from the paper: the blocks are the pre-norm ones of this project; the loss of an answer is what the run's
    loss is, a mean over all positions where the paper adds the means of two domains; and the class for padding, which
    the published softmax has besides the items, is left out.

    With an exchange (not part of C2DSR) each domain's states query the other domains' states between embedding and
    encoder (`early`) or after blocks (`stack`) of the domains' encoders; a question then has a state of its own, as
    in `CrossDomain`.
    """

    pool: Tensor
    pool_start: Tensor
    pool_size: Tensor
    item_domain: Tensor

    def __init__(
        self, config: C2DSRConfig, catalog: Catalog, max_len: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        d_model, num_domains = config.d_model, catalog.num_domains
        self.max_len = max_len
        self.num_domains = num_domains
        self.answer_weight = config.answer_weight
        self.infomax_weight = config.infomax_weight
        self.embedding = GraphEmbedding(catalog.num_items, d_model, config.graph_layers)
        self.own_embedding = GraphEmbedding(catalog.num_items, d_model, config.graph_layers)
        self.positions = nn.Embedding(max_len, d_model)
        self.own_positions = nn.ModuleList(nn.Embedding(max_len + 1, d_model) for _ in range(num_domains))
        self.dropout = Dropout(config.dropout)

        def block() -> EncoderBlock:
            return EncoderBlock(
                d_model=d_model,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                dropout=config.dropout,
                activation="relu",
                norm_first=True,
            )

        self.blocks = nn.ModuleList(block() for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.own_layers = nn.ModuleList(
            nn.ModuleList(block() for _ in range(num_domains)) for _ in range(config.num_layers)
        )
        self.own_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_domains))
        self.heads = ItemEmbedding(catalog.num_items, d_model)
        self.discriminators = nn.ModuleList(Discriminator(d_model) for _ in range(num_domains))
        initialize(self, generator)
        for discriminator in self.discriminators:
            nn.init.normal_(cast("Discriminator", discriminator).weight, std=STD, generator=generator)
        self.early, self.stack = make_units(config.cross, num_domains, d_model, generator)

        domain = catalog.item_domain
        size = (domain == torch.arange(num_domains, device=domain.device)[:, None]).sum(dim=1)
        self.register_buffer("pool", domain.argsort(stable=True)[1:], persistent=False)  # padding comes first
        self.register_buffer("pool_size", size, persistent=False)
        self.register_buffer("pool_start", size.cumsum(0) - size, persistent=False)
        self.register_buffer("item_domain", domain, persistent=False)

    def fit(self, events: TrainingEvents) -> None:
        """Read the transitions off the training events."""
        device = self.item_domain.device
        user = torch.repeat_interleave(events.offsets.diff()).to(device)
        items = events.items.to(device)
        self.embedding.fill(*_transitions(items, user))
        self.own_embedding.fill(*_transitions(items, user * self.num_domains + self.item_domain[items]))

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        mixed = self._mixed(batch, self.embedding())
        streams, own = self._own(batch)
        return mixed + streams.gather(own, streams.question_slot)

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        table = self.embedding()
        mixed = self._mixed(batch, table)
        streams, own = self._own(batch)
        hidden = mixed + streams.gather(own, streams.question_slot)
        answers = ((self.answer_weight, hidden), (self.answer_weight, mixed))
        infomax = mixed.new_zeros(())
        for domain, discriminator in enumerate(self.discriminators):
            users, event = streams.users()[domain], streams.split(streams.event)[domain]
            elsewhere = (batch.mask & (batch.domains != domain))[users]
            both = event.any(dim=1) & elsewhere.any(dim=1)
            if not both.any():
                continue
            users, elsewhere = users[both], elsewhere[both]
            corrupted = self._corrupt(batch.items[users], elsewhere, generator)
            false = self._encode(corrupted, batch.mask[users], table)
            z = _mean(own[domain][both], event[both])
            real_score = discriminator(z, _mean(mixed[users], elsewhere))
            false_score = discriminator(z, _mean(false, elsewhere))
            infomax = infomax + (F.softplus(-real_score) + F.softplus(false_score)).mean()
        return Objective(batch, answers, {"infomax": self.infomax_weight * infomax})

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.heads.weight

    def _mixed(self, batch: Batch, table: Float[Tensor, "items d_model"]) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        return self._encode(batch.items, batch.mask, table)

    def _encode(
        self,
        items: Int[Tensor, "batch length"],
        real: Bool[Tensor, "batch length"],
        table: Float[Tensor, "items d_model"],
    ) -> Float[Tensor, "batch length d_model"]:
        """H of merged histories."""
        x = F.embedding(items, table) + self.positions(event_positions(real))
        x = self.dropout(x) * real[..., None]
        mask = causal_mask(real)
        for block in self.blocks:
            x = block(x, x, mask, real)
        return self.norm(x) * real[..., None]

    def _own(self, batch: Batch) -> tuple[Streams, list[Tensor]]:
        """H^k of every domain, as the streams split them."""
        crosses = bool(self.early or self.stack)
        streams = cut_streams(batch, self.num_domains, question_slots=crosses)
        view = look(batch, streams, self.early or self.stack)
        real = streams.split(streams.real)
        own = [causal_mask(event) for event in streams.split(streams.event)]

        vectors = streams.split(F.embedding(streams.item, self.own_embedding()))
        places = zip(self.own_positions, streams.split(streams.count), strict=True)
        states = [
            self.dropout(x + position) * kept[..., None]
            for x, position, kept in zip(vectors, (table(count) for table, count in places), real, strict=True)
        ]
        early, layers, stack = (cast("Iterable[nn.ModuleList]", p) for p in (self.early, self.own_layers, self.stack))
        for units in early:
            states = exchange(units, states, streams, view)
        for blocks, units in zip_longest(layers, stack):
            states = [
                block(x, x, mask, kept) if len(x) else x
                for block, x, mask, kept in zip(blocks, states, own, real, strict=True)
            ]
            if units is not None:
                states = exchange(units, states, streams, view)
        return streams, [norm(x) for norm, x in zip(self.own_norms, states, strict=True)]

    def _corrupt(
        self, items: Int[Tensor, "batch length"], replaced: Bool[Tensor, "batch length"], generator: torch.Generator
    ) -> Int[Tensor, "batch length"]:
        """The histories with the events to be replaced drawn anew, uniformly from the items of their domain."""
        domain = self.item_domain[items].clamp(min=0)
        size = self.pool_size[domain]
        draw = torch.rand(items.shape, generator=generator, device=items.device, dtype=torch.float64)
        return torch.where(replaced, self.pool[self.pool_start[domain] + (draw * size).long()], items)


class GraphEmbedding(nn.Module):
    """A table of item vectors, and its mean with the tables that `num_layers` steps along a graph make of it.

    A step replaces an item's vector by the mean over its successors, zeros where it has none. The graph is no part
    of the checkpoint; until it is filled it has no edges.
    """

    successors: Tensor
    offsets: Tensor

    def __init__(self, num_items: int, d_model: int, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.items = ItemEmbedding(num_items, d_model)
        self.register_buffer("successors", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("offsets", torch.zeros(num_items + 2, dtype=torch.int64), persistent=False)

    def fill(self, before: Int[Tensor, " pairs"], after: Int[Tensor, " pairs"]) -> None:
        """Takes an edge for every pair, however often it comes."""
        item, successor = torch.unique(torch.stack([before, after]), dim=1)  # sorted by item
        degree = torch.bincount(item, minlength=len(self.offsets) - 1)
        self.successors = successor
        self.offsets = F.pad(degree.cumsum(0), (1, 0))

    def forward(self) -> Float[Tensor, "items d_model"]:
        step: Tensor = self.items.weight
        total = step
        for _ in range(self.num_layers):
            # A bag per item: the mean over its successors without a matrix, and its gradient likewise.
            step = F.embedding_bag(self.successors, step, self.offsets, mode="mean", include_last_offset=True)
            total = total + step
        return total / (1 + self.num_layers)


class Discriminator(nn.Module):
    """The logit a^T B b of one pair per row."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, d_model))

    def forward(self, a: Float[Tensor, "rows d_model"], b: Float[Tensor, "rows d_model"]) -> Float[Tensor, " rows"]:
        return (a @ self.weight * b).sum(dim=-1)


def _transitions(
    items: Int[Tensor, " events"], sequence: Int[Tensor, " events"]
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Items next to each other in a sequence; `sequence` tells which one an event is of, events being in order."""
    order = sequence.argsort(stable=True)
    items, sequence = items[order], sequence[order]
    together = sequence[1:] == sequence[:-1]
    return items[:-1][together], items[1:][together]


def _mean(
    states: Float[Tensor, "rows length d_model"], chosen: Bool[Tensor, "rows length"]
) -> Float[Tensor, "rows d_model"]:
    """Over the chosen positions of each row, of which there is at least one."""
    return (states * chosen[..., None]).sum(dim=1) / chosen.sum(dim=1, keepdim=True)
