"""How a training step weighs the run's loss against a model's further terms: a common descent of both."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from recsys.loading import Config

Pair = tuple[float, float]


class ParetoConfig(Config):
    """Weights that make each step descend the loss and the terms at once, as far as both can be (MGDA, ParetoMTL)."""

    name: Literal["pareto"] = "pareto"
    sectors: Annotated[int, Field(ge=2)] | None = None
    """K: the vectors p_k = (cos(k pi / 2K), sin(k pi / 2K)), k = 0 … K, divide all pairs (loss, terms) by which of
    them is nearest, and pairs near p_1 are asked for, as in AutoCDSR. The larger K, the smaller the terms beside the
    loss. null: no such preference."""

    def build(self) -> "Pareto":
        return Pareto(self.sectors)


class Pareto:
    """The weighted sum of two losses whose gradient is the min-norm point of theirs.

    MGDA (Désidéri, 2012; Sener & Koltun, 2018): of all convex combinations of the gradients the shortest descends
    every loss, or is zero where no direction does. Gradients are divided by their norms first, so neither the scale
    of a loss nor how far it has come decides. For two gradients alone that point is half way between them: each
    counts alike, and where they are opposed they cancel. The weights found belong to the divided gradients, so a loss
    is multiplied by its weight and divided by its gradient's norm; multiplied by the weight alone, as released code
    does, two losses would without a preference just be added.

    With `sectors` (ParetoMTL, Lin et al., 2019): while the losses l lie nearer to another vector p_k than to p_1, the
    gradient of (p_k - p_1) . l joins the two, so the step also goes towards p_1.

    Norms and angles are those of the weights given; the others follow the same sum.
    """

    def __init__(self, sectors: int | None) -> None:
        self.preferences = (
            [] if sectors is None else [_direction(k * math.pi / (2 * sectors)) for k in range(sectors + 1)]
        )

    def weights(
        self, loss: Float[Tensor, ""], terms: Float[Tensor, ""], parameters: Sequence[Tensor]
    ) -> tuple[float, float]:
        """What to multiply the two with before they are added; the graph is kept for the step's backward pass.

        Their scale is that of the loss: (1, r) without a preference, r being the ratio of the norms of the gradients.
        Where a gradient is zero or not finite there is nothing to balance, and both count as they are.
        """
        of_loss, of_terms = (_slopes(value, parameters) for value in (loss, terms))
        one, two, between = _dot(of_loss, of_loss), _dot(of_terms, of_terms), _dot(of_loss, of_terms)
        if not (one > 0 and two > 0 and math.isfinite(one + two)):
            return 1.0, 1.0
        cosine = max(-1.0, min(1.0, between / math.sqrt(one * two)))
        first, second = min_norm_point([(1.0, 0.0), (0.0, 1.0), *self._wishes((loss.item(), terms.item()))], cosine)
        size = (abs(first) + abs(second)) / 2
        return first / size, second / size * math.sqrt(one / two)

    def _wishes(self, losses: Pair) -> list[Pair]:
        """The p_k - p_1 of the vectors that the losses are nearer to than to p_1."""
        if not self.preferences:
            return []
        asked = self.preferences[1]
        steps = [(p[0] - asked[0], p[1] - asked[1]) for p in self.preferences if p != asked]
        return [step for step in steps if step[0] * losses[0] + step[1] * losses[1] > 0]


def min_norm_point(points: Sequence[Pair], cosine: float) -> Pair:
    """The point of least norm in the convex hull of points in the plane, given in coordinates along two unit vectors.

    `cosine` is that of the angle between the unit vectors. The hull must not hold (0, 0) inside, so the point lies on
    a side of it, where the closed form for two points finds it.
    """

    def inner(a: Pair, b: Pair) -> float:
        return a[0] * b[0] + a[1] * b[1] + cosine * (a[0] * b[1] + a[1] * b[0])

    def between(a: Pair, b: Pair) -> Pair:
        away = (a[0] - b[0], a[1] - b[1])
        length = inner(away, away)
        share = 0.5 if length <= 1e-12 else max(0.0, min(1.0, -inner(away, b) / length))
        return share * a[0] + (1 - share) * b[0], share * a[1] + (1 - share) * b[1]

    candidates = [between(a, b) for a, b in combinations(points, 2)]
    return min(candidates, key=lambda point: inner(point, point))


def _direction(angle: float) -> Pair:
    return math.cos(angle), math.sin(angle)


def _slopes(value: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """None for a parameter that the value does not depend on."""
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    products = [(x * y).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return torch.stack(products).sum().item() if products else 0.0
