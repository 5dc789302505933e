"""The transformer block that every sequence encoder here is made of."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from recsys.models.attention import MultiHeadAttention
from recsys.models.dropout import Dropout

Activation = Literal["gelu", "relu"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward map, each with a residual; states at padding leave it as zeros.

    `norm_first` puts the LayerNorm before each map (pre-norm), otherwise after each sum (post-norm). Dropout acts
    on what is added to the stream and leaves the attention weights alone, which keeps the fused attention kernels.
    """

    def __init__(
        self, *, d_model: int, d_ff: int, num_heads: int, dropout: float, activation: Activation, norm_first: bool
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), _ACTIVATIONS[activation](), nn.Linear(d_ff, d_model)
        )
        self.dropout = Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "batch length d_model"],
        context: Float[Tensor, "batch length d_model"],
        mask: Bool[Tensor, "batch length length"],
        real: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length d_model"]:
        """`query` asks and is carried on; `context` gives keys and values, and is usually the same tensor.

        `mask[b, t, s]` is True where t may attend to s; `real` is False at padding.
        """
        if self.norm_first:
            asking = self.attention_norm(query)
            asked = asking if context is query else self.attention_norm(context)
            x = query + self.dropout(self.attention(asking, asked, mask))
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        else:
            x = self.attention_norm(query + self.dropout(self.attention(query, context, mask)))
            x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return x.mul_(real[..., None])

    def shares(
        self,
        context: Float[Tensor, "batch length d_model"],
        mask: Bool[Tensor, "batch length length"],
        groups: Float[Tensor, "batch length groups"],
    ) -> Float[Tensor, "batch length groups"]:
        """How the block divides its attention where `context` also asks, as `MultiHeadAttention.shares` tells it."""
        asking = self.attention_norm(context) if self.norm_first else context
        return self.attention.shares(asking, asking, mask, groups)


def causal_mask(keys: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch length length"]:
    """True where a position may attend to another: one of `keys`, and not a later position."""
    length = keys.shape[1]
    return keys[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
