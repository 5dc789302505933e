"""ABXI (Bian et al., WWW 2025): one encoder for all streams, low-rank maps that tell them apart."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys.loading import Config
from recsys.models.attention import CrossConfig, MultiHeadAttention, check_heads
from recsys.models.dropout import Dropout
from recsys.models.embeddings import HistoryEmbedding, ItemEmbedding, check_length
from recsys.models.encoders import causal_mask
from recsys.models.exchange import View, check_cross, exchange, look, make_units
from recsys.models.initialization import STD
from recsys.models.lines import line_lengths, sort_lines
from recsys.models.streams import Streams, cut_streams
from recsys.products import product
from recsys.sizes import places
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog


class ABXIConfig(Config):
    """The defaults are the published ones for Food–Kitchen."""

    name: Literal["abxi"] = "abxi"
    d_model: Annotated[int, Field(ge=1)] = 256
    d_ff: Annotated[int, Field(ge=1)] = 680
    num_heads: Annotated[int, Field(ge=1)] = 2
    domain_rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the map that sets a stream apart in the shared encoder (published as rd)."""
    invariant_rank: Annotated[int, Field(ge=1)] = 64
    """Rank of the map that fits the invariant interest to a domain (published as ri)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    positions: Literal["from_end", "from_start"] = "from_end"
    """Positions count from the newest event of a stream, as published, or from its first. From the end, a state in
    the middle of a training row knows how many events follow, though not which."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: ABXI as published, which has none."""

    @model_validator(mode="after")
    def _check(self) -> "ABXIConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, num_layers=1)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "ABXI":
        return ABXI(self, catalog.num_items, catalog.num_domains, max_len, generator)


