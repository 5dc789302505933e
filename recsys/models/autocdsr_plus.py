"""AutoCDSR+ (Ju et al., KDD 2025): an encoder per domain; what crosses between them goes through a few tokens."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import CrossConfig, check_heads
from recsys.models.embeddings import HistoryEmbedding, check_length
from recsys.models.encoders import Activation, EncoderBlock
from recsys.models.exchange import check_cross, exchange, look, make_units
from recsys.models.initialization import initialize
from recsys.models.streams import Streams, cut_streams
from recsys.types import Batch, Catalog, Objective


class AutoCDSRPlusConfig(Config):
    name: Literal["autocdsr_plus"] = "autocdsr_plus"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=2)] = 3
    """Blocks per domain. The tokens carry to a block what they read in the one before: one alone has no transfer."""
    num_heads: Annotated[int, Field(ge=1)] = 2
    num_bottlenecks: Annotated[int, Field(ge=1)] = 4
    """Tokens between the domains. There are as many at every event, so time grows with them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    activation: Activation = "gelu"
    norm_first: bool = True
    """LayerNorm before each map of a block (pre-norm) rather than after each sum (post-norm)."""
    attention_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the attention to the tokens; under `balance: {name: pareto}` it matters only to `sectors`."""
    cross: CrossConfig | None = None
    """The exchange between the domains beside the tokens; null: AutoCDSR+ as published, which has none."""

    @model_validator(mode="after")
    def _check(self) -> "AutoCDSRPlusConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, self.num_layers)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "AutoCDSRPlus":
        return AutoCDSRPlus(self, catalog.num_items, catalog.num_domains, max_len, generator)


class AutoCDSRPlus(nn.Module):
    """hidden[b, t] is the state of the domain that t asks for as of t (see `Streams`); zeros where nothing is asked.

    The encoder of domain k runs over k's states and `num_bottlenecks` information-bottleneck tokens, which start as
    learned vectors and after each block are averaged over the domains. A state attends to k's events up to it and to
    the tokens, so all it learns of other domains has gone through those. As a second objective in training

        l_cd = mean over domains, blocks, heads and events of the attention that an event pays to the tokens

    which `balance: {name: pareto}` in the experiment weighs against the run's loss.

    The paper has one set of tokens per sequence and predicts at its end. Here every position is a question and must
    not know what follows, so each has a set of its own, which reads k's events up to that position and is read there
    alone; the average is over the domains that the user has shown by then. At the last position that is the paper's
    token. This, and where the average is taken, are a reconstruction from short descriptions of the paper.

    With an exchange (not part of AutoCDSR+) each domain's states also query the other domains' states, between
    embedding and encoders (`early`) or after blocks (`stack`), as in `CrossDomain`.
    """

    def __init__(
        self,
        config: AutoCDSRPlusConfig,
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
            num_positions=max_len + 1,
            num_domains=None,
            d_model=config.d_model,
            dropout=config.dropout,
        )
        self.bottlenecks = nn.Embedding(config.num_bottlenecks, config.d_model)
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
        self.early, self.stack = make_units(config.cross, num_domains, config.d_model, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        return self._encode(batch, None)

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        shares: list[Tensor] = []
        hidden = self._encode(batch, shares)
        term = torch.stack([hidden.new_zeros(()), *shares]).sum() / (len(self.layers) * batch.mask.sum()).clamp(min=1)
        return Objective(batch, ((1.0, hidden),), {"cross_attention": self.attention_weight * term})

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight

    def _encode(self, batch: Batch, shares: list[Tensor] | None) -> Float[Tensor, "batch length d_model"]:
        """`shares` takes each block's attention to the tokens, summed over events."""
        check_length(batch, self.max_len)
        streams = cut_streams(batch, self.num_domains)
        users, event = streams.users(), streams.split(streams.event)
        view = look(batch, streams, self.early or self.stack)
        count = self.bottlenecks.num_embeddings
        masks = [self._mask(batch, streams, domain) for domain in range(self.num_domains)]
        at_tokens = batch.mask.repeat_interleave(count, dim=1)
        kept = zip(users, streams.split(streams.real), strict=True)
        real = [torch.cat([at_tokens[rows], states], dim=1) for rows, states in kept]
        shown = [
            ((batch.domains == domain).cumsum(dim=1) > 0).repeat_interleave(count, dim=1)[..., None]
            for domain in range(self.num_domains)
        ]
        readers = torch.stack(shown).sum(dim=0).clamp(min=1)

        states = streams.split(self.embedding(streams.item, streams.count, streams.domain, streams.real))
        tokens = self.bottlenecks.weight.repeat(batch.items.shape[1], 1).expand(len(batch.items), -1, -1)
        early, layers, stack = (cast("Iterable[nn.ModuleList]", part) for part in (self.early, self.layers, self.stack))
        for units in early:
            states = exchange(units, states, streams, view)
        for blocks, units in zip_longest(layers, stack):
            read = torch.zeros_like(tokens)
            after = []
            for domain, block in enumerate(blocks):
                rows, x = users[domain], states[domain]
                if len(x):
                    whole = torch.cat([tokens[rows], x], dim=1)
                    if shares is not None:
                        block = cast("EncoderBlock", block)
                        shares.append(_to_tokens(block, whole, masks[domain], tokens.shape[1])[event[domain]].sum())
                    whole = block(whole, whole, masks[domain], real[domain])
                    seen, x = whole.split([tokens.shape[1], x.shape[1]], dim=1)
                    read = read.index_add(0, rows, seen * shown[domain][rows])
                after.append(x)
            states, tokens = after, read / readers
            if units is not None:
                states = exchange(units, states, streams, view)
        return streams.gather([norm(x) for norm, x in zip(self.norms, states, strict=True)], streams.question_slot)

    def _mask(self, batch: Batch, streams: Streams, domain: int) -> Bool[Tensor, "rows length length"]:
        """What tokens and states of a domain may attend to: its events so far, and the tokens of their position."""
        position, event = (streams.split(values)[domain] for values in (streams.position, streams.event))
        steps = torch.arange(batch.items.shape[1], device=position.device)
        steps = steps.repeat_interleave(self.bottlenecks.num_embeddings).expand(len(position), -1)
        when = torch.cat([steps, position], dim=1)
        same = steps[:, None, :] == when[:, :, None]
        before = (position[:, None, :] <= when[:, :, None]) & event[:, None, :]
        return torch.cat([same, before], dim=2)


def _to_tokens(
    block: EncoderBlock,
    x: Float[Tensor, "rows length d_model"],
    mask: Bool[Tensor, "rows length length"],
    num_tokens: int,
) -> Float[Tensor, "rows states"]:
    """Share of the states' attention that falls on the tokens, which come first."""
    token = (torch.arange(x.shape[1], device=x.device) < num_tokens).to(x.dtype)
    return block.shares(x, mask, token[None, :, None].expand(len(x), -1, 1))[:, num_tokens:, 0]
