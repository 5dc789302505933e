"""Training losses: how well the state at each position tells the item that follows.

A loss is called with the model's states, the item table, the batch and, where it needs them, a sampler of negatives.
Positions without a target contribute nothing, a batch without any target gives a zero that can be differentiated,
and whatever the precision of training, logits and losses are in fp32 (fp64 where an input is).
"""

import math
import warnings
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys.loading import Config
from recsys.products import ProductSum, product, recurring, whole_lines
from recsys.sizes import may_count, places
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, Draw, NegativeSampler


class SoftmaxConfig(Config):
    """Cross-entropy over every item of the target's domain, or of the whole catalogue."""

    name: Literal["softmax"] = "softmax"
    catalogue: Literal["domain", "all"] = "domain"
    temperature: PositiveFloat = 1.0
    chunk_positions: PositiveInt = 512
    """Positions whose logits are held at once; memory and speed only."""
    fused: bool = False
    """On a GPU: softmax and gradient of a chunk in one kernel (Triton, which comes with torch for CUDA), the products
    around it in the precision of the step (bf16 under `bf16-mixed`, summed up in fp32). Nothing changes on a CPU."""

    needs_negatives: ClassVar[bool] = False

    def build(self, catalog: Catalog) -> "SoftmaxLoss":
        return SoftmaxLoss(
            catalog=catalog,
            catalogue=self.catalogue,
            temperature=self.temperature,
            chunk_positions=self.chunk_positions,
            fused=self.fused,
        )


class SampledSoftmaxConfig(Config):
    """Cross-entropy of the target among its negatives."""

    name: Literal["sampled_softmax"] = "sampled_softmax"
    temperature: PositiveFloat = 1.0
    log_q: bool = True
    """Subtract from each logit the log-probability with which the sampler draws the item."""

    needs_negatives: ClassVar[bool] = True

    def build(self, catalog: Catalog) -> "SampledSoftmaxLoss":
        return SampledSoftmaxLoss(temperature=self.temperature, log_q=self.log_q)


class BCEConfig(Config):
    """Binary cross-entropy: the target is a yes, each negative a no."""

    name: Literal["bce"] = "bce"

    needs_negatives: ClassVar[bool] = True

    def build(self, catalog: Catalog) -> "BinaryCrossEntropyLoss":
        return BinaryCrossEntropyLoss(catalog=catalog, catalogue="all", calibration=0.0)


class GBCEConfig(Config):
    """Binary cross-entropy calibrated for the sampling rate (gSASRec)."""

    name: Literal["gbce"] = "gbce"
    t: Annotated[float, Field(ge=0, le=1)] = 0.75
    """0 is plain BCE; 1 makes the sigmoid of a logit the probability that full sampling would give."""
    catalogue: Literal["domain", "all"] = "domain"
    """The items that the negatives are drawn from, which the sampling rate is a share of."""

    needs_negatives: ClassVar[bool] = True

    def build(self, catalog: Catalog) -> "BinaryCrossEntropyLoss":
        return BinaryCrossEntropyLoss(catalog=catalog, catalogue=self.catalogue, calibration=self.t)


class InfoNCEConfig(Config):
    """ABXI's loss: contrast with negatives of every domain at once, averaged per user and domain."""

    name: Literal["infonce"] = "infonce"
    temperature: PositiveFloat = 0.75

    needs_negatives: ClassVar[bool] = True

    def build(self, catalog: Catalog) -> "InfoNCELoss":
        return InfoNCELoss(num_domains=catalog.num_domains, temperature=self.temperature)


LossConfig = Annotated[
    SoftmaxConfig | SampledSoftmaxConfig | BCEConfig | GBCEConfig | InfoNCEConfig, Field(discriminator="name")
]