class ABXI(nn.Module):
    """Streams s: x, the merged history, and one per domain. For the events of each (Drop is dropout)

        E_s = Drop(item + position)
        H_s = LN(E_s + Drop(MHA(E_s)))                       MHA causal; it, its LN and FFN shared by all streams
        H_s = LN_s(H_s + Drop(FFN(H_s)) + Drop(dLoRA_s(H_s)))

    and where domain k is asked for at t, with the state of x at t and that of k at its latest event up to t,

        hidden = LN_k1(H_x + Drop(FFN_i(H_x)) + Drop(iLoRA_k(H_x))) + LN_k2(H_k + Drop(FFN_k(H_k)))

    That pairing is the paper's task-guided alignment. H_k is 0 where k has no event yet. Every FFN is
    W3(silu(W2 h) * W1 h) without biases. Written from the equations for two domains; nothing in them is particular
    to two.

    Padding is no key here, where the released code lets it be one: there a row of zeros has the key and value of the
    projections' biases, and draws attention according to how much padding there is.

    With an exchange (not part of ABXI) each domain's states query the other domains' states between embedding and
    encoder (`early`) or after the encoder (`stack`); a question then has a state of its own, as in `CrossDomain`,
    which knows what the other domains show up to t.
    """

    packs_events = True

    def __init__(
        self,
        config: ABXIConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d_model, d_ff = config.d_model, config.d_ff
        self.max_len = max_len
        self.num_domains = num_domains
        self.from_end = config.positions == "from_end"
        self.embedding = HistoryEmbedding(
            num_items=num_items, num_positions=max_len + 1, num_domains=None, d_model=d_model, dropout=config.dropout
        )
        self.attention = MultiHeadAttention(d_model, config.num_heads)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = SwiGLU(d_model, d_ff)
        self.stream_maps = nn.ModuleList(LowRank(d_model, config.domain_rank) for _ in range(1 + num_domains))
        self.stream_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(1 + num_domains))
        self.invariant = SwiGLU(d_model, d_ff)
        self.invariant_maps = nn.ModuleList(LowRank(d_model, config.invariant_rank) for _ in range(num_domains))
        self.invariant_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_domains))
        self.own = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(num_domains))
        self.own_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_domains))
        self.dropout = Dropout(config.dropout)
        _initialize_as_published(self, generator)
        self.early, self.stack = make_units(config.cross, num_domains, d_model, generator)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        early, stack = (cast("Iterable[nn.ModuleList]", units) for units in (self.early, self.stack))
        crosses = bool(self.early or self.stack)
        domains = torch.arange(self.num_domains, device=batch.items.device)[:, None, None]
        asks = batch.mask & (batch.target_domains == domains)
        # What is asked at the end of a history alone, as in an evaluation, needs no other state.
        at_end = not (self.training or self.stack or batch.sizes) and not bool(asks[:, :, :-1].any())
        before = 0
        if at_end and not crosses:  # and none of its work is done on the positions before the longest history
            before = int(batch.mask.any(dim=0).int().argmax())
            batch, asks = batch.map(lambda part: part[..., before:] if part.ndim == 2 else part), asks[..., before:]
        streams = cut_streams(_of_asked(batch) if at_end and not crosses else batch, self.num_domains, crosses)
        view = look(batch, streams, self.early or self.stack)
        counts = streams.sizes

        # Rows without padding, first those of x, then the slots of each domain: maps run once, on all of them.
        cells = places(batch.mask, None if batch.sizes is None else counts.events)
        slots = _places_of_parts(streams.split(streams.real), [block.slots for block in streams.blocks])
        sizes = [len(cells), len(slots)]
        items = torch.cat([batch.items.flatten()[cells], streams.item[slots]])
        order = torch.cat([self._merged_places(batch).flatten()[cells], self._slot_places(batch, streams)[slots]])
        known = items != PAD_ID  # a question slot of a domain without events holds no item
        e = self.embedding(items, order, items, known)
        x, s = e.split(sizes)
        for units in early:
            s = _exchange(units, s, slots, streams, view)
            e = torch.cat([x, s])

        # The questions, domain by domain; those of a domain without events so far have no slot without an exchange.
        asked = torch.cat([places(asks[k], count) for k, count in enumerate(counts.questions)])
        slot = streams.question_slot.flatten()[asked]
        has_slot = slot < len(streams.real)
        owned = counts.questions if crosses else counts.known
        own_rows = _places_of_parts(has_slot.split(counts.questions), owned)
        x_rows = _inverse(cells, batch.items.numel())[asked]
        s_rows = _inverse(slots, len(streams.real) + 1)[slot[own_rows]]
        if at_end:
            asking = [x.index_select(0, x_rows), s.index_select(0, s_rows)]
            attended = self._attend_at_end(x, s, asking, batch, cells, streams, slots, asked, slot[own_rows], owned)
            known = torch.cat([known[: len(x)][x_rows], known[len(x) :][s_rows]])
            e, sizes = torch.cat(asking), [len(part) for part in asking]
        else:
            attended = self._attend(e, batch, cells, streams, slots)
        attended = self.attention.output(attended).mul_(known[:, None])
        x, s = self.attention_norm(e + self.dropout(attended)).split(sizes)
        if self.stack:
            x, s = self._set_apart(x, s, [block.slots for block in streams.blocks])
            for units in stack:
                s = _exchange(units, s, slots, streams, view)
        if not at_end:  # what no question reads is left out
            x, s = x.index_select(0, x_rows), s.index_select(0, s_rows)
        if not self.stack:
            x, s = self._set_apart(x, s, owned)
        own = s.new_zeros(x.shape).index_copy_(0, own_rows, s)
        answers = self._answer(x, own, counts.questions)
        states = _spread(answers, asked, batch.items.numel()).unflatten(0, batch.items.shape)
        return F.pad(states, (0, 0, before, 0)) if before else states

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight

    def _merged_places(self, batch: Batch) -> Int[Tensor, "batch length"]:
        count = batch.mask.cumsum(dim=1)
        return count[:, -1:] - count + 1 if self.from_end else count

    def _slot_places(self, batch: Batch, streams: Streams) -> Int[Tensor, " slots"]:
        """From the end, the newest event is the one before the last that is asked for: 1, and 0 for what follows it."""
        if not self.from_end:
            return streams.count
        domains = torch.arange(self.num_domains, device=batch.items.device)[:, None, None]
        events = ((batch.domains == domains) & batch.mask).sum(dim=2)
        asked_last = batch.target_domains[:, -1] == domains[:, :, 0]
        return torch.where(streams.real, (events + asked_last)[streams.domain, streams.row] - streams.count, 0)

    def _attend(
        self,
        events: Float[Tensor, "events d_model"],
        batch: Batch,
        cells: Int[Tensor, " cells"],
        streams: Streams,
        slots: Int[Tensor, " slots"],
    ) -> Float[Tensor, "events d_model"]:
        """Each stream to itself, every state to the events before it and its own."""
        query, pair = self.attention.query(events), self.attention.key_value(events)
        lines = line_lengths([batch.mask, *streams.split(streams.real)], events)
        if lines is not None:
            keys = torch.cat([torch.ones_like(cells, dtype=torch.bool), streams.event[slots]])
            return self._attend_by_length(query, pair, keys, lines)
        sizes = [len(cells), len(slots)]  # elsewhere one block for each stream, as long as its longest line
        (x_query, s_query), (x_pair, s_pair) = query.split(sizes), pair.split(sizes)
        shape, real = batch.items.shape, batch.mask
        x = self.attention.attend(
            _spread(x_query, cells, real.numel()).unflatten(0, shape),
            _spread(x_pair, cells, real.numel()).unflatten(0, shape),
            causal_mask(real),
        )
        blocks = zip(
            *(streams.split(_spread(part, slots, len(streams.real))) for part in (s_query, s_pair)),
            streams.split(streams.event),
            strict=True,
        )
        s = [self.attention.attend(q, kv, causal_mask(event)).flatten(0, 1) for q, kv, event in blocks if len(q)]
        own = torch.cat(s).index_select(0, slots) if s else s_query
        return torch.cat([x.flatten(0, 1).index_select(0, cells), own])

    def _attend_by_length(
        self,
        query: Float[Tensor, "events d_model"],
        key_value: Float[Tensor, "events two_d_model"],
        keys: Bool[Tensor, " events"],
        lines: Int[Tensor, " lines"],
    ) -> Float[Tensor, "events d_model"]:
        """As `_attend`, of streams that lie end to end, with as many events as `lines` says: the short ones together
        and the long ones together, so that there is little padding."""
        place, blocks = sort_lines(lines)
        counts = [rows * length for rows, length in blocks]
        parts = (_spread(part, place, sum(counts)).split(counts) for part in (query, key_value, keys[:, None]))
        attended = []
        for shape, *block in zip(blocks, *parts, strict=True):
            q, kv, key = (part.unflatten(0, shape) for part in block)
            attended.append(self.attention.attend(q, kv, causal_mask(key[:, :, 0])).flatten(0, 1))
        return torch.cat(attended).index_select(0, place)

    def _attend_at_end(
        self,
        x: Float[Tensor, "cells d_model"],
        s: Float[Tensor, "slots d_model"],
        asking: Sequence[Float[Tensor, "_ d_model"]],
        batch: Batch,
        cells: Int[Tensor, " cells"],
        streams: Streams,
        slots: Int[Tensor, " slots"],
        asked: Int[Tensor, " questions"],
        slot: Int[Tensor, " own"],
        owned: Sequence[int],
    ) -> Float[Tensor, "asking d_model"]:
        """As `_attend`, for the events that ask, all of which are the last of their stream: those of `asked` in the
        merged history, then those of `slot`, `owned` of them in each domain. `asking` are their states."""
        x_query, s_query = asking
        shape, real = batch.items.shape, batch.mask
        line = asked // shape[1]
        x = _spread(x, cells, real.numel()).unflatten(0, shape)
        parts = [self.attention.attend_once(_spread(x_query, line, len(x)), x, real).index_select(0, line)]
        start = 0
        blocks = zip(
            streams.split(_spread(s, slots, len(streams.real))),
            streams.split(streams.event),
            s_query.split(list(owned)),
            slot.split(list(owned)),
            strict=True,
        )
        for states, event, query, at in blocks:
            if len(at):
                line = (at - start) // event.shape[1]
                query = _spread(query, line, len(states))
                parts.append(self.attention.attend_once(query, states, event).index_select(0, line))
            start += event.numel()
        return torch.cat(parts)

    def _set_apart(
        self, x: Float[Tensor, "merged d_model"], s: Float[Tensor, "own d_model"], counts: Sequence[int]
    ) -> tuple[Float[Tensor, "merged d_model"], Float[Tensor, "own d_model"]]:
        """The encoder's feed-forward map with the low-rank map of each stream; `counts` are the rows of each domain."""
        sizes = [len(x), *counts]
        h = torch.cat([x, s])
        shared = (h + self.dropout(self.feed_forward(h))).split(sizes)
        parts = zip(self.stream_norms, self.stream_maps, shared, h.split(sizes), strict=True)
        return torch.cat([norm(y + self.dropout(low_rank(part))) for norm, low_rank, y, part in parts]).split(
            [len(x), len(s)]
        )

    def _answer(
        self,
        merged: Float[Tensor, "questions d_model"],
        own: Float[Tensor, "questions d_model"],
        counts: Sequence[int],
    ) -> Float[Tensor, "questions d_model"]:
        """What both streams say of the domain asked for; `counts` are the rows of each domain."""
        sizes = list(counts)
        invariant = (merged + self.dropout(self.invariant(merged))).split(sizes)
        parts = zip(
            self.invariant_norms,
            self.invariant_maps,
            self.own_norms,
            self.own,
            invariant,
            merged.split(sizes),
            own.split(sizes),
            strict=True,
        )
        return torch.cat(
            [
                norm(y + self.dropout(low_rank(h_x))) + own_norm(h_k + self.dropout(feed_forward(h_k)))
                for norm, low_rank, own_norm, feed_forward, y, h_x, h_k in parts
            ]
        )


