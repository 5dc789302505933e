"""The fused cross-entropy beside the plain one, without the checks of types, which a kernel cannot carry.

On a CPU in Triton's interpreter (TRITON_INTERPRET=1). Prints a line of JSON: the largest differences of value and
gradients for each case, relative to the largest value.
"""

import json

import torch
import torch.nn.functional as F

import recsys.fused
from recsys.losses import fused_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def difference(positions: int, candidates: int, chunk: int, dtype: torch.dtype, scale: float) -> list[float]:
    generator = torch.Generator().manual_seed(positions)
    hidden = (scale * torch.randn(positions, 16, generator=generator)).to(DEVICE).requires_grad_()
    weight = torch.randn(candidates, 16, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(candidates, (positions,), generator=generator).to(DEVICE)
    found = []
    for loss in (
        fused_cross_entropy(hidden, weight, targets, chunk, dtype),
        F.cross_entropy(hidden.to(dtype).float() @ weight.to(dtype).float().t(), targets, reduction="sum"),
    ):
        found.append([loss.detach(), *torch.autograd.grad(2 * loss, [hidden, weight])])
    return [
        float((mine - plain).abs().max() / plain.abs().max().clamp(min=1)) for mine, plain in zip(*found, strict=True)
    ]


if __name__ == "__main__":
    recsys.fused.BLOCK = 32
    cases = {
        "several blocks and chunks": (11, 77, 4, torch.float32, 1.0),
        "one block": (3, 8, 4, torch.float32, 1.0),
        "one candidate": (2, 1, 4, torch.float32, 1.0),
        "large logits": (5, 40, 8, torch.float32, 50.0),
        "bf16": (9, 70, 4, torch.bfloat16, 1.0),
    }
    print(json.dumps({name: difference(*case) for name, case in cases.items()}))
