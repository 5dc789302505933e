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
from recsys.models.exchange import check_cross, exchange, look, make_units
from recsys.models.initialization import initialize
from recsys.models.streams import cut_streams
from recsys.types import Batch, Catalog


class CrossDomainConfig(Config):
    name: Literal["cross_domain"] = "cross_domain"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_item: Annotated[int, Field(ge=1)] | None = None
    """Width of the item vectors (and of all that is added to them), mapped to d_model and back for the scores, so that
    the states can widen while the item table stays; null: as wide as the states."""
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
        check_cross(self.cross, self.d_model, self.num_layers)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "CrossDomain":
        return CrossDomain(self, catalog.num_items, catalog.num_domains, max_len, generator)


class WidthMap(nn.Linear):
    """A linear map without bias, so that zeros stay zeros, which starts by keeping the scale of what it maps."""

    def __init__(self, d_in: int, d_out: int, generator: torch.Generator | None) -> None:
        super().__init__(d_in, d_out, bias=False)
        nn.init.normal_(self.weight, std=d_in**-0.5, generator=generator)


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
        self.max_len = max_len
        self.num_domains = num_domains
        width = config.d_item or config.d_model
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=max_len + 1,
            num_domains=num_domains,
            d_model=width,
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
        mapped = config.d_item is not None
        self.widen = WidthMap(width, config.d_model, generator) if mapped else nn.Identity()
        self.narrow = WidthMap(config.d_model, width, generator) if mapped else nn.Identity()

        self.early, self.stack = make_units(config.cross, num_domains, config.d_model, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        streams = cut_streams(batch, self.num_domains)
        real = streams.split(streams.real)
        own = [causal_mask(event) for event in streams.split(streams.event)]
        view = look(batch, streams, self.early or self.stack)

        embedded = self.embedding(streams.item, streams.count, streams.domain, streams.real)
        states = streams.split(self.widen(embedded))
        early, layers, stack = (cast("Iterable[nn.ModuleList]", part) for part in (self.early, self.layers, self.stack))
        for units in early:
            states = exchange(units, states, streams, view)
        for blocks, units in zip_longest(layers, stack):
            states = [
                block(x, x, mask, kept) if len(x) else x
                for block, x, mask, kept in zip(blocks, states, own, real, strict=True)
            ]
            if units is not None:
                states = exchange(units, states, streams, view)
        normed = [norm(x) for norm, x in zip(self.norms, states, strict=True)]
        return self.narrow(streams.gather(normed, streams.question_slot))

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight
