"""BERT4Rec (Sun et al., CIKM 2019): a transformer that looks both ways, trained to fill in masked events."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import check_heads
from recsys.models.embeddings import HistoryEmbedding, ItemEmbedding, check_length, event_positions
from recsys.models.encoders import EncoderBlock
from recsys.models.initialization import initialize
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, Objective


class BERT4RecConfig(Config):
    name: Literal["bert4rec"] = "bert4rec"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 2
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a training row's events that are masked (published as rho), rounded, at least one event."""
    last_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the training rows in which the last event alone is masked, as it will be when the model is asked."""
    domain_embedding: bool = True
    """Add a vector of the event's domain to its embedding; a masked event's domain is masked with it."""
    target_query: Literal["none", "domain"] = "none"
    """`domain`: the mask tells which domain is asked for, by a vector of its own for each."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Spread of maps and tables at the start; 0.02 is published. Nearer to 1 / sqrt(d_model) the model learns sooner
    which events stand beside a mask."""

    @model_validator(mode="after")
    def _check(self) -> "BERT4RecConfig":
        check_heads(self.d_model, self.num_heads)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "BERT4Rec":
        return BERT4Rec(self, catalog.num_items, catalog.num_domains, max_len, generator)


class BERT4Rec(nn.Module):
    """Post-norm blocks on item + position vectors, every event seeing every other; where an event is masked,

        scores = GELU(h W + b) E^T + b_item        E the item vectors that events enter with.

    The bias per item is part of the dot product: `item_embeddings` is [E; b_item] and states end in a 1, so that both
    are one wider than `d_model`.

    `forward` answers the question at t from the events up to t followed by a mask, whatever else the row holds: a
    sequence of its own for each question, which in evaluation is one per row. Where nothing is asked it gives zeros.
    Sequences may be one longer than `max_len`, for the mask.

    `objective` is the cloze task: the events of a training row, the last target among them (a training event like the
    others, which is why targets are read here and nowhere else), some of them masked at random. The states are those
    of the masks, and masked events are the questions. A state there has seen events before and after it, so it says
    nothing of how well the next event is predicted.
    """

    def __init__(
        self,
        config: BERT4RecConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d_model = config.d_model
        self.max_len = max_len
        self.mask_share = config.mask_share
        self.last_share = config.last_share
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=max_len + 1,
            num_domains=num_domains if config.domain_embedding else None,
            d_model=d_model,
            dropout=config.dropout,
        )
        self.tells_domain = config.target_query == "domain"
        self.masks = nn.Embedding(num_domains if self.tells_domain else 1, d_model)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                d_model=d_model,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                dropout=config.dropout,
                activation="gelu",
                norm_first=False,
            )
            for _ in range(config.num_layers)
        )
        self.projection = nn.Linear(d_model, d_model)
        self.item_bias = ItemEmbedding(num_items, 1)
        initialize(self, generator, config.init_std)
        nn.init.zeros_(self.item_bias.weight)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        row, last = (batch.mask & (batch.target_domains != NO_DOMAIN)).nonzero(as_tuple=True)
        length = batch.items.shape[1]
        place = last[:, None] - torch.arange(length - 1, -1, -1, device=last.device)
        items = batch.items[row[:, None], place.clamp(min=0)].masked_fill(place < 0, PAD_ID)
        domains = batch.domains[row[:, None], place.clamp(min=0)]
        asked = batch.target_domains[row, last][:, None]
        masked = F.pad(torch.zeros_like(items, dtype=torch.bool), (0, 1), value=True)
        states = self._fill_in(F.pad(items, (0, 1), value=PAD_ID), torch.cat([domains, asked], dim=1), masked)[:, -1]
        return states.new_zeros(*batch.items.shape, states.shape[1]).index_put((row, last), states)

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        check_length(batch, self.max_len)
        items = torch.cat([batch.items, batch.targets[:, -1:]], dim=1)
        domains = torch.cat([batch.domains, batch.target_domains[:, -1:]], dim=1)
        masked = self._draw_masks(items != PAD_ID, generator)
        seen = items.masked_fill(masked, PAD_ID)
        questions = Batch(
            user=batch.user,
            items=seen,
            domains=domains.masked_fill(masked, NO_DOMAIN),
            times=F.pad(batch.times, (0, 1)),  # a target's time is not known; nothing reads it
            targets=items.masked_fill(~masked, PAD_ID),
            target_domains=domains.masked_fill(~masked, NO_DOMAIN),
        )
        return Objective(questions, ((1.0, self._fill_in(seen, domains, masked)),), {})

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return torch.cat([self.embedding.items.weight, self.item_bias.weight], dim=1)

    def _draw_masks(
        self, real: Bool[Tensor, "batch length"], generator: torch.Generator
    ) -> Bool[Tensor, "batch length"]:
        count = real.sum(dim=1, keepdim=True)
        order = torch.rand(real.shape, device=real.device, generator=generator).masked_fill(~real, 2)
        masked = order.argsort(dim=1).argsort(dim=1) < (self.mask_share * count).round().clamp(min=1)
        last = real.cumsum(dim=1) == count
        only_last = torch.rand(len(real), 1, device=real.device, generator=generator) < self.last_share
        return torch.where(only_last, last, masked) & real

    def _fill_in(
        self,
        items: Int[Tensor, "batch length"],
        domains: Int[Tensor, "batch length"],
        masked: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length answer"]:
        """The states of the masks, zeros elsewhere. Where `masked`, `items` is padding and `domains` what is asked."""
        events = items != PAD_ID
        real = events | masked
        positions = event_positions(real)
        x = self.embedding(items, positions, domains, events)
        masks = self.masks(domains.clamp(min=0).long() if self.tells_domain else torch.zeros_like(positions))
        assert self.embedding.positions is not None
        asking = self.embedding.dropout(masks + self.embedding.positions(positions))
        x = torch.where(masked[..., None], asking, x)
        mask = real[:, None].expand(-1, real.shape[1], -1)
        for block in self.blocks:
            x = block(x, x, mask, real)
        states = F.gelu(self.projection(x))
        return torch.cat([states, torch.ones_like(states[..., :1])], dim=-1) * masked[..., None]
