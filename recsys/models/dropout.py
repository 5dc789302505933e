"""Dropout whose coins cost little on a CPU, where drawing one float per coordinate is a tenth of a training step."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

COINS = 2**16


class Dropout(nn.Module):
    """Zeroes each coordinate with probability `p` in training and scales the others by 1 / (1 - p).

    On a CPU four coordinates share a 64-bit draw, so that `p` is kept to the nearest 1/65,536, and scaled by what it
    is. Elsewhere, and in a compiled step, it is torch's own. Draws come from torch's default generator, as those of `nn.Dropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        assert 0 <= p < 1
        self.p = p

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        kept = min(max(round((1 - self.p) * COINS), 1), COINS - 1)
        return _CoinDropout.apply(x, _coins(x, kept), COINS / kept)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _coins(x: Float[Tensor, "*shape"], kept: int) -> Bool[Tensor, "*shape"]:
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    coins = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return coins < kept - COINS // 2


class _CoinDropout(Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
        return torch.ops.aten.native_dropout_backward(x, mask, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.scale = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, int]:
        """Models that run as one toss the same coins."""
        x = x.movedim(in_dims[0], 0)
        return _CoinDropout.apply(x, mask.expand_as(x), scale), 0
