"""Attention with masks that may leave a query nothing to look at, and the gated cross-attention between domains."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.dropout import Dropout


class MultiHeadAttention(nn.Module):
    """Softmax attention with out-projection; a query that may attend to nothing gets exact zeros."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        assert d_model % num_heads == 0
        self.num_heads = num_heads
        # An attribute, for whom another one serves better.
        self.kernel: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch context d_model"],
        mask: Bool[Tensor, "batch length context"],
    ) -> Float[Tensor, "batch length d_model"]:
        output = self.output(self.attend(self.query(query), self.key_value(context), mask))
        return output.mul_(mask.any(dim=-1, keepdim=True))  # not even the out-projection's bias

    def attend(
        self,
        query: Float[Tensor, "batch length d_model"],
        key_value: Float[Tensor, "batch context two_d_model"],
        mask: Bool[Tensor, "batch length context"],
    ) -> Float[Tensor, "batch length d_model"]:
        """The heads' results side by side, before the out-projection, of inputs that are projected already.

        What a query that may attend to nothing gets means nothing.
        """
        q = self._split(query)
        k, v = (self._split(part) for part in key_value.chunk(2, dim=-1))
        # A softmax over nothing is NaN, forward or backward, depending on the kernel. Such a row looks everywhere.
        attended = self.kernel(q, k, v, attn_mask=(mask | ~mask.any(dim=-1, keepdim=True))[:, None])
        return attended.transpose(1, 2).flatten(2)

    def attend_once(
        self,
        query: Float[Tensor, "batch d_model"],
        context: Float[Tensor, "batch context d_model"],
        mask: Bool[Tensor, "batch context"],
    ) -> Float[Tensor, "batch d_model"]:
        """`attend` for one query a row, of inputs that are not projected yet.

        As q · (K y) = (K^T q) · y, and the mean of V y is V of the mean of y, no key and no value is made.
        """
        width = query.shape[1] // self.num_heads
        (to_key, to_value), (_, value_bias) = self.key_value.weight.chunk(2), self.key_value.bias.chunk(2)
        q = self.query(query).unflatten(1, (self.num_heads, width)).transpose(0, 1)
        asking = torch.bmm(q, to_key.unflatten(0, (self.num_heads, width))).transpose(0, 1)  # batch heads d_model
        scores = torch.bmm(asking, context.transpose(1, 2)) / width**0.5  # a key's bias adds the same to all of a row
        weights = scores.masked_fill(~(mask | ~mask.any(dim=1, keepdim=True))[:, None], -torch.inf).softmax(dim=-1)
        means = torch.bmm(weights, context).transpose(0, 1)
        values = torch.bmm(means, to_value.unflatten(0, (self.num_heads, width)).transpose(1, 2))
        return values.transpose(0, 1).flatten(1) + value_bias

    def shares(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch context d_model"],
        mask: Bool[Tensor, "batch length context"],
        groups: Float[Tensor, "batch context groups"],
    ) -> Float[Tensor, "batch length groups"]:
        """How each query's attention falls on groups of the context (one-hot), averaged over the heads.

        Sums to 1, or to 0 for a query that may attend to nothing.
        """
        key, d_model = self.key_value, query.shape[-1]
        q, k = self._split(self.query(query)), self._split(F.linear(context, key.weight[:d_model], key.bias[:d_model]))
        values = groups[:, None].expand(-1, self.num_heads, -1, -1)  # attending to these adds up the shares
        empty = ~mask.any(dim=-1, keepdim=True)
        shares = self.kernel(q, k, values, attn_mask=(mask | empty)[:, None])
        return shares.mean(dim=1) * ~empty

    def _split(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length width"]:
        return x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads)).transpose(1, 2)


class CrossAttention(nn.Module):
    """What a stream X (the query) reads from the other domains' states Y (the context): X'.

    X' is taken after the out-projection and before gate and residual. A probe hooks this module: the query stream
    enters as the first positional argument, before its LayerNorm.
    """

    def __init__(self, d_model: int, num_heads: int, layer_norm: bool) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.context_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.heads = MultiHeadAttention(d_model, num_heads)

    def forward(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch context d_model"],
        mask: Bool[Tensor, "batch length context"],
    ) -> Float[Tensor, "batch length d_model"]:
        """`mask` is True where the query may attend; a query that may attend to nothing gets exact zeros."""
        return self.heads(self.query_norm(query), self.context_norm(context), mask)