class SwiGLU(nn.Module):
    """W3 (silu(W2 h) * W1 h)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.output = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, h: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        linear = F.linear if torch.is_grad_enabled() else product
        both = linear(h.flatten(0, -2), self.gate_and_value.weight)
        gate, value = both.chunk(2, dim=-1)
        weight = self.output.weight
        if linear is product:
            made = product(F.silu(gate).mul_(value), weight)
        elif torch.compiler.is_compiling() or both.dtype != weight.dtype:  # fused by the compiler; or autocast
            made = F.linear(F.silu(gate) * value, weight)
        else:
            made = _GatedLinear.apply(both, weight)
        return made.unflatten(0, h.shape[:-1])


class _GatedLinear(Function):
    """W (silu(gate) * value) of the two halves. The product of the halves is made again for W's gradient, not kept, and
    their own gradient is written where both lie: nothing is joined."""

    @staticmethod
    def forward(ctx: Any, gate_and_value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_value, weight)
        gate, value = gate_and_value.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(value), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_and_value, weight = ctx.saved_tensors
        gate, value = gate_and_value.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_value)
        d_gate, d_value = both.chunk(2, dim=-1)
        opened, through = F.silu(gate), grad @ weight
        torch.mul(opened, through, out=d_value)
        d_weight = grad.t() @ opened.mul_(value)
        torch.ops.aten.silu_backward.grad_input(through.mul_(value), gate, grad_input=d_gate)
        return both, d_weight


class LowRank(nn.Module):
    """LoRA: h (A B)^T, with B zero at the start."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(d_model, rank))
        self.b = nn.Parameter(torch.zeros(rank, d_model))

    def forward(self, h: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        return F.linear(F.linear(h, self.b), self.a)


def _initialize_as_published(model: nn.Module, generator: torch.Generator | None) -> None:
    """Linear maps from N(0, 0.02²), tables from the same cut off at two deviations, attention's input maps from
    Xavier's uniform law over their three blocks at once, A of the low-rank maps from N(0, 0.02²)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=STD, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | ItemEmbedding):
            nn.init.trunc_normal_(module.weight, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
        elif isinstance(module, LowRank):
            nn.init.normal_(module.a, std=STD, generator=generator)
    for module in model.modules():
        if isinstance(module, ItemEmbedding):
            nn.init.zeros_(module.weight[PAD_ID])
        elif isinstance(module, MultiHeadAttention):
            bound = (6 / (4 * module.query.in_features)) ** 0.5
            for part in (module.query, module.key_value):
                nn.init.uniform_(part.weight, -bound, bound, generator=generator)


def _exchange(
    units: nn.ModuleList,
    states: Float[Tensor, "own d_model"],
    slots: Int[Tensor, " own"],
    streams: Streams,
    view: View | None,
) -> Float[Tensor, "own d_model"]:
    """The exchange on states without padding."""
    blocks = streams.split(_spread(states, slots, len(streams.real)))
    return torch.cat([block.flatten(0, 1) for block in exchange(units, blocks, streams, view)]).index_select(0, slots)


def _places_of_parts(parts: Sequence[Tensor], counts: Sequence[int]) -> Int[Tensor, " places"]:
    """Places of what is True in masks laid end to end, part by part."""
    starts = accumulate((part.numel() for part in parts[:-1]), initial=0)
    found = [places(part, count) + start for part, count, start in zip(parts, counts, starts, strict=True)]
    return torch.cat(found)


def _of_asked(batch: Batch) -> Batch:
    """The batch with the events of the domain that the last position asks for; the others are of no domain."""
    return replace(batch, domains=batch.domains.where(batch.domains == batch.target_domains[:, -1:], NO_DOMAIN))


def _inverse(cells: Int[Tensor, " rows"], total: int) -> Int[Tensor, " cells"]:
    """Which row each cell has once the others are left out; 0 for the others."""
    return cells.new_zeros(total).index_copy_(0, cells, torch.arange(len(cells), device=cells.device))


def _spread(
    rows: Shaped[Tensor, "rows width"], cells: Int[Tensor, " rows"], total: int
) -> Shaped[Tensor, "cells width"]:
    """The rows at their cells again, zeros elsewhere."""
    return rows.new_zeros(total, rows.shape[1]).index_copy_(0, cells, rows)
