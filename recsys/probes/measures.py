"""What is measured of a cross-attention: sums over tokens, and what follows from them.

Each metric is fp64 sums over tokens, so it does not depend on batches and adds up over processes. The first axis of
every sum is the fold: users are divided into folds, and the spread between them gives an interval in which the user,
not the token, is the unit (`jackknife`). `measures` turns sums, with the folds added up or any of them left out, into
values; an undefined value is NaN.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from recsys.probes.geometry import (
    centred,
    conditional_information,
    effective_rank,
    participation_ratio,
    principal_cosines,
    r_squared,
    regress,
    stable_rank,
    trace,
    unbiased_hsic,
    varies,
)

Sums = Mapping[str, Tensor]


@runtime_checkable
class Folded(Protocol):
    """A metric whose sums are kept apart by fold."""

    def folds(self) -> dict[str, Tensor]:
        """The sums by name, `folds …`."""
        ...


class Estimate(NamedTuple):
    """A value and its 95 % interval, which is NaN where there are fewer than two folds with tokens."""

    value: Tensor
    low: Tensor
    high: Tensor

    def exp(self) -> "Estimate":
        return Estimate(self.value.exp(), self.low.exp(), self.high.exp())


def total(metric: Folded) -> dict[str, Tensor]:
    """The sums over all folds."""
    return {name: value.sum(0) for name, value in metric.folds().items()}


def fold_of(user: Int[Tensor, " tokens"], num_folds: int) -> Int[Tensor, " tokens"]:
    """A user's fold, always the same one; neighbouring ids are spread out (Knuth's multiplicative hash)."""
    return (user.long() * 2_654_435_761 >> 16) % num_folds


def jackknife(measures: Callable[..., dict[str, Tensor]], *metrics: Folded) -> dict[str, Estimate]:
    """`measures` of the metrics' sums over all folds, with the interval of the delete-a-group jackknife.

    Folds without any token are left out. The quantile is that of a t distribution with one degree of freedom less
    than there are folds.
    """
    from scipy.special import stdtrit  # not needed to train

    folded = [metric.folds() for metric in metrics]
    present = torch.stack([sums["tokens"].reshape(len(sums["tokens"]), -1).sum(1) > 0 for sums in folded]).any(0)
    groups = int(present.sum())

    def sets(sums: Tensor) -> Tensor:
        """The whole, then all but one fold each."""
        whole = sums.sum(0, keepdim=True)
        return torch.cat([whole, whole - sums[present]])

    found = measures(*({name: sets(value) for name, value in sums.items()} for sums in folded))
    estimates = {}
    for name, values in found.items():
        value, others = values[0], values[1:]
        if groups < 2:
            estimates[name] = Estimate(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
            continue
        error = ((others - others.mean(0)).square().sum(0) * (groups - 1) / groups).sqrt()
        reach = float(stdtrit(groups - 1, 0.975)) * error
        estimates[name] = Estimate(value, value - reach, value + reach)
    return estimates


class Alignment(Metric):
    """How vectors lie to the query they were made for: cosine c, and energy along it.

    Several vectors per token are measured at once (X', its heads' parts, the update); a value per part. A token whose
    query or vector is zero has no direction: it is counted in `zeros` and in nothing else of that part.
    """

    full_state_update = False
    tokens: Tensor
    zeros: Tensor
    cos: Tensor
    cos_abs: Tensor
    cos_2: Tensor
    cos_4: Tensor
    dot: Tensor
    parallel: Tensor
    energy: Tensor
    histogram: Tensor

    def __init__(self, num_parts: int = 1, num_folds: int = 1, bins: int = 200) -> None:
        super().__init__()
        self.num_folds = num_folds
        self.bins = bins
        for name in _ALIGNMENT:
            self.add_state(name, torch.zeros(num_folds, num_parts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(num_parts, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        query: Float[Tensor, "tokens d_model"],
        vectors: Float[Tensor, "tokens parts d_model"],
        fold: Int[Tensor, " tokens"],
    ) -> None:
        query, vectors = query.double(), vectors.double()
        dot = torch.einsum("nd,npd->np", query, vectors)
        length, energy = query.norm(dim=-1)[:, None], vectors.square().sum(-1)
        known = (length > 0) & (energy > 0)
        along = torch.where(known, dot / length, 0.0)
        cos = torch.where(known, along / energy.sqrt(), 0.0).clamp(-1, 1)
        values = (known, ~known, cos, cos.abs(), cos**2, cos**4, torch.where(known, dot, 0.0), along**2, energy * known)
        for name, value in zip(_ALIGNMENT, values, strict=True):
            getattr(self, name).add_(_by_fold(value.double(), fold, self.num_folds))
        self.histogram += _histogram(cos, known, self.bins)

    def folds(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _ALIGNMENT}

    def compute(self) -> dict[str, Tensor]:
        return self.measures(total(self))

    @staticmethod
    def measures(sums: Sums) -> dict[str, Tensor]:
        """`cos_mean` to `cos4_mean`: moments over tokens, E[cos²] being the share of a token's energy that is parallel
        to its query, 1 − E[cos²] the orthogonal one. `parallel_energy` and `orthogonal_energy`: the same shares with
        each token weighted by its energy. `zero_share`: tokens without a direction.
        """
        tokens = sums["tokens"]
        parallel = sums["parallel"] / sums["energy"]
        return {
            "cos_mean": sums["cos"] / tokens,
            "cos_abs_mean": sums["cos_abs"] / tokens,
            "cos2_mean": sums["cos_2"] / tokens,
            "cos4_mean": sums["cos_4"] / tokens,
            "parallel_energy": parallel,
            "orthogonal_energy": 1 - parallel,
            "zero_share": sums["zeros"] / (tokens + sums["zeros"]),
        }

    @staticmethod
    def signed_shares(sums: Sums) -> dict[str, Tensor]:
        """`signed_share`: x · part as a share of x · X', the first part; parts that add up to X' add up to 1."""
        whole = sums["dot"][..., :1]
        return {"signed_share": torch.where(whole != 0, sums["dot"] / whole, torch.nan)}

    @staticmethod
    def log_ratio(sums: Sums, chance: Sums) -> dict[str, Tensor]:
        """`alignment_ratio`: log of E[cos²] over E[cos²] of the pairs in `chance`; 0 means no more than chance."""
        ratio = (sums["cos_2"] / sums["tokens"]) / (chance["cos_2"] / chance["tokens"])
        return {"alignment_ratio": torch.where(ratio > 0, ratio.log(), torch.nan)}


_ALIGNMENT = ("tokens", "zeros", "cos", "cos_abs", "cos_2", "cos_4", "dot", "parallel", "energy")


class NormBudget(Metric):
    """How large the update G is beside the stream X that it is added to, and how far it turns it."""

    full_state_update = False
    tokens: Tensor
    zeros: Tensor
    ratio: Tensor
    turned: Tensor
    update_energy: Tensor
    query_energy: Tensor

    def __init__(self, num_folds: int = 1) -> None:
        super().__init__()
        self.num_folds = num_folds
        for name in _BUDGET:
            self.add_state(name, torch.zeros(num_folds, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        query: Float[Tensor, "tokens d_model"],
        update: Float[Tensor, "tokens d_model"],
        fold: Int[Tensor, " tokens"],
    ) -> None:
        query, update = query.double(), update.double()
        length, size = query.norm(dim=-1), update.norm(dim=-1)
        result = query + update
        known = (length > 0) & (result.norm(dim=-1) > 0)
        turned = torch.where(known, (query * result).sum(-1) / (length * result.norm(dim=-1)), 0.0).clamp(-1, 1)
        ratio = torch.where(known, size / length, 0.0)
        values = (known, ~known, ratio, turned, size**2, length**2)
        for name, value in zip(_BUDGET, values, strict=True):
            getattr(self, name).add_(_by_fold(value.double()[:, None], fold, self.num_folds)[:, 0])

    def folds(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _BUDGET}

    def compute(self) -> dict[str, Tensor]:
        return self.measures(total(self))

    @staticmethod
    def measures(sums: Sums) -> dict[str, Tensor]:
        """`norm_ratio`: mean of |G| / |X| per token; `norm_ratio_rms`: root of Σ|G|² / Σ|X|²; `cos_result`: mean
        cos(X, X + G). Tokens whose stream is zero before or after are left out of the means.
        """
        return {
            "norm_ratio": sums["ratio"] / sums["tokens"],
            "norm_ratio_rms": (sums["update_energy"] / sums["query_energy"]).sqrt(),
            "cos_result": sums["turned"] / sums["tokens"],
        }


_BUDGET = ("tokens", "zeros", "ratio", "turned", "update_energy", "query_energy")


class Dependence(Metric):
    """What the output of a cross-attention shares with its query and with its context, from joint second moments.

    The context of a token is one vector: the probe takes the mean of the states that the token may attend to, as the
    attention reads them (after their LayerNorm). An attention-weighted mean would not do: the output of a single head
    is a linear map of it by construction.
    """

    full_state_update = False
    tokens: Tensor
    sums: Tensor
    products: Tensor
    weighted: Tensor
    squares: Tensor

    def __init__(self, d_model: int, num_folds: int = 1, subspace: int = 8) -> None:
        """`subspace`: dimension of the leading subspaces whose principal angles are taken."""
        super().__init__()
        self.d_model = d_model
        self.num_folds = num_folds
        self.subspace = min(subspace, d_model)
        width = 3 * d_model
        shapes = {"tokens": (), "sums": (width,), "products": (width, width), "weighted": (3, width), "squares": (3, 3)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(num_folds, *shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        query: Float[Tensor, "tokens d_model"],
        context: Float[Tensor, "tokens d_model"],
        output: Float[Tensor, "tokens d_model"],
        fold: Int[Tensor, " tokens"],
    ) -> None:
        order = fold.argsort(stable=True)
        joint = torch.cat([query, context, output], dim=1).double()[order]
        square = joint.unflatten(1, (3, self.d_model)).square().sum(-1)
        counts = torch.bincount(fold, minlength=self.num_folds).tolist()
        for index, (rows, squares) in enumerate(zip(joint.split(counts), square.split(counts), strict=True)):
            if len(rows):
                self.tokens[index] += len(rows)
                self.sums[index] += rows.sum(0)
                self.products[index].addmm_(rows.T, rows)
                self.weighted[index].addmm_(squares.T, rows)
                self.squares[index].addmm_(squares.T, squares)

    def folds(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("tokens", "sums", "products", "weighted", "squares")}

    def compute(self) -> dict[str, Tensor]:
        sums = total(self)
        return {**self.shape(sums), **self.shared(sums), **self.explained(sums)}

    def shape(self, sums: Sums) -> dict[str, Tensor]:
        """`effective_rank` and `stable_rank` of uncentred vectors, `participation_ratio` of centred ones; a value each
        for query, context and output.
        """
        found: dict[str, list[Tensor]] = {"effective_rank": [], "participation_ratio": [], "stable_rank": []}
        for block in self._blocks():
            products = sums["products"][..., block, block]
            scatter = centred(sums["tokens"], sums["sums"][..., block], products)
            there, spread = trace(products) > 0, varies(scatter, products)
            found["effective_rank"].append(_where(there, effective_rank(products)))
            found["participation_ratio"].append(_where(spread, participation_ratio(scatter)))
            found["stable_rank"].append(_where(there, stable_rank(products)))
        return {name: torch.stack(values, dim=-1) for name, values in found.items()}

    def shared(self, sums: Sums) -> dict[str, Tensor]:
        """Query and output as clouds.

        `centred_cosine`: Σ (x − mean)·(y − mean) over the root of both sums of squares. `cka`: unbiased linear CKA,
        which may be slightly negative. `subspace_overlap`: mean cos² of the principal angles between the leading
        subspaces; `principal_angle`: the smallest of them, in degrees.
        """
        x, _, y = self._blocks()
        tokens, products = sums["tokens"], sums["products"]
        scatter = centred(tokens, sums["sums"], products)
        s_xx, s_xy, s_yy = scatter[..., x, x], scatter[..., x, y], scatter[..., y, y]
        both = varies(s_xx, products[..., x, x]) & varies(s_yy, products[..., y, y])
        cosines = principal_cosines(s_xx, s_yy, self.subspace)
        return {
            "centred_cosine": _where(both, trace(s_xy) / (trace(s_xx).sqrt() * trace(s_yy).sqrt())),
            "cka": _where(both, self._cka(sums)),
            "subspace_overlap": _where(both, cosines.square().mean(-1)),
            "principal_angle": _where(both, cosines[..., 0].acos().rad2deg()),
        }

    def explained(self, sums: Sums) -> dict[str, Tensor]:
        """What linear maps of query, context or both say about the output.

        `r2_query`, `r2_context`, `r2_both` are adjusted: chance is 0. `novelty` = 1 − r2_query,
        `cross_domain_share` = r2_both − r2_query, `information`: Gaussian I(output; context | query) in nats.
        """
        x, z, y = self._blocks()
        tokens, products = sums["tokens"], sums["products"]
        scatter = centred(tokens, sums["sums"], products)
        target = scatter[..., y, y]
        moves = varies(target, products[..., y, y])
        left, freedom, fit = {}, {}, {}
        for name, block in {"query": x, "context": z, "both": slice(0, 2 * self.d_model)}.items():
            left[name], freedom[name] = regress(target, scatter[..., block, y], scatter[..., block, block])
            fit[name] = _where(moves, r_squared(target, left[name], tokens, freedom[name]))
        information = conditional_information(
            target, left["query"], freedom["query"], left["both"], freedom["both"], tokens
        )
        return {
            **{f"r2_{name}": value for name, value in fit.items()},
            "novelty": 1 - fit["query"],
            "cross_domain_share": fit["both"] - fit["query"],
            "information": _where(moves, information),
        }

    def beyond(self, sums: Sums, control: Sums) -> dict[str, Tensor]:
        """Novelty and cross-domain share less those of a control.

        0 where context and query have nothing to do with each other. Where they belong to one user and agree, a part of
        what the context says is in the query already, and both fall below 0: they measure overlap, not gain.
        """
        real, other = self.explained(sums), self.explained(control)
        return {f"{name}_beyond_control": real[name] - other[name] for name in ("novelty", "cross_domain_share")}

    def energies(self, sums: Sums, budget: Sums) -> dict[str, Tensor]:
        """`novel_energy` and `cross_domain_energy`: novelty and cross-domain share of the output, times the energy of
        the update over that of the stream (`budget` holds the sums of a `NormBudget`).

        The shares themselves do not see how much is added: those of an output that the gate shuts out may be high.
        """
        found = self.explained(sums)
        size = budget["update_energy"] / budget["query_energy"]
        return {"novel_energy": found["novelty"] * size, "cross_domain_energy": found["cross_domain_share"] * size}

    def _blocks(self) -> tuple[slice, slice, slice]:
        """Query, context, output."""
        first, second, third = (slice(i * self.d_model, (i + 1) * self.d_model) for i in range(3))
        return first, second, third

    def _cka(self, sums: Sums) -> Tensor:
        blocks = self._blocks()

        def hsic(i: int, j: int) -> Tensor:
            a, b = blocks[i], blocks[j]
            return unbiased_hsic(
                sums["tokens"],
                sums["sums"][..., a],
                sums["sums"][..., b],
                sums["products"][..., a, b],
                trace(sums["products"][..., a, a]),
                trace(sums["products"][..., b, b]),
                sums["squares"][..., i, j],
                sums["weighted"][..., j, a],
                sums["weighted"][..., i, b],
            )

        own_x, own_y = hsic(0, 0), hsic(2, 2)
        return _where((own_x > 0) & (own_y > 0), hsic(0, 2) / (own_x.sqrt() * own_y.sqrt()))


class AttentionEntropy(Metric):
    """How evenly the heads look at their valid keys; a value per head."""

    full_state_update = False
    tokens: Tensor
    choosing: Tensor
    entropy: Tensor
    largest: Tensor
    keys: Tensor

    def __init__(self, num_heads: int, num_folds: int = 1) -> None:
        super().__init__()
        self.num_folds = num_folds
        for name in _ENTROPY:
            self.add_state(name, torch.zeros(num_folds, num_heads, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        weights: Float[Tensor, "tokens heads context"],
        valid: Bool[Tensor, "tokens context"],
        fold: Int[Tensor, " tokens"],
    ) -> None:
        """`weights` sum to 1 over the valid keys, of which every token has at least one."""
        keys = valid.sum(-1, keepdim=True).expand(weights.shape[:2]).double()
        choosing = keys > 1
        entropy = torch.special.entr(weights).sum(-1).double()
        values = (
            torch.ones_like(keys),
            choosing,
            torch.where(choosing, entropy / keys.clamp(min=2).log(), 0.0),
            torch.where(choosing, weights.amax(-1).double(), 0.0),
            keys,
        )
        for name, value in zip(_ENTROPY, values, strict=True):
            getattr(self, name).add_(_by_fold(value.double(), fold, self.num_folds))

    def folds(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _ENTROPY}

    def compute(self) -> dict[str, Tensor]:
        return self.measures(total(self))

    @staticmethod
    def measures(sums: Sums) -> dict[str, Tensor]:
        """`attention_entropy`: over the log of the number of keys, so 1 is even; `attention_largest`: the largest
        weight. Both are means over tokens with two keys or more. `attention_keys`: mean number of keys.
        """
        return {
            "attention_entropy": sums["entropy"] / sums["choosing"],
            "attention_largest": sums["largest"] / sums["choosing"],
            "attention_keys": sums["keys"] / sums["tokens"],
        }


_ENTROPY = ("tokens", "choosing", "entropy", "largest", "keys")


class GateStatistics(Metric):
    """How open the gate is, over tokens and coordinates."""

    full_state_update = False
    tokens: Tensor
    entries: Tensor
    gate: Tensor
    gate_2: Tensor
    closed: Tensor
    open: Tensor
    update_energy: Tensor
    output_energy: Tensor

    def __init__(self, num_folds: int = 1) -> None:
        super().__init__()
        self.num_folds = num_folds
        for name in _GATE:
            self.add_state(name, torch.zeros(num_folds, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        gate: Float[Tensor, "tokens d_model"],
        output: Float[Tensor, "tokens d_model"],
        update: Float[Tensor, "tokens d_model"],
        fold: Int[Tensor, " tokens"],
    ) -> None:
        gate = gate.double()
        values = (
            torch.ones_like(gate[:, 0]),
            torch.full_like(gate[:, 0], gate.shape[1]),
            gate.sum(-1),
            gate.square().sum(-1),
            (gate.abs() < 0.05).sum(-1),
            (gate.abs() > 0.95).sum(-1),
            update.double().square().sum(-1),
            output.double().square().sum(-1),
        )
        for name, value in zip(_GATE, values, strict=True):
            getattr(self, name).add_(_by_fold(value.double()[:, None], fold, self.num_folds)[:, 0])

    def folds(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _GATE}

    def compute(self) -> dict[str, Tensor]:
        return self.measures(total(self))

    @staticmethod
    def measures(sums: Sums) -> dict[str, Tensor]:
        """`gate_mean`, `gate_variance`; `gate_closed` and `gate_open`: the shares with |g| < .05 and |g| > .95;
        `gate_passes`: root of Σ|G|² / Σ|X'|².
        """
        entries = sums["entries"]
        mean = sums["gate"] / entries
        return {
            "gate_mean": mean,
            "gate_variance": (sums["gate_2"] / entries - mean.square()).clamp(min=0),
            "gate_closed": sums["closed"] / entries,
            "gate_open": sums["open"] / entries,
            "gate_passes": (sums["update_energy"] / sums["output_energy"]).sqrt(),
        }


_GATE = ("tokens", "entries", "gate", "gate_2", "closed", "open", "update_energy", "output_energy")


class Silence(Metric):
    """Real queries that had nothing to attend to; no other measure counts them."""

    full_state_update = False
    tokens: Tensor
    silent: Tensor

    def __init__(self, num_folds: int = 1) -> None:
        super().__init__()
        self.num_folds = num_folds
        for name in ("tokens", "silent"):
            self.add_state(name, torch.zeros(num_folds, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, silent: Bool[Tensor, " queries"], fold: Int[Tensor, " queries"]) -> None:
        both = torch.stack([torch.ones_like(silent), silent], dim=1).double()
        tokens, mute = _by_fold(both, fold, self.num_folds).unbind(1)
        self.tokens += tokens
        self.silent += mute

    def folds(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "silent": self.silent}

    def compute(self) -> dict[str, Tensor]:
        return self.measures(total(self))

    @staticmethod
    def measures(sums: Sums) -> dict[str, Tensor]:
        return {"silent_share": sums["silent"] / sums["tokens"]}


def _by_fold(
    values: Float[Tensor, "tokens parts"], fold: Int[Tensor, " tokens"], num_folds: int
) -> Float[Tensor, "folds parts"]:
    """Sums per fold, by a product: on a GPU, scattered additions would come in any order."""
    member = torch.arange(num_folds, device=fold.device)[:, None] == fold
    return member.double() @ values


def _histogram(
    cos: Float[Tensor, "tokens parts"], known: Bool[Tensor, "tokens parts"], bins: int
) -> Float[Tensor, "parts bins"]:
    """Counts in equal bins over [-1, 1], the lower edge included, in the last bin both."""
    edges = torch.linspace(-1, 1, bins + 1, dtype=cos.dtype, device=cos.device)[1:-1]
    ordered = torch.where(known, cos, 2.0).sort(dim=0).values.T.contiguous()
    below = torch.searchsorted(ordered, edges.expand(len(ordered), -1).contiguous())
    ends = torch.cat([torch.zeros_like(below[:, :1]), below, known.sum(0)[:, None]], dim=1)
    return ends.diff(dim=1).double()


def _where(condition: Tensor, values: Tensor) -> Tensor:
    """The values where they mean something."""
    return torch.where(condition, values, torch.nan)
