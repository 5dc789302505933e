"""Dropout whose coins cost little on a CPU, where drawing one float per coordinate is a tenth of a training step."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

COINS = 2**16


class Dropout(nn.Module):
    """Zeroes each coordinate with probability `p` in training and scales the others by 1 / (1 - p).

    On a CPU four coordinates share a 64-bit draw, so that `p` is kept to the nearest 1/65,536, and scaled by what it
    is. Elsewhere it is torch's own. Draws come from torch's default generator, as those of `nn.Dropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        assert 0 <= p < 1
        self.p = p

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return _CoinDropout.apply(x, min(max(round((1 - self.p) * COINS), 1), COINS - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _CoinDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: int) -> Tensor:
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        coins = draws.view(torch.int16)[: x.numel()].view(x.shape)
        mask = coins < kept - COINS // 2
        ctx.save_for_backward(mask)
        ctx.scale = COINS / kept
        return torch.ops.aten.native_dropout_backward(x, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None
