"""Chance: what the measures of alignment are where query and output have nothing to do with each other."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.probes.geometry import centred
from recsys.probes.measures import Alignment, Dependence, total


def isotropic(dimension: int) -> dict[str, float]:
    """The measures of `Alignment` for a vector whose direction is uniform in `dimension` dimensions.

    cos² ~ Beta(½, (d − 1) / 2), whatever the query. Two vectors that both come out of a LayerNorm without an affine
    part lie in a space of one dimension less than their width; the output of a cross-attention does not.
    """
    gammas = math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)
    return {
        "cos_mean": 0.0,
        "cos_abs_mean": math.exp(gammas) / math.sqrt(math.pi),
        "cos2_mean": 1 / dimension,
        "cos4_mean": 3 / (dimension * (dimension + 2)),
        "parallel_energy": 1 / dimension,
        "orthogonal_energy": 1 - 1 / dimension,
    }


def unrelated(pairs: Dependence) -> dict[str, float]:
    """The measures of `Dependence` for many outputs that have nothing to do with query and context."""
    nothing = ("centred_cosine", "cka", "r2_query", "r2_context", "r2_both", "cross_domain_share", "information")
    return dict.fromkeys(nothing, 0.0) | {"novelty": 1.0, "subspace_overlap": pairs.subspace / pairs.d_model}


def isotropic_histogram(dimension: int, bins: int) -> Float[np.ndarray, " bins"]:
    """The share of cosines in each of the bins of `Alignment`, for a uniform direction."""
    from scipy.special import betainc

    edges = np.linspace(-1, 1, bins + 1)
    if dimension == 1:
        below = np.where(edges < 1, 0.5, 1.0)
        below[0] = 0.0
    else:
        below = (1 + np.sign(edges) * betainc(0.5, (dimension - 1) / 2, np.minimum(edges**2, 1))) / 2
    return np.diff(below)


def covariance_matched(pairs: Dependence, samples: int, seed: int, bins: int) -> Alignment | None:
    """Cosines of independent Gaussian queries and outputs that have the means and covariances of those in `pairs`.

    It is what anisotropy and a common mean make on their own. None without tokens. The draw depends on the seed alone.
    """
    sums = {name: value.cpu() for name, value in total(pairs).items()}
    tokens = sums["tokens"]
    if tokens == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for block in (slice(0, pairs.d_model), slice(2 * pairs.d_model, None)):
        mean = sums["sums"][block] / tokens
        covariance = centred(tokens, sums["sums"][block], sums["products"][block, block]) / tokens
        values, vectors = torch.linalg.eigh(covariance)
        noise = torch.randn(samples, pairs.d_model, generator=generator, dtype=torch.float64)
        drawn.append(mean + (noise * values.clamp(min=0).sqrt()) @ vectors.T)
    chance = Alignment(bins=bins)
    chance.update(drawn[0], drawn[1][:, None], torch.zeros(samples, dtype=torch.int64))
    return chance


def other_users(
    user: Int[Tensor, " rows"], tokens: Bool[Tensor, "rows length"], generator: torch.Generator
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """For every token a row of another user with a token in the same column, each row of a column taken once.

    Columns are places counted from the end of the domain's stream. The second result is False where a column has no
    such row. `generator` lies on the CPU.
    """
    unique, inverse = user.unique(return_inverse=True)
    place = torch.randperm(len(unique), generator=generator).to(user.device)
    order = place[inverse].argsort(stable=True)  # users in random order, the rows of one side by side
    present = tokens[order]
    most = torch.zeros(len(unique), tokens.shape[1], dtype=torch.int64, device=user.device)
    step = most.index_add_(0, inverse, tokens.long()).amax(0) if len(unique) else most.sum(0)
    number = present.long().cumsum(0) - 1
    following = (number + step) % present.sum(0).clamp(min=1)
    rows = (~present).byte().argsort(dim=0, stable=True)  # of each column, those with a token first
    partner = torch.zeros_like(following)
    partner[order] = order[rows.gather(0, following)]
    return partner, tokens & (user[partner] != user[:, None])
