"""SASRec (Kang & McAuley, 2018): one causal transformer over the merged history of all domains."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import check_heads
from recsys.models.embeddings import HistoryEmbedding, asked_vectors, check_length, event_positions
from recsys.models.encoders import Activation, EncoderBlock, causal_mask
from recsys.models.initialization import initialize
from recsys.types import Batch, Catalog


class SASRecConfig(Config):
    name: Literal["sasrec"] = "sasrec"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 2
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    activation: Activation = "gelu"
    norm_first: bool = True
    """LayerNorm before each map of a block (pre-norm) rather than after each sum (post-norm)."""
    domain_embedding: bool = True
    """Add a vector of the event's domain to its embedding."""
    target_query: Literal["none", "domain"] = "none"
    """`domain`: a learned vector of the domain asked for joins what the last block asks with."""

    @model_validator(mode="after")
    def _check(self) -> "SASRecConfig":
        check_heads(self.d_model, self.num_heads)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "SASRec":
        return SASRec(self, catalog.num_items, catalog.num_domains, max_len, generator)


class SASRec(nn.Module):
    """The state at t sums up all events up to t; with `target_query: domain` it also knows which domain is asked.

    The question enters the queries and the residual of the last block, never keys or values: position t learns
    `target_domains[t]` and nothing of the questions at other positions, and the last block's attention and
    feed-forward map can still answer it (a vector added after them would only be a bias per item).
    """

    def __init__(
        self,
        config: SASRecConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_len = max_len
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=max_len,
            num_domains=num_domains if config.domain_embedding else None,
            d_model=config.d_model,
            dropout=config.dropout,
        )
        self.question = nn.Embedding(num_domains, config.d_model) if config.target_query == "domain" else None
        self.blocks = nn.ModuleList(
            EncoderBlock(
                d_model=config.d_model,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                dropout=config.dropout,
                activation=config.activation,
                norm_first=config.norm_first,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        initialize(self, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        real = batch.mask
        mask = causal_mask(real)
        x = self.embedding(batch.items, event_positions(real), batch.domains, real)
        *body, last = self.blocks
        for block in body:
            x = block(x, x, mask, real)
        x = last(x if self.question is None else x + asked_vectors(self.question, batch), x, mask, real)
        return self.norm(x).mul_(real[..., None])

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight
