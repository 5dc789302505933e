"""Scores of a trained recommender: its last state times the item table, whatever precision it was trained in."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys.types import NO_DOMAIN, PAD_ID, Batch, HasThreads, Recommender


class DotScorer:
    """`hidden · item` for the last position of every history.

    The product runs in fp64 and is rounded once to fp32. bf16 scores tie the target with some item for most users;
    and an fp32 product still depends in its last bits on the shape of the matrices and on whether TF32 is allowed.

    A model's own forward pass depends on shapes in the same way, so it always sees `rows` histories (the last one
    repeated) and, if `max_len` is given, left padding up to that length: then a row's scores do not depend on the
    rows that share its batch, to the last bit for a model that works on the whole of it. One that packs its valid
    tokens, or a stream per domain, makes shapes of its own, and its scores vary by a few 1e-7 with the batch. Dropout
    would make scores random: a module in training mode is refused.

    The item vectors are read once for as long as the same tensor of items is asked for: make another scorer when the
    model has changed.
    """

    def __init__(self, model: Recommender, max_len: int | None = None, rows: int = 256) -> None:
        self.model = model
        self.max_len = max_len
        self.rows = rows
        self._items: Tensor | None = None
        self._vectors = torch.empty(0)

    def scores(self, batch: Batch, items: Int[Tensor, " candidates"]) -> Float[Tensor, "batch candidates"]:
        table = self._table(items)
        parts = [(state @ table.T)[:count].float() for state, count in self._states(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def thread_scores(
        self, batch: Batch, items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "threads batch candidates"]:
        """What each thread of the model adds to `scores`. Only for a model that `HasThreads`."""
        assert isinstance(self.model, HasThreads)
        widths = list(self.model.threads)
        tables = self._table(items).split(widths, dim=1)
        chunks = [
            [(part @ table.T).float()[:count] for part, table in zip(state.split(widths, dim=1), tables, strict=True)]
            for state, count in self._states(batch)
        ]
        return torch.cat([torch.stack(chunk) for chunk in chunks], dim=1)

    def _table(self, items: Int[Tensor, " candidates"]) -> Float[Tensor, "candidates d_model"]:
        if self._items is not items:
            self._items, self._vectors = items, self.model.item_embeddings()[items].double()
        return self._vectors  # autocast lets products in fp64 be

    def _states(self, batch: Batch) -> list[tuple[Float[Tensor, "rows d_model"], int]]:
        assert not (isinstance(self.model, nn.Module) and self.model.training), "call model.eval() before scoring"
        return [self._last_hidden(batch, start) for start in range(0, len(batch.user), self.rows)]

    def _last_hidden(self, batch: Batch, start: int) -> tuple[Float[Tensor, "rows d_model"], int]:
        """The states of the rows from `start` on, in the fixed shape, and how many of them are real."""
        count = min(self.rows, len(batch.user) - start)
        index = torch.arange(start, start + self.rows, device=batch.user.device).clamp(max=start + count - 1)
        chunk = batch.map(lambda tensor: tensor[index])
        if self.max_len is not None:
            chunk = _pad_left(chunk, self.max_len)
        return self.model(chunk)[:, -1].double(), count


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
