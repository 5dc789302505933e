"""How exact numbers and their products are."""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products within the block, as `torch.set_float32_matmul_precision` names them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_least_fp32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half precision raised to fp32, anything else as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
