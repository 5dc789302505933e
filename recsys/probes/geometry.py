"""Geometry of a cloud of vectors, from its sums: what two clouds share, how much one says about another.

Every function takes sums or covariances with any number of leading axes, in fp64. What is undefined is NaN.
"""

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-6
"""Of every regression, times the predictors' mean variance."""

_ROUNDING = 1e-14
"""A variance below this share of the mean square is what rounding leaves of a constant."""

Scalar = Float[Tensor, "*sets"]


def centred(
    tokens: Scalar, sums: Float[Tensor, "*sets width"], products: Float[Tensor, "*sets width width"]
) -> Float[Tensor, "*sets width width"]:
    """Σ (x − mean)(x − mean)' from n, Σ x and Σ x x'."""
    return products - sums[..., :, None] * sums[..., None, :] / tokens.clamp(min=1)[..., None, None]


def trace(matrix: Float[Tensor, "*sets width width"]) -> Scalar:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def varies(scatter: Float[Tensor, "*sets width width"], products: Float[Tensor, "*sets width width"]) -> Tensor:
    """Whether a cloud has more variance than rounding makes; `products` are those that were centred."""
    return trace(scatter) > _ROUNDING * trace(products)


def regress(
    target: Float[Tensor, "*sets d_target d_target"],
    cross: Float[Tensor, "*sets width d_target"],
    predictors: Float[Tensor, "*sets width width"],
) -> tuple[Float[Tensor, "*sets d_target d_target"], Scalar]:
    """What a ridge regression leaves of `target`, and the degrees of freedom it spends, from centred sums.

    The ridge keeps predictors that depend on each other from breaking it; it spends no freedom on directions in which
    they do not vary.
    """
    width = predictors.shape[-1]
    variance = trace(predictors) / width
    ridge = torch.where(variance > 0, RIDGE * variance, 1.0)
    lifted = predictors + ridge[..., None, None] * torch.eye(width, dtype=predictors.dtype, device=predictors.device)
    solved = torch.linalg.solve(lifted, torch.cat([cross, predictors], dim=-1))
    left = target - cross.transpose(-1, -2) @ solved[..., : cross.shape[-1]]
    return left, trace(solved[..., cross.shape[-1] :])


def r_squared(
    target: Float[Tensor, "*sets d_target d_target"],
    left: Float[Tensor, "*sets d_target d_target"],
    tokens: Scalar,
    freedom: Scalar,
) -> Scalar:
    """Adjusted R²: 0 is what predictors without any relation reach, whatever their number.

    1 − (left / (n − 1 − freedom)) / (all / (n − 1)), over the sum of the target's coordinates; it may be below 0.
    """
    rest = tokens - 1 - freedom
    share = 1 - trace(left) / trace(target) * (tokens - 1) / rest
    return torch.where(rest > 0.5, share, torch.nan)


def conditional_information(
    target: Float[Tensor, "*sets d_target d_target"],
    left_one: Float[Tensor, "*sets d_target d_target"],
    freedom_one: Scalar,
    left_both: Float[Tensor, "*sets d_target d_target"],
    freedom_both: Scalar,
    tokens: Scalar,
) -> Scalar:
    """I(target; second | first) in nats if all were Gaussian: ½ (log det S_{y|x} − log det S_{y|xz}).

    A floor of `RIDGE` times the target's mean variance under both bounds it where nothing is left.
    """
    width = target.shape[-1]
    floor = (RIDGE * trace(target) / width / (tokens - 1))[..., None, None]
    floor = floor * torch.eye(width, dtype=target.dtype, device=target.device)

    def log_det(left: Tensor, freedom: Tensor) -> Tensor:
        return torch.linalg.slogdet(left / (tokens - 1 - freedom)[..., None, None] + floor).logabsdet

    difference = (log_det(left_one, freedom_one) - log_det(left_both, freedom_both)) / 2
    return torch.where(tokens - 1 - freedom_both > 0.5, difference, torch.nan)


def unbiased_hsic(
    tokens: Scalar,
    sum_x: Float[Tensor, "*sets d_x"],
    sum_y: Float[Tensor, "*sets d_y"],
    cross: Float[Tensor, "*sets d_x d_y"],
    square_x: Scalar,
    square_y: Scalar,
    square_xy: Scalar,
    weighted_x: Float[Tensor, "*sets d_x"],
    weighted_y: Float[Tensor, "*sets d_y"],
) -> Scalar:
    """HSIC₁ of Song et al. (2012) for linear kernels, without any Gram matrix.

    From Σ x, Σ y, Σ x y', Σ |x|², Σ |y|², Σ |x|²|y|², Σ |y|² x and Σ |x|² y. With K and L the Gram matrices without
    their diagonals, n (n − 3) HSIC₁ = tr KL + 1'K1 · 1'L1 / ((n − 1)(n − 2)) − 2 · 1'KL1 / (n − 2). Needs n > 3.
    """
    trace_kl = cross.square().sum((-2, -1)) - square_xy
    sum_k = sum_x.square().sum(-1) - square_x
    sum_l = sum_y.square().sum(-1) - square_y
    through = torch.einsum("...i,...ij,...j->...", sum_x, cross, sum_y)
    sum_kl = through - (sum_x * weighted_x).sum(-1) - (sum_y * weighted_y).sum(-1) + square_xy
    total = trace_kl + sum_k * sum_l / ((tokens - 1) * (tokens - 2)) - 2 * sum_kl / (tokens - 2)
    return torch.where(tokens > 3, total / (tokens * (tokens - 3)), torch.nan)


def effective_rank(products: Float[Tensor, "*sets width width"]) -> Scalar:
    """exp of the entropy of the singular values' shares, from Σ x x' (Roy & Vetterli 2007; RankMe)."""
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def participation_ratio(scatter: Float[Tensor, "*sets width width"]) -> Scalar:
    """(Σ λ)² / Σ λ² of a covariance's eigenvalues λ: in how many directions the variance lies."""
    return trace(scatter).square() / scatter.square().sum((-2, -1))


def stable_rank(products: Float[Tensor, "*sets width width"]) -> Scalar:
    """Σ λ / max λ of Σ x x'."""
    return trace(products) / torch.linalg.eigvalsh(products)[..., -1]


def principal_cosines(
    x: Float[Tensor, "*sets width width"], y: Float[Tensor, "*sets width width"], dimension: int
) -> Float[Tensor, "*sets dimension"]:
    """Cosines of the angles between the spans of the leading eigenvectors of two covariances, largest first."""
    bases = (torch.linalg.eigh(matrix).eigenvectors[..., -dimension:] for matrix in (x, y))
    first, second = bases
    return torch.linalg.svdvals(first.transpose(-1, -2) @ second).clamp(max=1)
