"""The targets that are ranked together: all of one domain."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from recsys.types import Batch


@runtime_checkable
class EvalBatch(Protocol):
    """What evaluation reads: histories, and what the ranking must know beside their truncated form."""

    @property
    def batch(self) -> Batch:
        """Only the last position asks: its target and its domain."""
        ...

    @property
    def seen(self) -> Int[Tensor, "batch seen"]:
        """Every item of the untruncated history, filled up with `PAD_ID`."""
        ...

    @property
    def history(self) -> Int[Tensor, " batch"]:
        """Events before the target, not truncated."""
        ...


@dataclass(frozen=True)
class Targets:
    """Some rows of an EvalBatch."""

    batch: Batch
    seen: Int[Tensor, "batch seen"]
    history: Int[Tensor, " batch"]

    @property
    def user(self) -> Int[Tensor, " batch"]:
        return self.batch.user

    @property
    def target(self) -> Int[Tensor, " batch"]:
        return self.batch.targets[:, -1]

    @property
    def domain(self) -> int:
        domains = self.batch.target_domains[:, -1]
        assert bool((domains == domains[0]).all()), "the targets of an evaluation batch share one domain"
        return int(domains[0])
