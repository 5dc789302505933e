"""A sparse matrix as a module's state."""

from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor, nn

_BUFFERS = ("offsets", "columns", "values")


class SparseRows(nn.Module):
    """A square item-by-item matrix in compressed rows, kept in buffers whose sizes are known once it is filled.

    Loading a `state_dict` takes over the sizes found there, so a module that was never filled can be loaded.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_take_sizes)

    def fill(self, matrix: csr_array) -> None:
        device = self.offsets.device
        self.offsets = torch.as_tensor(matrix.indptr, dtype=torch.int64, device=device)
        self.columns = torch.as_tensor(matrix.indices, dtype=torch.int32, device=device)
        self.values = torch.as_tensor(matrix.data, dtype=torch.float32, device=device)

    def add_rows(
        self,
        scores: Float[Tensor, "batch items"],
        lines: Int[Tensor, " entries"],
        rows: Int[Tensor, " entries"],
        weights: Float[Tensor, " entries"],
    ) -> None:
        """scores[lines[e]] += weights[e] * matrix[rows[e]] for every entry e, in place."""
        assert len(self.offsets), "fill the matrix or load it before it is read"
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        entry = torch.repeat_interleave(length)
        within = torch.arange(len(entry), device=entry.device) - (length.cumsum(0) - length)[entry]
        source = start[entry] + within
        place = lines[entry] * scores.shape[1] + self.columns[source]
        scores.view(-1).index_put_((place,), weights[entry] * self.values[source], accumulate=True)


def _take_sizes(module: SparseRows, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in _BUFFERS:
        if prefix + name in state:
            setattr(module, name, torch.empty_like(state[prefix + name], device=getattr(module, name).device))
