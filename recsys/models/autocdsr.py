"""AutoCDSR (Ju et al., KDD 2025): self-attention that looks across domains only where it pays."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import CrossConfig, check_heads
from recsys.models.embeddings import HistoryEmbedding, check_length, event_positions
from recsys.models.encoders import Activation, EncoderBlock, causal_mask
from recsys.models.exchange import View, check_cross, exchange, look, make_units
from recsys.models.initialization import initialize
from recsys.models.streams import Streams, cut_streams
from recsys.types import Batch, Catalog, Objective


class AutoCDSRConfig(Config):
    name: Literal["autocdsr"] = "autocdsr"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 2
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    activation: Activation = "gelu"
    norm_first: bool = True
    """LayerNorm before each map of a block (pre-norm) rather than after each sum (post-norm)."""
    attention_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-domain attention; under `balance: {name: pareto}` it matters only to `sectors`."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: AutoCDSR as published, which has none."""

    @model_validator(mode="after")
    def _check(self) -> "AutoCDSRConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, self.num_layers)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "AutoCDSR":
        return AutoCDSR(self, catalog.num_items, catalog.num_domains, max_len, generator)


class AutoCDSR(nn.Module):
    """A causal transformer over item + position vectors, as plain as SASRec, with a second objective in training:

        l_cd = mean over blocks, heads and events i of  sum_j softmax(A)_ij [domain(i) != domain(j)]

    the share of its attention that an event pays to events of other domains. The paper adds where this takes the
    mean, which lies in [0, 1] whatever the length of a history. Its point is how l_cd is weighed against the run's
    loss: `balance: {name: pareto}` in the experiment; without it the two are added, l_cd times `attention_weight`.
    The paper scores by cosine; here the loss and its temperature are the run's.

    With an exchange (not part of AutoCDSR, which has no streams of domains) the states at the events of a domain are
    that domain's stream: each queries the states at other domains' events so far, between embedding and encoder
    (`early`) or after blocks (`stack`). l_cd is of the encoder's own attention and leaves that of the units out.
    """

    def __init__(
        self,
        config: AutoCDSRConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_len = max_len
        self.num_domains = num_domains
        self.attention_weight = config.attention_weight
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=max_len,
            num_domains=None,
            d_model=config.d_model,
            dropout=config.dropout,
        )
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
        self.early, self.stack = make_units(config.cross, num_domains, config.d_model, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        return self._encode(batch)[0]

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        hidden, inputs = self._encode(batch)
        mask = causal_mask(batch.mask)
        blocks = zip(self.blocks, inputs, strict=True)
        across = [self._across(cast("EncoderBlock", block), x, mask, batch) for block, x in blocks]
        return Objective(
            batch, ((1.0, hidden),), {"cross_attention": self.attention_weight * torch.stack(across).mean()}
        )

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight

    def _encode(self, batch: Batch) -> tuple[Float[Tensor, "batch length d_model"], list[Tensor]]:
        """The states, and what entered each block."""
        check_length(batch, self.max_len)
        real = batch.mask
        mask = causal_mask(real)
        early, blocks, stack = (cast("Iterable[nn.Module]", part) for part in (self.early, self.blocks, self.stack))
        streams, view = None, None
        if self.early or self.stack:
            streams = cut_streams(batch, self.num_domains, question_slots=False)
            view = look(batch, streams, self.early or self.stack)

        x = self.embedding(batch.items, event_positions(real), batch.domains, real)
        for units in early:
            x = _exchange(units, x, streams, view)
        inputs = []
        for block, units in zip_longest(blocks, stack):
            inputs.append(x)
            x = block(x, x, mask, real)
            if units is not None:
                x = _exchange(units, x, streams, view)
        return self.norm(x) * real[..., None], inputs

    def _across(
        self,
        block: EncoderBlock,
        x: Float[Tensor, "batch length d_model"],
        mask: Bool[Tensor, "batch length length"],
        batch: Batch,
    ) -> Float[Tensor, ""]:
        """Share of a block's attention that goes from one domain to another, over all events; 0 without any."""
        domains = batch.domains.clamp(min=0)
        shares = block.shares(x, mask, F.one_hot(domains, self.num_domains).to(x.dtype))
        across = 1 - shares.gather(2, domains[..., None])[..., 0]
        return across.masked_fill(~batch.mask, 0).sum() / batch.mask.sum().clamp(min=1)


def _exchange(
    units: nn.Module, x: Float[Tensor, "batch length d_model"], streams: Streams | None, view: View | None
) -> Float[Tensor, "batch length d_model"]:
    """The exchange on merged states, each in the stream of its event's domain."""
    assert streams is not None
    assert isinstance(units, nn.ModuleList)
    states = streams.split(x[streams.row, streams.position] * streams.real[:, None])
    return streams.gather(exchange(units, states, streams, view), streams.event_slot)
