"""A few scores out of many, by a look at groups of them: on a CPU a fraction of the time of looking at each."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROUPS = 12
"""Parts of a row that are compared place by place."""
_CELLS = 2**21
"""Scores that are worked on at a time on a CPU: few enough for a cache."""


def cached_rows(scores: Float[Tensor, "rows candidates"]) -> list[slice]:
    """All rows, in parts of which a CPU's cache holds what is made on the way from scores to ranks."""
    step = max(16, _CELLS // max(1, scores.shape[1])) if scores.device.type == "cpu" else max(1, len(scores))
    return [slice(start, start + step) for start in range(0, len(scores), step)]


def largest(
    scores: Float[Tensor, "batch candidates"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """`scores.topk(k)`, in half its time on a CPU: the k largest lie in the k places whose maxima are largest."""
    width = scores.shape[1] // _GROUPS
    if width < k:
        best = scores.topk(k)
        return best.values, best.indices
    chosen = scores[:, : _GROUPS * width].unflatten(1, (_GROUPS, width)).amax(1).topk(k, sorted=False).indices
    starts = width * torch.arange(_GROUPS, device=scores.device)
    rest = torch.arange(_GROUPS * width, scores.shape[1], device=scores.device)
    columns = torch.cat([(chosen[:, None] + starts[:, None]).flatten(1), rest.expand(len(scores), -1)], dim=1)
    best = scores.gather(1, columns).topk(k)
    return best.values, columns.gather(1, best.indices)


def near(
    scores: Float[Tensor, "rows candidates"], centre: Float[Tensor, " rows"], reach: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"]]:
    """Rows and columns of the scores at most `reach` from `centre`."""
    parts = [(rows.start, *_near(scores[rows], centre[rows], reach[rows])) for rows in cached_rows(scores)]
    return torch.cat([row + start for start, row, _ in parts]), torch.cat([column for _, _, column in parts])


def _near(
    scores: Float[Tensor, "rows candidates"], centre: Float[Tensor, " rows"], reach: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"]]:
    gap = (scores - centre[:, None]).abs_()
    width = scores.shape[1] // _GROUPS
    starts = width * torch.arange(_GROUPS, device=scores.device)
    least = gap[:, : _GROUPS * width].unflatten(1, (_GROUPS, width)).amin(1)
    row, place = (least <= reach[:, None]).nonzero(as_tuple=True)
    columns = place[:, None] + starts
    found, part = (gap[row[:, None], columns] <= reach[row, None]).nonzero(as_tuple=True)
    last_row, last = (gap[:, _GROUPS * width :] <= reach[:, None]).nonzero(as_tuple=True)
    return torch.cat([row[found], last_row]), torch.cat([columns[found, part], last + _GROUPS * width])
