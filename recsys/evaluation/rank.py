"""The ranking core: where the target stands among its candidates, as an interval where scores tie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from recsys.errors import UserError
from recsys.precision import at_least_fp32

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


def hide(
    scores: Float[Tensor, "batch candidates"],
    target_index: Int[Tensor, " batch"],
    excluded: Int[Tensor, "batch some"] | None,
    users: Int[Tensor, " batch"],
) -> Float[Tensor, "batch candidates"]:
    """What there is to rank: the scores, -inf for the `excluded` columns of each row.

    The target never is excluded; its column fills up rows that exclude fewer. Half precision is raised to fp32 (which
    cannot undo the ties of a product that was rounded to it). Raises NonFiniteScores, naming `users`, if a score that
    is not excluded is NaN or infinite.
    """
    scores = at_least_fp32(scores)
    if excluded is None:
        require_finite(scores, users)
        return scores
    target = target_index[:, None]
    own = scores.gather(1, target)
    if not _finite(scores):
        require_finite(scores.scatter(1, excluded, 0).scatter_(1, target, own), users)
    return scores.scatter(1, excluded, -torch.inf).scatter_(1, target, own)


def rank(visible: Float[Tensor, "batch candidates"], target_index: Int[Tensor, " batch"]) -> RankInterval:
    """Rank of each row's target among the row's candidates; -inf marks what is none (see `hide`)."""
    target = visible.gather(1, target_index[:, None])
    greater, equal, candidates = _counts(visible, (torch.gt, target), (torch.eq, target), (torch.gt, -torch.inf))
    return RankInterval(greater, equal - 1, candidates)


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
    scores = at_least_fp32(scores)
    target = scores.gather(1, target_index[:, None])
    rivals = scores.gather(1, negatives)
    require_finite(torch.cat([target, rivals], dim=1), users)
    greater, at_least = _counts(rivals, (torch.gt, target + margin), (torch.ge, target - margin))
    filled_up = rivals.shape[1] - real.sum(1)  # with the target, which ties with itself
    return RankInterval(greater, at_least - greater - filled_up, 1 + real.sum(1))


def _counts(
    scores: Float[Tensor, "batch candidates"], *conditions: tuple[Callable[..., Tensor], Tensor | float]
) -> list[Int[Tensor, " batch"]]:
    """How many scores of each row fulfil each of some comparisons."""
    # Ones and zeros in the type of the scores are made and summed several times faster than booleans on a CPU.
    found = torch.empty_like(scores)
    exact = torch.float64 if scores.shape[1] > 2**24 else None  # fp32 counts up to there
    return [compare(scores, bound, out=found).sum(1, dtype=exact).long() for compare, bound in conditions]


def cross_entropy(
    scores: Float[Tensor, "batch candidates"], target_index: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Softmax cross-entropy of the target in nats; -inf marks what is no candidate.

    It means something where scores are logits. It runs in fp64, so that neither the order of the items nor the number
    of rows shows (an exponential in fp32 depends in its last bit on where its element lies in the tensor).
    """
    rows = max(1, _CELLS // scores.shape[1])
    parts = zip(scores.split(rows), target_index.split(rows), strict=True)
    return torch.cat([F.cross_entropy(part.double(), index, reduction="none") for part, index in parts]).float()


def require_finite(scores: Float[Tensor, "batch candidates"], users: Int[Tensor, " batch"]) -> None:
    """Raise NonFiniteScores, naming the first users, if a score is NaN or infinite."""
    if _finite(scores):
        return
    bad = ~scores.isfinite()
    rows = bad.any(1)
    named = users[rows].unique().tolist()
    listed = ", ".join(map(str, named[:5])) + (", ..." if len(named) > 5 else "")
    raise NonFiniteScores(
        f"{int(bad.sum()):,} scores of {int(rows.sum()):,} out of {len(users):,} targets are NaN or infinite "
        f"(users {listed}): the model has diverged or its scores overflow; nothing was ranked"
    )


def _finite(scores: Float[Tensor, "batch candidates"]) -> bool:
    # A sum is not finite if a term is not, and takes a fifth of the time of a look at each; it can overflow, though.
    return bool(scores.sum(1).isfinite().all()) or bool(scores.isfinite().all())
