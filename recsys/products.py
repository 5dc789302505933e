"""Large fp32 products on a CPU, by the faster of the two libraries that torch has for them there.

torch gives fp32 products to MKL. On AMD's processors with AVX-512 oneDNN takes two thirds to four fifths of the time
(elsewhere about the same), but it builds and keeps a kernel for every shape that it meets (a millisecond and some
megabytes each), so it is only asked for numbers of rows that come again and again.
"""

from functools import cache, cached_property

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS = 256
"""Numbers of rows that come again and again are multiples of this one."""


class Factor:
    """A matrix b that others are multiplied with, `factor(a)` = a b^T. Neither gets a gradient; b must not change."""

    def __init__(self, matrix: Float[Tensor, "columns inner"]) -> None:
        self.matrix = matrix

    def __call__(
        self, a: Float[Tensor, "rows inner"], out: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """`out` is memory that may be used for the result."""
        if _recurs(len(a)) and _plain(a) and _plain(self.matrix):
            made: Tensor = torch.ops.mkldnn._linear_pointwise(a, self._packed, None, "none", [], "")
            return made
        return torch.mm(a, self.matrix.t(), out=out)

    @cached_property
    def _packed(self) -> Tensor:
        """The matrix as oneDNN would lay it out for every product."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.matrix.contiguous(), _ROWS)
        return packed


class ProductSum:
    """A sum of products a^T b, none at first, without a gradient."""

    def __init__(self, like: Float[Tensor, "rows columns"]) -> None:
        """Of the shape and type of `like`."""
        self._transposed = _knows_better() and _plain(like)
        """oneDNN makes b^T a in half the time."""
        self._sum = torch.zeros_like(like.t() if self._transposed else like, memory_format=torch.contiguous_format)

    def add(self, a: Float[Tensor, "inner rows"], b: Float[Tensor, "inner columns"]) -> None:
        if not self._transposed:
            self._sum.addmm_(a.t(), b)
        elif not _recurs(len(a)):
            self._sum.addmm_(b.t(), a)
        else:
            self._sum = torch.ops.mkldnn._linear_pointwise.binary(b.t(), self._sum, a.t(), None, "add")

    def total(self) -> Float[Tensor, "rows columns"]:
        return self._sum.t() if self._transposed else self._sum


def _recurs(rows: int) -> bool:
    return rows > 0 and rows % _ROWS == 0 and _knows_better()


def _plain(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32


@cache
def _knows_better() -> bool:
    """Whether oneDNN is there and has more to offer than MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
