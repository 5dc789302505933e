"""ABXI's training step as it is usually written, to be timed and checked beside the one of this package.

The same equations on the same parameters: every map over every position of padded tensors, low-rank maps multiplied
out, and the vectors of all negatives gathered into one tensor of batch x length x candidates x d_model.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.models.abxi import ABXI, LowRank, SwiGLU
from recsys.types import PAD_ID, Batch


def hidden(model: ABXI, batch: Batch) -> Float[Tensor, "batch length d_model"]:
    """The states of all positions, zeros where nothing is asked."""
    valid = batch.mask
    states = _encode(model, 0, batch.items, _from_end(valid, valid.sum(1, keepdim=True)), valid)
    answers = torch.zeros_like(states)
    for domain in range(model.num_domains):
        asked = valid & (batch.target_domains == domain)
        items, places, real = _aligned(batch, domain, asked)
        own = _encode(model, 1 + domain, items, places, real)
        invariant = (
            states
            + _drop(model, _swiglu(model.invariant, states))
            + _drop(model, _low_rank(model.invariant_maps[domain], states))
        )
        specific = own + _drop(model, _swiglu(model.own[domain], own))
        answer = model.invariant_norms[domain](invariant) + model.own_norms[domain](specific)
        answers = answers + answer * asked[:, :, None]
    return answers


def loss(
    states: Float[Tensor, "batch length d_model"],
    table: Float[Tensor, "items d_model"],
    batch: Batch,
    negatives: Int[Tensor, "batch length negatives"],
    temperature: float,
    num_domains: int,
) -> Float[Tensor, ""]:
    """InfoNCE over the target and its negatives, averaged per user and domain."""
    candidates = torch.cat([table[batch.targets][:, :, None], table[negatives]], dim=2)
    logits = torch.einsum("bld,blcd->blc", states, candidates) / temperature
    same = F.pad(negatives == batch.targets[:, :, None], (1, 0))
    losses = -logits.masked_fill(same, -torch.inf).log_softmax(-1)[:, :, 0]
    total = states.new_zeros(())
    for domain in range(num_domains):
        asked = (batch.targets != PAD_ID) & (batch.target_domains == domain)
        per_user = (losses * asked).sum(1) / asked.sum(1).clamp(min=1)
        total = total + per_user.sum() / asked.any(1).sum()
    return total


def _encode(
    model: ABXI,
    stream: int,
    items: Int[Tensor, "batch length"],
    places: Int[Tensor, "batch length"],
    real: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length d_model"]:
    table, positions = model.embedding.items.weight, model.embedding.positions.weight
    e = _drop(model, (table[items] + positions[places]) * real[:, :, None])
    heads = model.attention
    query = heads.query(e)
    key, value = heads.key_value(e).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    length = items.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).nan_to_num()
    attended = heads.output((weights @ v).transpose(1, 2).flatten(2))
    h = model.attention_norm(e + _drop(model, attended)) * real[:, :, None]
    h = h + _drop(model, _swiglu(model.feed_forward, h)) + _drop(model, _low_rank(model.stream_maps[stream], h))
    return model.stream_norms[stream](h) * real[:, :, None]


def _aligned(
    batch: Batch, domain: int, asked: Bool[Tensor, "batch length"]
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """At each position that asks for the domain its latest item there, its place from the end, and whether there is
    one; zeros between."""
    event = batch.mask & (batch.domains == domain)
    steps = torch.arange(batch.items.shape[1])
    latest = torch.where(event, steps, -1).cummax(1).values
    real = asked & (latest >= 0)
    items = torch.where(real, batch.items.gather(1, latest.clamp(min=0)), PAD_ID)
    count = event.cumsum(1)
    newest = count[:, -1:] + (batch.target_domains[:, -1:] == domain)
    return items, torch.where(real, newest - count, 0), real


def _from_end(real: Bool[Tensor, "batch length"], total: Int[Tensor, "batch one"]) -> Int[Tensor, "batch length"]:
    return torch.where(real, total - real.cumsum(1) + 1, 0)


def _swiglu(part: SwiGLU, h: Tensor) -> Tensor:
    gate, value = part.gate_and_value.weight.chunk(2)
    return part.output(F.silu(F.linear(h, gate)) * F.linear(h, value))


def _low_rank(part: LowRank, h: Tensor) -> Tensor:
    return F.linear(h, part.a @ part.b)


def _drop(model: ABXI, x: Tensor) -> Tensor:
    return F.dropout(x, model.dropout.p, model.training)
