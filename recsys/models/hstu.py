"""HSTU (Zhai et al., ICML 2024): attention without softmax, gated coordinate by coordinate, on the merged history."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import check_heads
from recsys.models.dropout import Dropout
from recsys.models.embeddings import HistoryEmbedding, asked_vectors, check_length
from recsys.models.encoders import causal_mask
from recsys.models.initialization import initialize
from recsys.types import Batch, Catalog

NUM_BUCKETS = 63
"""Of a time difference: bucket k holds 2^k to 2^(k+1) - 1, bucket 0 the difference 0 too; as many as int64 has."""


class HSTUConfig(Config):
    name: Literal["hstu"] = "hstu"
    d_model: Annotated[int, Field(ge=1)] = 64
    num_layers: Annotated[int, Field(ge=1)] = 2
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gate: bool = True
    """The elementwise gate U of each block; false leaves U and its weights out."""
    domain_embedding: bool = True
    """Add a vector of the event's domain to its embedding."""
    target_query: Literal["none", "domain"] = "none"
    """`domain`: a learned vector of the domain asked for joins what the last block asks with."""

    @model_validator(mode="after")
    def _check(self) -> "HSTUConfig":
        check_heads(self.d_model, self.num_heads)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "HSTU":
        return HSTU(self, catalog.num_items, catalog.num_domains, max_len, generator)


class HSTU(nn.Module):
    """The state at t sums up all events up to t, with how long before t each of them was. The blocks are the paper's:

        U, V, Q, K = split(SiLU(W LN(x)))
        A[t, s] = SiLU(Q_t · K_s + p[t - s] + w[bucket(time_t - time_s)]) / n   for s <= t, else 0
        y = x + W_o(U * LN(A V))

    What the equations leave open is a reconstruction: V, Q, K and U are all as wide as x; heads split Q, K and V, while
    U and the second LN act on all heads side by side; p and w are one number per layer, shared by the heads; n is
    `max_len`, the same for any history; buckets are floor(log2(max(1, difference))) in the unit of `Batch.times`,
    seconds, or ranks in data that have only an order; a difference is taken from the event at t, not from the event
    asked for, whose time nobody knows; item vectors enter with no absolute position, since p and w are all the paper
    gives for order; dropout acts on what is added to x; and a last LN, as in SASRec, takes the place of the unit
    length that the paper's experiments give to states and items.

    As in SASRec, the question of `target_query: domain` (not in the paper) enters the queries, gates and residual of
    the last block, never keys or values.
    """

    boundaries: Tensor

    def __init__(
        self,
        config: HSTUConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_len = max_len
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=None,
            num_domains=num_domains if config.domain_embedding else None,
            d_model=config.d_model,
            dropout=config.dropout,
        )
        self.question = nn.Embedding(num_domains, config.d_model) if config.target_query == "domain" else None
        self.blocks = nn.ModuleList(
            HSTUBlock(
                d_model=config.d_model,
                num_heads=config.num_heads,
                max_len=max_len,
                dropout=config.dropout,
                gate=config.gate,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.register_buffer("boundaries", 2 ** torch.arange(1, NUM_BUCKETS), persistent=False)
        initialize(self, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        real = batch.mask
        mask = causal_mask(real)
        steps = torch.arange(real.shape[1], device=real.device)
        distance = (steps[:, None] - steps).clamp(min=0)  # the clamps are for the future, which is masked
        times = batch.times.long()
        bucket = torch.bucketize((times[:, :, None] - times[:, None]).clamp(min=0), self.boundaries, right=True)
        x = self.embedding(batch.items, None, batch.domains, real)
        *body, last = self.blocks
        for block in body:
            x = block(x, x, mask, distance, bucket, real)
        asking = x if self.question is None else x + asked_vectors(self.question, batch)
        return self.norm(last(asking, x, mask, distance, bucket, real)) * real[..., None]

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight


class HSTUBlock(nn.Module):
    """One block; W is two maps here, for what asks (Q, U) and for what is asked (K, V)."""

    def __init__(self, *, d_model: int, num_heads: int, max_len: int, dropout: float, gate: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_len = max_len
        self.norm = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model) if gate else None
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.distance_bias = nn.Embedding(max_len, 1)
        self.time_bias = nn.Embedding(NUM_BUCKETS, 1)
        self.attended_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch length d_model"],
        mask: Bool[Tensor, "batch length length"],
        distance: Int[Tensor, "length length"],
        bucket: Int[Tensor, "batch length length"],
        real: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length d_model"]:
        """`query` asks and is carried on; `context` gives keys and values, and is usually the same tensor.

        `mask[b, t, s]` is True where t may attend to s; `real` is False at padding.
        """
        asking = self.norm(query)
        asked = asking if context is query else self.norm(context)
        q = self._split(F.silu(self.query(asking)))
        k, v = (self._split(part) for part in F.silu(self.key_value(asked)).chunk(2, dim=-1))
        bias = self.distance_bias(distance)[..., 0] + self.time_bias(bucket)[..., 0]
        weights = F.silu(q @ k.transpose(2, 3) + bias[:, None]) * mask[:, None] / self.max_len
        attended = self.attended_norm((weights @ v).transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended = F.silu(self.gate(asking)) * attended
        return (query + self.dropout(self.output(attended))) * real[..., None]

    def _split(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length width"]:
        return x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads)).transpose(1, 2)
