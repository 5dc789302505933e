"""The ranking core: where the target stands among its candidates, as an interval where scores tie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.errors import UserError

_CELLS = 2**19
"""Scores that are held in fp64 at a time: few enough for a cache."""

Ties = Literal["average", "optimistic", "pessimistic"]
"""What a tie with the target means: the expectation over a random order of the tied, its best or its worst case."""


class NonFiniteScores(UserError):
    """A model gave NaN or infinite scores: every rank rule turns them into a rank, and a comparison into a good one."""


@dataclass(frozen=True, slots=True)
class RankInterval:
    """The target's 1-based rank lies in `[1 + greater, 1 + greater + ties]`; one entry per target."""

    greater: Int[Tensor, " batch"]
    """Candidates that score strictly above the target."""
    ties: Int[Tensor, " batch"]
    """Other candidates with the target's score."""
    candidates: Int[Tensor, " batch"]
    """Candidates that were ranked, the target included."""

    @staticmethod
    def concatenate(parts: Sequence["RankInterval"]) -> "RankInterval":
        return RankInterval(
            torch.cat([part.greater for part in parts]),
            torch.cat([part.ties for part in parts]),
            torch.cat([part.candidates for part in parts]),
        )

    def settle(self, ties: Ties) -> "RankInterval":
        """The interval under a tie rule: unchanged for the average, else shrunk to its first or last rank."""
        if ties == "average":
            return self
        greater = self.greater if ties == "optimistic" else self.greater + self.ties
        return RankInterval(greater, torch.zeros_like(self.ties), self.candidates)


def rank(
    scores: Float[Tensor, "batch candidates"],
    target_index: Int[Tensor, " batch"],
    excluded: Bool[Tensor, "batch candidates"] | None,
    users: Int[Tensor, " batch"],
    visible: Float[Tensor, "batch candidates"] | None = None,
) -> RankInterval:
    """Rank of each row's target among the row's candidates that are not `excluded`; the target never is.

    `visible`: what `hide` makes of both, where it is there already. Half precision is raised to fp32 (which cannot undo
    the ties of a product that was rounded to it). Raises NonFiniteScores, naming `users`, if a counted score is NaN or
    infinite.
    """
    scores = _at_least_fp32(scores)
    candidates = torch.full_like(target_index, scores.shape[1], dtype=torch.int64)
    if excluded is not None:
        excluded = excluded.scatter(1, target_index[:, None], False)
        candidates -= _count(excluded)
    require_finite(scores, excluded, users)
    if visible is None:
        visible = hide(scores, excluded)
    target = visible.gather(1, target_index[:, None])
    return RankInterval(_count(visible > target), _count(visible == target) - 1, candidates)


def hide(
    scores: Float[Tensor, "batch candidates"], excluded: Bool[Tensor, "batch candidates"] | None
) -> Float[Tensor, "batch candidates"]:
    """-inf where excluded, which is neither above a finite score nor equal to it."""
    return scores if excluded is None else scores.masked_fill(excluded, -torch.inf)


def rank_sampled(
    scores: Float[Tensor, "batch candidates"],
    target_index: Int[Tensor, " batch"],
    negatives: Int[Tensor, "batch negatives"],
    users: Int[Tensor, " batch"],
    margin: float = 0.0,
) -> RankInterval:
    """Rank of each row's target among its own `negatives` (columns of `scores`; a repeated one counts repeatedly).

    A negative equal to the target is no negative: that is how rows with fewer of them are filled up. Scores within
    `margin` of the target's tie with it. Raises NonFiniteScores as `rank` does.
    """
    real = negatives != target_index[:, None]
    scores = _at_least_fp32(scores)
    target = scores.gather(1, target_index[:, None])
    rivals = scores.gather(1, negatives)
    require_finite(torch.cat([target, rivals], dim=1), None, users)
    greater = (rivals > target + margin).sum(1)
    ties = (real & (rivals >= target - margin)).sum(1) - greater
    return RankInterval(greater, ties, 1 + real.sum(1))


def cross_entropy(
    scores: Float[Tensor, "batch candidates"], target_index: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Softmax cross-entropy of the target in nats; -inf marks what is no candidate.

    It means something where scores are logits. It runs in fp64, so that neither the order of the items nor the number
    of rows shows (an exponential in fp32 depends in its last bit on where its element lies in the tensor).
    """
    peak = scores.amax(1, keepdim=True).double()
    rows = max(1, _CELLS // scores.shape[1])
    parts = zip(scores.split(rows), peak.split(rows), strict=True)
    total = torch.cat([torch.sub(part, top).exp_().sum(1) for part, top in parts])
    target = scores.gather(1, target_index[:, None])
    return (total.log() + (peak - target).squeeze(1)).float()


def require_finite(
    scores: Float[Tensor, "batch candidates"],
    excluded: Bool[Tensor, "batch candidates"] | None,
    users: Int[Tensor, " batch"],
) -> None:
    """Raise NonFiniteScores, naming the first users, if a score that is not excluded is NaN or infinite."""
    low, high = scores.aminmax()  # one pass; a NaN anywhere makes both NaN
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = ~scores.isfinite()
    if excluded is not None:
        bad &= ~excluded
    rows = bad.any(1)
    if not rows.any():
        return
    named = users[rows].unique().tolist()
    listed = ", ".join(map(str, named[:5])) + (", ..." if len(named) > 5 else "")
    raise NonFiniteScores(
        f"{int(bad.sum()):,} scores of {int(rows.sum()):,} out of {len(users):,} targets are NaN or infinite "
        f"(users {listed}): the model has diverged or its scores overflow; nothing was ranked"
    )


def _count(chosen: Bool[Tensor, "batch candidates"]) -> Int[Tensor, " batch"]:
    """Of each row; sums of bytes into 64 bits would be copied into them first."""
    return chosen.sum(1, dtype=torch.int32).long()


def _at_least_fp32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