class SoftmaxLoss(nn.Module):
    """Mean over positions of -log softmax(hidden . table / temperature)[target].

    The softmax runs over the items of the target's domain or over all items; padding is never one of them. The
    logits of a step are never held whole: memory grows with chunk_positions x catalogue, not with the positions.
    """

    items: Tensor
    item_pool: Tensor
    row: Tensor

    def __init__(
        self,
        *,
        catalog: Catalog,
        catalogue: Literal["domain", "all"],
        temperature: float,
        chunk_positions: int,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.chunk_positions = chunk_positions
        self.fused = fused
        if catalogue == "domain":
            pools = [catalog.items_of(domain) for domain in range(catalog.num_domains)]
            item_pool, row = catalog.item_domain, catalog.local_index
        else:
            pools = [torch.nonzero(catalog.item_domain != NO_DOMAIN).flatten()]
            item_pool = torch.zeros_like(catalog.item_domain)
            row = torch.arange(catalog.num_items + 1, device=item_pool.device) - 1
        self.pool_sizes = [len(pool) for pool in pools]
        self.register_buffer("items", torch.cat(pools), persistent=False)
        self.register_buffer("item_pool", item_pool, persistent=False)
        self.register_buffer("row", row, persistent=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch length d_model"],
        table: Float[Tensor, "items d_model"],
        batch: Batch,
        negatives: NegativeSampler | None,
    ) -> Float[Tensor, ""]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            states, table, targets = _predictions(hidden, table, batch)
            if not len(targets):
                return _zero(states, table)
            states = states / self.temperature
            order, counts = _sort(self.item_pool[targets], len(self.pool_sizes), batch)
            parts = zip(
                self.items.split(self.pool_sizes),
                states.index_select(0, order).split(counts),
                self.row[targets[order]].split(counts),
                strict=True,
            )
            totals = [
                fused_cross_entropy(part, table.index_select(0, items), rows, self.chunk_positions, dtype)
                if self.fused and states.is_cuda
                else chunked_cross_entropy(part, table.index_select(0, items), rows, self.chunk_positions)
                for items, part, rows in parts
                if len(rows)
            ]
            return torch.stack(totals).sum() / len(targets)


class SampledSoftmaxLoss(nn.Module):
    """Mean over positions of the cross-entropy of the target among target and negatives.

    With `log_q` the logits are s(i) - log q(i), for the target too (Bengio & Senecal 2008; Yi et al., RecSys 2019):
    the number of draws is a constant that cancels. Negatives that equal the target get -inf.
    """

    def __init__(self, *, temperature: float, log_q: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.log_q = log_q

    def forward(
        self,
        hidden: Float[Tensor, "batch length d_model"],
        table: Float[Tensor, "items d_model"],
        batch: Batch,
        negatives: NegativeSampler | None,
    ) -> Float[Tensor, ""]:
        assert negatives is not None, "sampled_softmax needs a sampler of negatives"
        with torch.autocast(hidden.device.type, enabled=False):
            states, table, targets = _predictions(hidden, table, batch)
            if not len(targets):
                return _zero(states, table)
            draw = negatives.draw(targets)
            states = states / self.temperature
            if draw.row is None:
                logits = _logits(states, table, targets, draw, batch)
                return _contrast(logits, targets, draw, log_q=self.log_q).mean()
            # Rows of the table in one piece, so that its gradient is one as well.
            drawn = table.index_select(0, torch.cat([targets, draw.items.flatten()]))
            of_targets, *weights = drawn.split([len(targets), *[draw.items.shape[1]] * len(draw.items)])
            target_logits = (states * of_targets).sum(1)
            log_q = torch.zeros_like(draw.log_q)
            if self.log_q:
                target_logits, log_q = target_logits - draw.target_log_q.to(states.dtype), draw.log_q
            order, counts = _sort(draw.row, len(draw.items), batch)
            parts = (part.index_select(0, order).split(counts) for part in (states, target_logits, targets))
            totals = [
                shared_cross_entropy(part, logits, target, weight, items, q)
                for part, logits, target, weight, items, q in zip(
                    *parts, weights, draw.items, log_q.to(states.dtype), strict=True
                )
                if len(target)
            ]
            return torch.stack(totals).sum() / len(targets)


class BinaryCrossEntropyLoss(nn.Module):
    """Mean over positions of -[beta log sigmoid(s+) + sum_k log(1 - sigmoid(s-_k))] / (1 + K).

    gBCE (Petrov & Macdonald, RecSys 2023): beta = alpha (t (1 - 1/alpha) + 1/alpha) = 1 - t (1 - alpha),
    where t is `calibration` and alpha = draws / (items - 1) is the sampling rate: the number of draws at the position
    over the items that could be its negative, in the target's domain or in all, and at most 1. As
    log(sigmoid(s)^beta) = beta log sigmoid(s), the weight is exact in any precision. t = 0 gives beta = 1, plain BCE.

    K counts the negatives that are left where those that equal the target are masked.
    """

    item_rivals: Tensor

    def __init__(self, *, catalog: Catalog, catalogue: Literal["domain", "all"], calibration: float) -> None:
        super().__init__()
        self.calibration = calibration
        items = [
            len(catalog.items_of(domain)) if catalogue == "domain" else catalog.num_items
            for domain in range(catalog.num_domains)
        ]
        rivals = torch.tensor(items, device=catalog.item_domain.device).sub(1).clamp(min=1)
        self.register_buffer("item_rivals", rivals[catalog.item_domain], persistent=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch length d_model"],
        table: Float[Tensor, "items d_model"],
        batch: Batch,
        negatives: NegativeSampler | None,
    ) -> Float[Tensor, ""]:
        assert negatives is not None, "bce and gbce need a sampler of negatives"
        with torch.autocast(hidden.device.type, enabled=False):
            states, table, targets = _predictions(hidden, table, batch)
            if not len(targets):
                return _zero(states, table)
            draw = negatives.draw(targets)
            alpha = (_log_q(draw) > -torch.inf).sum(1).double() / self.item_rivals[targets]
            beta = 1 - self.calibration * (1 - alpha.clamp(max=1))
            logits = _logits(states, table, targets, draw, batch)
            left = ~_masked(targets, draw)
            yes = beta.to(logits.dtype) * F.logsigmoid(logits[:, 0])
            no = F.logsigmoid(-logits[:, 1:]).where(left, 0).sum(1)
            return -((yes + no) / (1 + left.sum(1))).mean()


class InfoNCELoss(nn.Module):
    """ABXI's loss (WWW 2025): sum over domains of the mean over users of the mean over the user's positions whose
    target is of that domain of -log softmax(s / temperature)[target], the softmax running over the target and all
    its negatives (of both domains, with the sampler's scope `each_domain`).

    A user is a row of the batch, and counts in a domain's mean where they have a target of that domain; ABXI counts
    all users, which is the same where all have one. Negatives that equal the target are masked; other items of the
    user's history are not.
    """

    def __init__(self, *, num_domains: int, temperature: float) -> None:
        super().__init__()
        self.num_domains = num_domains
        self.temperature = temperature

    def forward(
        self,
        hidden: Float[Tensor, "batch length d_model"],
        table: Float[Tensor, "items d_model"],
        batch: Batch,
        negatives: NegativeSampler | None,
    ) -> Float[Tensor, ""]:
        assert negatives is not None, "infonce needs a sampler of negatives"
        with torch.autocast(hidden.device.type, enabled=False):
            states, table, targets = _predictions(hidden, table, batch)
            if not len(targets):
                return _zero(states, table)
            draw = negatives.draw(targets)
            logits = _logits(states / self.temperature, table, targets, draw, batch)
            losses = _contrast(logits, targets, draw, log_q=False)
            where = _asked(batch)
            users, domains = where // batch.targets.shape[1], batch.target_domains.flatten()[where]
            cell = users * self.num_domains + domains
            positions = torch.zeros(len(batch.targets) * self.num_domains, dtype=torch.int64, device=cell.device)
            positions.index_add_(0, cell, torch.ones_like(cell))
            users_of_domain = (positions.view(-1, self.num_domains) > 0).sum(0)
            return (losses / (positions[cell] * users_of_domain[domains])).sum()


def _predictions(
    hidden: Float[Tensor, "batch length d_model"], table: Float[Tensor, "items d_model"], batch: Batch
) -> tuple[Float[Tensor, "positions d_model"], Float[Tensor, "items d_model"], Int[Tensor, " positions"]]:
    """States and targets where something is predicted; both float inputs in the same, at least single, precision."""
    precision = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
    where = _asked(batch)
    states = hidden.flatten(0, 1).index_select(0, where)
    return states.to(precision), table.to(precision), batch.targets.flatten()[where]


def _asked(batch: Batch) -> Int[Tensor, " positions"]:
    """Flat places of the targets."""
    return places(batch.targets != PAD_ID, None if batch.sizes is None else sum(batch.sizes.targets))


def _zero(states: Float[Tensor, "positions d_model"], table: Float[Tensor, "items d_model"]) -> Float[Tensor, ""]:
    """0 that depends on both, so that a step without any target can be differentiated; not even NaN gets in."""
    return states[:0].sum() + table[:0].sum()


def _sort(group: Int[Tensor, " positions"], groups: int, batch: Batch) -> tuple[Int[Tensor, " positions"], list[int]]:
    """The positions group by group, and how many each has. Groups are the domains, or there is only one."""
    order = torch.argsort(group, stable=True)
    if groups == 1:
        return order, [len(group)]
    if batch.sizes is not None:
        return order, list(batch.sizes.targets)
    return order, torch.bincount(group, minlength=groups).tolist()


def _logits(
    states: Float[Tensor, "positions d_model"],
    table: Float[Tensor, "items d_model"],
    targets: Int[Tensor, " positions"],
    draw: Draw,
    batch: Batch,
) -> Float[Tensor, "positions candidates"]:
    """Scores of the target (column 0) and of the draws."""
    if draw.row is None and len(draw.items) > 1:
        return sampled_logits(states, table, torch.cat([targets[:, None], draw.items], dim=1))
    target = (states * table.index_select(0, targets)).sum(1, keepdim=True)
    if len(draw.items) == 1:
        return torch.cat([target, states @ table.index_select(0, draw.items[0]).t()], dim=1)
    assert draw.row is not None
    order, counts = _sort(draw.row, len(draw.items), batch)
    parts = zip(states.index_select(0, order).split(counts), draw.items, strict=True)
    drawn = torch.cat([part @ table.index_select(0, items).t() for part, items in parts])
    return torch.cat([target, drawn.index_select(0, torch.argsort(order))], dim=1)


def _masked(targets: Int[Tensor, " positions"], draw: Draw) -> Bool[Tensor, "positions negatives"]:
    """Draws that are no negative of the position: its own target, or barred by the sampler."""
    items = draw.items if draw.row is None else draw.items[draw.row]
    return (items == targets[:, None]) | (_log_q(draw) == -torch.inf)


def _log_q(draw: Draw) -> Float[Tensor, "positions negatives"]:
    return draw.log_q if draw.row is None else draw.log_q[draw.row]


def _contrast(
    logits: Float[Tensor, "positions candidates"], targets: Int[Tensor, " positions"], draw: Draw, *, log_q: bool
) -> Float[Tensor, " positions"]:
    """-log softmax at column 0, corrected for the sampler if asked; with every negative masked it is 0."""
    if log_q:
        bias = torch.cat([draw.target_log_q[:, None], _log_q(draw)], dim=1).to(logits.dtype)
    else:
        bias = torch.zeros_like(logits)
    bias[:, 1:].masked_fill_(_masked(targets, draw), torch.inf)
    return F.cross_entropy(logits - bias, torch.zeros_like(targets), reduction="none")


def chunked_cross_entropy(
    hidden: Float[Tensor, "positions d_model"],
    weight: Float[Tensor, "candidates d_model"],
    targets: Int[Tensor, " positions"],
    chunk_positions: int,
) -> Float[Tensor, ""]:
    """Sum over positions of the cross-entropy of hidden . weight^T; `targets` are rows of `weight`.

    Gradients are made together with the loss, chunk by chunk in place, so neither the logits nor their gradient are
    ever held whole and nothing is computed twice.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_positions)


_SHARED_ROWS = 512
"""Positions that are held against shared negatives at once: few enough for a cache."""
_LOG2_E = 1 / math.log(2)
"""Logits in bits: an exponential to the base 2 takes half the time of one to the base e on a CPU."""
_FEW_BITS = 60.0
"""fp32 holds the exponentials of logits up to this one, and their sums, as they are."""


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_positions: int) -> Tensor:
        count = len(hidden)
        hidden, targets = _filled_up(count, hidden, targets)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        vectors = whole_lines(weight)
        d_vectors = ProductSum(vectors) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros(())
        overflows = not may_count(hidden) or _logit_bound(hidden, weight) * _LOG2_E > _FEW_BITS
        for start in range(0, count, chunk_positions):
            chunk = slice(start, start + chunk_positions)
            states, target = hidden[chunk], targets[chunk, None]
            block = product(states * _LOG2_E, vectors)  # zero beyond the candidates, and stays so
            logits = block[:, : len(weight)]
            if overflows:
                logits -= logits.amax(1, keepdim=True)
            target_logit = logits.gather(1, target)
            unnormalised = logits.exp2_()
            norm = unnormalised.sum(1, keepdim=True)
            total += (norm.log2() - target_logit)[: count - start].sum()
            # The gradient of the logits is (unnormalised - norm at the target) / norm; dividing the small side of
            # each product saves a pass over the block.
            unnormalised.scatter_add_(1, target, -norm)
            if d_hidden is not None:
                torch.div(product(block, vectors.t()), norm, out=d_hidden[chunk])
            if d_vectors is not None:
                d_vectors.add(block, states / norm)
            del block, logits, unnormalised  # or there are two of them while the next one is made
        d_weight = None if d_vectors is None else d_vectors.total()[: len(weight)].contiguous()
        ctx.save_for_backward(None if d_hidden is None else d_hidden[:count], d_weight)
        return total / _LOG2_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = (None if made is None else grad * made for made in ctx.saved_tensors)
        return d_hidden, d_weight, None, None


def _filled_up(count: int, hidden: Float[Tensor, "positions d_model"], *further: Tensor) -> tuple[Tensor, ...]:
    """States of zero below, as many as make a number of rows that products like, and zeros for what goes with them."""
    missing = recurring(count, hidden) - count
    if not missing:
        return hidden, *further
    return F.pad(hidden, (0, 0, 0, missing)), *(F.pad(values, (0, missing)) for values in further)


def _logit_bound(hidden: Float[Tensor, "positions d_model"], weight: Float[Tensor, "candidates d_model"]) -> float:
    """What no logit is larger than (Cauchy and Schwarz)."""
    longest, longest_weight = (torch.linalg.vector_norm(part, dim=1).amax() for part in (hidden, weight))
    return float(longest * longest_weight)


def shared_cross_entropy(
    hidden: Float[Tensor, "positions d_model"],
    target_logits: Float[Tensor, " positions"],
    targets: Int[Tensor, " positions"],
    weight: Float[Tensor, "negatives d_model"],
    negatives: Int[Tensor, " negatives"],
    log_q: Float[Tensor, " negatives"],
) -> Float[Tensor, ""]:
    """Sum over positions of the cross-entropy of the target's logit among itself and hidden . weight^T - log_q, where
    `negatives` that equal the target do not count.

    As in `chunked_cross_entropy`, gradients are made together with the loss; neither the negatives nor `log_q` get any.
    """
    return _SharedCrossEntropy.apply(hidden, target_logits, targets, weight, negatives, log_q)


class _SharedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target_logits: Tensor,
        targets: Tensor,
        weight: Tensor,
        negatives: Tensor,
        log_q: Tensor,
    ) -> Tensor:
        count = len(hidden)
        hidden, target_logits, targets = _filled_up(count, hidden, target_logits, targets)
        d_hidden, d_target = torch.empty_like(hidden), torch.empty_like(target_logits)
        vectors = whole_lines(weight)
        d_vectors = ProductSum(vectors)
        total = hidden.new_zeros(())
        target_logits, log_q = target_logits * _LOG2_E, log_q * _LOG2_E
        met = torch.isin(targets, negatives) if may_count(targets) else None
        for start in range(0, count, _SHARED_ROWS):
            chunk = slice(start, start + _SHARED_ROWS)
            states, target = hidden[chunk], target_logits[chunk, None]
            block = product(states * _LOG2_E, vectors)  # zero beyond the negatives, and stays so
            logits = block[:, : len(weight)]
            logits -= log_q
            _leave_out(logits, negatives, targets[chunk], None if met is None else met[chunk])
            peak = torch.maximum(logits.amax(1, keepdim=True), target)
            unnormalised = logits.sub_(peak).exp2_()
            of_target = (target - peak).exp2()
            norm = unnormalised.sum(1, keepdim=True) + of_target
            total += (norm.log2() + peak - target)[: count - start].sum()
            d_target[chunk] = (of_target / norm - 1)[:, 0]
            torch.div(product(block, vectors.t()), norm, out=d_hidden[chunk])
            d_vectors.add(block, states / norm)
        ctx.save_for_backward(d_hidden[:count], d_target[:count], d_vectors.total()[: len(weight)].contiguous())
        return total / _LOG2_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None, None]:
        d_hidden, d_target, d_weight = (grad * made for made in ctx.saved_tensors)
        return d_hidden, d_target, None, d_weight, None, None


def _leave_out(
    logits: Float[Tensor, "positions negatives"],
    negatives: Int[Tensor, " negatives"],
    targets: Int[Tensor, " positions"],
    met: Bool[Tensor, " positions"] | None,
) -> None:
    """-inf where a negative is the position's target; `met` tells the positions that have such, where that is known."""
    if met is None:
        logits.masked_fill_(negatives == targets[:, None], -torch.inf)
        return
    rows = met.nonzero()  # a few, and only these are gone through
    row, column = (negatives == targets[rows]).nonzero(as_tuple=True)
    logits[rows[row, 0], column] = -torch.inf


def fused_cross_entropy(
    hidden: Float[Tensor, "positions d_model"],
    weight: Float[Tensor, "candidates d_model"],
    targets: Int[Tensor, " positions"],
    chunk_positions: int,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """`chunked_cross_entropy` of fp32 inputs with the kernel of `recsys.fused` between products in `dtype`."""
    return _FusedCrossEntropy.apply(hidden, weight, targets, chunk_positions, dtype)


class _FusedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_positions: int, dtype: torch.dtype
    ) -> Tensor:
        from recsys.fused import cross_entropy_and_gradient  # Triton is not there on every machine

        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        total = hidden.new_zeros(())
        columns = weight.to(dtype)
        for start in range(0, len(hidden), chunk_positions):
            chunk = slice(start, start + chunk_positions)
            states = hidden[chunk].to(dtype)
            losses, gradient = cross_entropy_and_gradient(_product(states, columns.t()), targets[chunk], dtype)
            total += losses.sum()
            d_hidden[chunk] = _product(gradient, columns)
            d_weight += _product(gradient.t(), states)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = (grad * made for made in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, whatever the precision of the factors."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def sampled_logits(
    hidden: Float[Tensor, "positions d_model"],
    table: Float[Tensor, "items d_model"],
    items: Int[Tensor, "positions candidates"],
) -> Float[Tensor, "positions candidates"]:
    """hidden[p] . table[items[p, c]], without a tensor of positions x candidates x d_model.

    An item may stand in a row more than once, in any order.
    """
    return _SampledLogits.apply(hidden, table, items)


class _SampledLogits(Function):
    """On CPU a sampled dense-dense product over a CSR pattern and bags of weighted rows for its gradients, elsewhere
    gathered by chunks.

    The pattern is items x positions: an item's vector stays in the cache for all positions that hold it, and these
    come in order. Turned round, where each entry fetches a vector from anywhere in the table, it takes 4 times as long.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, items: Tensor) -> Tensor:
        if _sparse_applies(hidden, table, items):
            flat = items.flatten().int()
            order = torch.argsort(flat, stable=True)
            positions = (order // items.shape[1]).int()
            ends = torch.bincount(flat, minlength=len(table)).cumsum(0)
            starts = F.pad(ends, (1, 0)).int()
            pattern = _csr(starts, positions, hidden.new_zeros(len(flat)), (len(table), len(hidden)))
            values = torch.sparse.sampled_addmm(pattern, table, hidden.t(), beta=0.0).values()
            ctx.save_for_backward(hidden, table, items, order, positions, starts)
            return torch.empty_like(values).scatter_(0, order, values).view_as(items)
        ctx.save_for_backward(hidden, table, items)
        logits = hidden.new_empty(items.shape)
        for chunk in _gather_chunks(items, hidden.shape[1]):
            logits[chunk] = torch.bmm(table[items[chunk]], hidden[chunk, :, None])[:, :, 0]
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, table, items, *sorted_by_item = ctx.saved_tensors
        wants_hidden, wants_table, _ = ctx.needs_input_grad
        d_hidden = d_table = None
        if sorted_by_item:
            order, positions, starts = sorted_by_item
            if wants_hidden:
                d_hidden = F.embedding_bag(items.int(), table, mode="sum", per_sample_weights=grad)
            if wants_table:
                weights = grad.flatten().index_select(0, order)
                d_table = F.embedding_bag(positions, hidden, starts[:-1], mode="sum", per_sample_weights=weights)
            return d_hidden, d_table, None
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_table = torch.zeros_like(table) if wants_table else None
        for chunk in _gather_chunks(items, hidden.shape[1]):
            if d_hidden is not None:
                d_hidden[chunk] = torch.bmm(grad[chunk, None], table[items[chunk]])[:, 0]
            if d_table is not None:
                outer = grad[chunk, :, None] * hidden[chunk, None]
                d_table.index_add_(0, items[chunk].flatten(), outer.flatten(0, 1))
        return d_hidden, d_table, None


def _sparse_applies(hidden: Tensor, table: Tensor, items: Tensor) -> bool:
    """Whether the CPU's sparse kernels can be used: they come with MKL, in two precisions, with 32-bit indices, and
    refuse a pattern of more entries than the matrix has."""
    return (
        hidden.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and hidden.dtype in (torch.float32, torch.float64)
        and items.shape[1] <= len(table)
        and items.numel() < 2**31
    )


def _gather_chunks(items: Tensor, d_model: int) -> list[slice]:
    """Slices of positions whose gathered vectors are small enough for a cache."""
    step = max(1, 2**22 // (items.shape[1] * d_model))
    return [slice(start, start + step) for start in range(0, len(items), step)]


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # Invariants unchecked: repeated columns break them, while products take each entry by itself.
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