class ElementwiseGate(nn.Module):
    """g = activation(FFN([X; X'])), one value per coordinate; the FFN is 2d -> 4d -> d, with GELU between.

    With weights near zero a sigmoid starts near 1/2 and a tanh near 0.
    """

    def __init__(self, d_model: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential(
            nn.Linear(2 * d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )
        self.activation = activation

    def forward(
        self, query: Float[Tensor, "batch length d_model"], output: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return self.activation(self.feed_forward(torch.cat([query, output], dim=-1)))


class ScalarGate(nn.Module):
    """g = tanh(alpha), one learned number that starts at 0, so that training starts at "no exchange" (Flamingo)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(
        self, query: Float[Tensor, "batch length d_model"], output: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return torch.tanh(self.alpha).expand_as(output)


class OpenGate(nn.Module):
    """g = 1: the plain residual. A module all the same, so that the gate is a probe site whatever its kind."""

    def __init__(self, d_model: int) -> None:
        super().__init__()

    def forward(
        self, query: Float[Tensor, "batch length d_model"], output: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return torch.ones_like(output)


GateKind = Literal["sigmoid", "tanh", "scalar", "none"]

_GATES: dict[GateKind, Callable[[int], nn.Module]] = {
    "sigmoid": partial(ElementwiseGate, activation=torch.sigmoid),
    "tanh": partial(ElementwiseGate, activation=torch.tanh),
    "scalar": ScalarGate,
    "none": OpenGate,
}


Direction = Literal["free", "orthogonal", "parallel"]


class Projection(nn.Module):
    """The part of an update that a config lets through, token by token.

    `orthogonal` to the stream (the orthogonal residual update of Oh et al., arXiv 2505.11881), along it (`parallel`),
    or all of it (`free`). A stream that is zero has no direction: all of the update is orthogonal to it.
    """

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.direction: Direction = direction

    def forward(
        self, query: Float[Tensor, "batch length d_model"], update: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        if self.direction == "free":
            return update
        along = parallel_part(query, update)
        return along if self.direction == "parallel" else update - along


def parallel_part(
    query: Float[Tensor, "*tokens d_model"], vector: Float[Tensor, "*tokens d_model"]
) -> Float[Tensor, "*tokens d_model"]:
    """The projection of each vector onto its query; zeros where the query is zero."""
    energy = query.square().sum(-1, keepdim=True)
    return (query * vector).sum(-1, keepdim=True) / torch.where(energy > 0, energy, 1.0) * query


Context = Literal["others", "own", "shuffled"]


class GatedCrossAttention(nn.Module):
    """One unit of exchange: X + g * X' with X' = CrossAttention(X, Y) and g = gate(X, X').

    Every quantity is the input or output of a module, so a hook from outside can see it and replace it: X enters
    `attention` (and this module), X' leaves `attention`, g leaves `gate`, the update that is added (g * X', after
    dropout) leaves `update`, and the result leaves this module.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        gate: GateKind,
        layer_norm: bool,
        dropout: float,
        context: Context = "others",
        update: Direction = "free",
    ) -> None:
        super().__init__()
        self.context: Context = context
        self.attention = CrossAttention(d_model, num_heads, layer_norm)
        self.gate = _GATES[gate](d_model)
        self.dropout = Dropout(dropout)
        self.update = Projection(update)

    def forward(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch context d_model"],
        mask: Bool[Tensor, "batch length context"],
    ) -> Float[Tensor, "batch length d_model"]:
        output = self.attention(query, context, mask)
        return query + self.update(query, self.dropout(self.gate(query, output) * output))


class CrossConfig(Config):
    """The exchange between the domains of a host model: which unit, how many, and where."""

    gate: GateKind = "sigmoid"
    layer_norm: bool = True
    """LayerNorm on query and context inside the attention."""
    placement: Literal["early", "stack"] = "early"
    """`early`: all units in sequence between the embeddings and the first encoder block; `stack`: one unit after
    each of the first `num_units` encoder blocks."""
    num_units: Annotated[int, Field(ge=1)] = 1
    """Units on the way of each domain; every domain has its own."""
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    context: Context = "others"
    """What the units read: events of the other domains; or, as controls with the same parameters, `own` events (no
    other domain is seen) or those of the other domains in another user's history (`shuffled`). See `look`."""
    update: Direction = "free"
    """The part of the update that is added: all of it, or only what is `orthogonal` or `parallel` to its stream."""
    frozen: bool = False
    """The cross-attentions keep the weights that they start with; their gates are trained."""

    def build(self, d_model: int) -> GatedCrossAttention:
        """One unit for one domain."""
        unit = GatedCrossAttention(
            d_model, self.num_heads, self.gate, self.layer_norm, self.dropout, self.context, self.update
        )
        unit.attention.requires_grad_(not self.frozen)
        return unit


def check_heads(d_model: int, num_heads: int, key: str = "num_heads") -> None:
    """Raises ValueError, naming the key, unless the heads divide the width."""
    if d_model % num_heads:
        fitting = [heads for heads in range(1, d_model + 1) if d_model % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - num_heads))
        raise ValueError(f"{key} = {num_heads} does not divide d_model = {d_model}; {nearest} does")
