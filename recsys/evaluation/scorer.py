"""Scores of a trained recommender: its last state times the item table, whatever precision it was trained in."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys.evaluation.search import near
from recsys.precision import at_least_fp32, matmul_precision
from recsys.products import product, whole_lines
from recsys.types import NO_DOMAIN, PAD_ID, Batch, HasThreads, Recommender


class DotScorer:
    """`hidden · item` for the last position of every history.

    Where a target stands among the scores is that of products in fp64 that are rounded once to fp32. bf16 scores tie
    the target with some item for most users; and an fp32 product still depends in its last bits on the shape of the
    matrices. So it is made in fp32 (never in TF32), and the scores that lie closer to the target's than its rounding
    error can reach are computed again in fp64. The others are right to that error.

    A model's own forward pass depends on shapes in the same way, so it always sees `rows` histories (the last one
    repeated) and, if `max_len` is given, left padding up to that length: then a row's scores do not depend on the
    rows that share its batch, to the last bit for a model that works on the whole of it. One that packs its valid
    tokens, or a stream per domain, makes shapes of its own, and its scores vary by a few 1e-7 with the batch. Dropout
    would make scores random: a module in training mode is refused.

    The item vectors are read once for as long as the same tensor of items is asked for: make another scorer when the
    model has changed.
    """

    def __init__(self, model: Recommender, max_len: int | None = None, rows: int = 512) -> None:
        self.model = model
        self.max_len = None if getattr(model, "packs_events", False) else max_len
        self.rows = rows
        self._candidates: _Candidates | None = None

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        candidates = self._read(items)
        own = candidates.of(batch.targets[:, -1])
        states = self._states(batch)
        parts = [
            candidates.scores(state, target)[: len(target)]
            for state, target in zip(states, own.split(self.rows), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def thread_scores(
        self, batch: Batch, items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "threads batch candidates"]:
        """What each thread of the model adds to `scores`, in fp64 and rounded. Only for a model that `HasThreads`."""
        assert isinstance(self.model, HasThreads)
        widths = list(self.model.threads)
        tables = self._read(items).vectors.double().split(widths, dim=1)
        chunks = [
            torch.stack([part @ table.T for part, table in zip(state.split(widths, dim=1), tables, strict=True)])
            for state in (state.double() for state in self._states(batch))
        ]
        return torch.cat(chunks, dim=1)[:, : len(batch.user)].float()

    def _read(self, items: Int[Tensor, " candidates"]) -> "_Candidates":
        if self._candidates is None or self._candidates.items is not items:
            self._candidates = _Candidates(items, self.model.item_embeddings().detach())
        return self._candidates

    def _states(self, batch: Batch) -> list[Float[Tensor, "rows d_model"]]:
        """The last states of all rows, in the fixed shape: those past the last row repeat it."""
        assert not (isinstance(self.model, nn.Module) and self.model.training), "call model.eval() before scoring"
        return [self._last_hidden(batch, start) for start in range(0, len(batch.user), self.rows)]

    def _last_hidden(self, batch: Batch, start: int) -> Float[Tensor, "rows d_model"]:
        index = torch.arange(start, start + self.rows, device=batch.user.device).clamp(max=len(batch.user) - 1)
        chunk = batch.map(lambda tensor: tensor[index])
        if self.max_len is not None:
            chunk = _pad_left(chunk, self.max_len)
        return at_least_fp32(self.model(chunk)[:, -1].detach())


class _Candidates:
    """The vectors of some items."""

    def __init__(self, items: Int[Tensor, " candidates"], table: Float[Tensor, "items d_model"]) -> None:
        self.items = items
        self.table = table
        self._lines = whole_lines(at_least_fp32(table[items]))
        self.vectors = self._lines[: len(items)]
        self.longest = torch.linalg.vector_norm(self.vectors, dim=1).amax()

    def of(self, items: Int[Tensor, " some"]) -> Float[Tensor, "some d_model"]:
        """The vectors of any items."""
        return at_least_fp32(self.table[items])

    def scores(
        self, states: Float[Tensor, "rows d_model"], own: Float[Tensor, "real d_model"]
    ) -> Float[Tensor, "rows candidates"]:
        """fp32 products; those near that of a state and its `own` item (first rows have one) are rounded from fp64."""
        with matmul_precision("highest"), torch.autocast(states.device.type, enabled=False):
            scores = product(states, self._lines)[:, : len(self.items)].float()
        real = states[: len(own)]
        target = (real.double() * own).sum(1).float()
        # Higham, Accuracy and Stability of Numerical Algorithms, 3.1: the rounding error of a product of length n is at
        # most n u |h| |e|, u being half an eps. Between two products it is twice that, and a little for the last one.
        reach = (states.shape[1] + 2) * torch.finfo(torch.float32).eps * self.longest
        row, column = near(scores[: len(own)], target, reach * torch.linalg.vector_norm(real, dim=1))
        if len(row) > scores.numel() // 64:  # most scores are about the same
            return (states.double() @ self.vectors.double().T).float()
        scores[row, column] = (real[row].double() * self.vectors[column]).sum(1).float()
        return scores


def _pad_left(batch: Batch, length: int) -> Batch:
    missing = length - batch.items.shape[1]
    assert missing >= 0, f"histories of {batch.items.shape[1]} events for a model that takes {length}"
    return replace(
        batch,
        items=F.pad(batch.items, (missing, 0), value=PAD_ID),
        domains=F.pad(batch.domains, (missing, 0), value=NO_DOMAIN),
        times=F.pad(batch.times, (missing, 0)),
        targets=F.pad(batch.targets, (missing, 0), value=PAD_ID),
        target_domains=F.pad(batch.target_domains, (missing, 0), value=NO_DOMAIN),
    )
