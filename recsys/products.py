"""Large fp32 products on a CPU, by the faster of the two libraries that torch has for them there.

torch gives fp32 products to MKL. On AMD's processors with AVX-512 oneDNN takes two thirds to nine tenths of the time
(elsewhere about the same), but it builds and keeps a kernel for every shape that it meets (a millisecond and about a
megabyte each), so it is only asked for numbers of rows that come again and again. No gradient goes through any of
these: who needs one makes it from further products.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ROWS = 64
"""Numbers of rows that come again and again are multiples of this one."""
_CACHE_LINE = 64


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """a b^T; in the precision of autocast where that is on."""
    if _recurs(len(a)) and _plain(a) and _plain(b) and not torch.is_autocast_enabled("cpu"):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return made
    return F.linear(a, b)


class ProductSum:
    """A sum of products a^T b, none at first."""

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


def recurring(rows: int, like: Tensor) -> int:
    """The number of rows, at least as many, that a matrix of the type of `like` should have in a product."""
    return rows + -rows % _ROWS if _knows_better() and _plain(like) else rows


def whole_lines(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "filled columns"]:
    """With rows of zeros below, as many as fill up a cache line: a product a b^T into rows that do not begin at cache
    lines takes half as long again on a CPU."""
    missing = -len(matrix) % (_CACHE_LINE // matrix.element_size())
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


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
    )
