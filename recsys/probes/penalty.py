"""The alignment of every cross-attention as a number that training can press on."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from recsys.probes.record import find_units


@contextlib.contextmanager
def alignment(model: nn.Module) -> Iterator[Callable[[], Float[Tensor, ""]]]:
    """Watches the cross-attentions of a model for as long as the block lasts.

    What it yields gives, inside the block, mean cos² between query and output over all tokens so far that had
    something to attend to, with its gradient; 0 where there were none. The query is the stream before its LayerNorm.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        query, _context, mask = arguments
        tokens = mask.any(-1)
        seen.append(F.cosine_similarity(query[tokens].float(), output[tokens].float(), dim=-1).square())

    def mean() -> Tensor:
        values = torch.cat(seen) if seen else torch.zeros(0)
        return values.sum() / max(len(values), 1)

    with contextlib.ExitStack() as stack:
        for unit in find_units(model):
            stack.callback(unit.module.attention.register_forward_hook(keep).remove)
        yield mean
