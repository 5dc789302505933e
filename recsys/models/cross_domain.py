"""One encoder per domain on the user's events in that domain, with or without an exchange between them."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import CrossConfig, check_heads
from recsys.models.embeddings import HistoryEmbedding, check_length
from recsys.models.encoders import Activation, EncoderBlock, causal_mask
from recsys.models.initialization import initialize
from recsys.models.streams import Streams, cut_streams
from recsys.types import Batch, Catalog


class CrossDomainConfig(Config):
    name: Literal["cross_domain"] = "cross_domain"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Encoder blocks per domain."""
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    activation: Activation = "gelu"
    norm_first: bool = True
    """LayerNorm before each map of a block (pre-norm) rather than after each sum (post-norm)."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: none at all, the baseline of every treatment."""

    @model_validator(mode="after")
    def _check(self) -> "CrossDomainConfig":
        check_heads(self.d_model, self.num_heads)
        if self.cross is not None:
            check_heads(self.d_model, self.cross.num_heads, key="cross.num_heads")
            if self.cross.placement == "stack" and self.cross.num_units > self.num_layers:
                raise ValueError(
                    f"cross.num_units is {self.cross.num_units}, but placement `stack` puts one unit after each of "
                    f"the first encoder blocks and there are only num_layers = {self.num_layers}; lower "
                    "cross.num_units, raise num_layers, or use placement `early`"
                )
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "CrossDomain":
        return CrossDomain(self, catalog.num_items, catalog.num_domains, max_len, generator)


class CrossDomain(nn.Module):
    """hidden[b, t] is the state of the domain that t asks for as of t; zeros where nothing is asked.

    A state of domain k starts as the embedding of k's latest item at or before t (see `Streams`) plus vectors for
    the number of k's events so far and for k itself. The encoder of k attends to k's events at or before t. Only the
    exchange lets domain k's states see anything of the other domains: it attends to the states of their events that
    come at or before t in the merged history and are no later in time. Each domain has a unit of its own, and all
    domains change together, from the states before.

    Units are named `early.<unit>.<domain>` and `stack.<unit>.<domain>`, the domain being the one that asks. The
    weights outside them start the same, for the same generator, whether or not there is an exchange.
    """

    def __init__(
        self,
        config: CrossDomainConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        cross = config.cross
        if cross is not None and num_domains < 2:
            raise ValueError("an exchange needs at least two domains and the data has one; set `cross: null`")
        self.max_len = max_len
        self.num_domains = num_domains
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=max_len + 1,
            num_domains=num_domains,
            d_model=config.d_model,
            dropout=config.dropout,
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(
                EncoderBlock(
                    d_model=config.d_model,
                    d_ff=config.d_ff,
                    num_heads=config.num_heads,
                    dropout=config.dropout,
                    activation=config.activation,
                    norm_first=config.norm_first,
                )
                for _ in range(num_domains)
            )
            for _ in range(config.num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(num_domains))
        initialize(self, generator)

        # Built and drawn last, so that all that stands above starts the same without them.
        self.early = nn.ModuleList()
        self.stack = nn.ModuleList()
        if cross is not None:
            units = self.early if cross.placement == "early" else self.stack
            for _ in range(cross.num_units):
                units.append(nn.ModuleList(cross.build(config.d_model) for _ in range(num_domains)))
            initialize(units, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        streams = cut_streams(batch, self.num_domains)
        real = streams.split(streams.real)
        own = [causal_mask(event) for event in streams.split(streams.event)]
        others = _other_events(batch, streams) if self.early or self.stack else []

        states = streams.split(self.embedding(streams.item, streams.count, streams.domain, streams.real))
        early, layers, stack = (cast("Iterable[nn.ModuleList]", part) for part in (self.early, self.layers, self.stack))
        for units in early:
            states = self._exchange(units, states, streams, others)
        for blocks, units in zip_longest(layers, stack):
            states = [
                block(x, x, mask, kept) if len(x) else x
                for block, x, mask, kept in zip(blocks, states, own, real, strict=True)
            ]
            if units is not None:
                states = self._exchange(units, states, streams, others)
        return streams.gather([norm(x) for norm, x in zip(self.norms, states, strict=True)], streams.question_slot)

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight

    def _exchange(
        self, units: nn.ModuleList, states: list[Tensor], streams: Streams, others: list[Tensor]
    ) -> list[Tensor]:
        """Every domain's states after its unit, all from the states before."""
        merged = streams.gather(states, streams.event_slot)
        return [
            unit(x, merged[users], mask) if len(x) else x
            for unit, x, users, mask in zip(units, states, streams.users(), others, strict=True)
        ]


def _other_events(batch: Batch, streams: Streams) -> list[Tensor]:
    """Per domain `rows length context`: True where a slot may attend to an event of the merged history.

    Those of another domain, at or before the slot in the history, and no later in time. The order of the history
    settles ties in time: what stands after the slot is not seen.
    """
    steps = torch.arange(batch.items.shape[1], device=batch.items.device)
    masks = []
    blocks = zip(streams.users(), streams.split(streams.position), streams.split(streams.real), strict=True)
    for domain, (users, position, real) in enumerate(blocks):
        times = batch.times[users]
        now = times.gather(1, position)
        other = (batch.mask & (batch.domains != domain))[users]
        before = (steps <= position[..., None]) & (times[:, None, :] <= now[..., None])
        masks.append(before & other[:, None, :] & real[..., None])
    return masks
