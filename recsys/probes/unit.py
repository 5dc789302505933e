"""One unit of exchange, measured: which vectors of a forward pass go into which sums, and what follows from them."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torchmetrics import Metric

from recsys.errors import UserError
from recsys.loading import Config
from recsys.probes.measures import (
    Alignment,
    AttentionEntropy,
    Dependence,
    Estimate,
    GateStatistics,
    NormBudget,
    Silence,
    fold_of,
    jackknife,
    total,
)
from recsys.probes.nulls import covariance_matched, isotropic, isotropic_histogram, other_users, unrelated
from recsys.probes.record import UnitRecord, UnitSite
from recsys.probes.table import Row, number


class NonFiniteStates(UserError):
    """States that are NaN or infinite; the message names the unit."""


class ProbeConfig(Config):
    """How the exchange of a model is measured. Where a config holds one of these or null, null measures nothing."""

    queries: Literal["asked", "all"] = "asked"
    """The states that answer a question (in an evaluation, one per target: those that are ranked), or every state of
    a domain's stream."""
    positions: bool = False
    """Also apart by place in the domain's stream, counted from its end: 0, 1-2, 3-6, 7-14, and so on."""
    folds: Annotated[int, Field(ge=2)] = 10
    """Groups of users whose spread gives the intervals. Memory grows with them, not with the users."""
    bins: Annotated[int, Field(ge=2)] = 200
    """Of the histograms of cosines."""
    subspace: Annotated[int, Field(ge=1)] = 8
    """Dimension of the leading subspaces whose principal angles are taken; no more than d_model."""
    samples: Annotated[int, Field(ge=2)] = 16_384
    """Pairs drawn for the covariance-matched chance level."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything drawn for chance levels; not the run's seed."""

    @model_validator(mode="after")
    def _check(self) -> "ProbeConfig":
        if self.positions and self.queries == "asked":
            raise ValueError(
                "positions is true, but states that answer an evaluation's question all have the last place; "
                "set queries to 'all' or positions to false"
            )
        return self


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The queries of one pass through one unit that had something to attend to."""

    user: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    """Counted from the end of the domain's stream."""
    query: Float[Tensor, "tokens d_model"]
    normalised: Float[Tensor, "tokens d_model"]
    context: Float[Tensor, "tokens d_model"]
    """Mean of what the token may attend to."""
    output: Float[Tensor, "tokens d_model"]
    parts: Float[Tensor, "tokens parts d_model"]
    gate: Float[Tensor, "tokens d_model"]
    update: Float[Tensor, "tokens d_model"]
    weights: Float[Tensor, "tokens heads context"]
    valid: Bool[Tensor, "tokens context"]
    paired: Bool[Tensor, " tokens"]
    """Whether there is another user to pair with; without one, the rest means nothing."""
    other_query: Float[Tensor, "tokens d_model"]
    """Another user's query of the same place."""
    other_normalised: Float[Tensor, "tokens d_model"]
    other_output: Float[Tensor, "tokens d_model"]
    """What that query reads from this token's context."""

    def where(self, chosen: Bool[Tensor, " tokens"]) -> "_Tokens":
        return _Tokens(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


class _Part(NamedTuple):
    """One of the vectors whose alignment with the query is measured."""

    direction: str
    head: str = "all"
    site: str = "output"
    adds_up: bool = False
    """Whether it is one of those that add up to the output."""


class UnitProbe:
    """One unit: its tokens, measured together and, where asked, by place."""

    def __init__(self, unit: UnitSite, domain_names: Sequence[str], config: ProbeConfig) -> None:
        self.name = unit.name
        self.config = config
        self.d_model = unit.module.attention.heads.output.out_features
        self.num_heads = unit.module.attention.heads.num_heads
        asking = domain_names[unit.domain]
        own = unit.module.context == "own"
        others = [index for index in range(len(domain_names)) if (index == unit.domain) == own]
        self.sources = others if len(others) > 1 else []
        """Domains whose parts in the output are told apart."""
        self.direction = f"{'*' if self.sources else domain_names[others[0]]}->{asking}"
        self.parts = [
            _Part(self.direction),
            *(_Part(self.direction, head=str(head), adds_up=True) for head in range(self.num_heads)),
            *(_Part(f"{domain_names[source]}->{asking}", adds_up=True) for source in self.sources),
            _Part(self.direction, site="update"),
            _Part(self.direction, head="bias", adds_up=True),
        ]
        self._silence = Silence(config.folds)
        self._asking = _Users()
        self._all = _Measures(self)
        self._by_place: dict[int, _Measures] = {}

    def update(self, seen: UnitRecord, fresh: Bool[Tensor, " rows"], generator: torch.Generator) -> None:
        """Add a pass; rows that are not `fresh` are left out. Raises NonFiniteStates."""
        wanted = (seen.real if self.config.queries == "all" else seen.asked) & fresh[:, None]
        length = _reach(wanted)
        seen, wanted = seen.last(length, seen.mask.shape[2]), wanted[:, -length:]
        heard = seen.tokens & wanted
        user = seen.user[:, None].expand_as(wanted)[wanted]
        _move(self._silence, user.device)
        self._silence.update(~heard[wanted], fold_of(user, self.config.folds))
        self._asking.add(user)
        if not heard.any():
            return
        seen = seen.last(length, _reach((seen.mask & heard[..., None]).any(1)))
        tokens = self._tokens(seen, heard, generator)
        if not torch.cat([tokens.query, tokens.output, tokens.update]).isfinite().all():
            raise NonFiniteStates(
                f"{self.name} has states that are NaN or infinite: the model has diverged; nothing was measured"
            )
        self._all.update(tokens)
        if self.config.positions:
            bucket = (tokens.place + 1).log2().floor().long()
            for index in bucket.unique().tolist():
                self._by_place.setdefault(index, _Measures(self)).update(tokens.where(bucket == index))

    def _tokens(self, seen: UnitRecord, heard: Bool[Tensor, "rows length"], generator: torch.Generator) -> _Tokens:
        row, column = heard.nonzero(as_tuple=True)
        partner, paired = other_users(seen.user, heard, generator)
        swap = (partner, torch.arange(heard.shape[1], device=heard.device))
        heads, values = seen.heads, seen.values

        def read(weights: Float[Tensor, "rows heads length context"]) -> Float[Tensor, "tokens d_model"]:
            return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)[heard]

        weights = seen.weights(seen.projected_query)
        swapped = read(seen.weights(seen.projected_query[swap]))
        by_head = seen.head_outputs(seen.attended[heard])
        by_source = [
            seen.head_outputs(read(weights * (seen.context_domain == source)[:, None, None])).sum(1, keepdim=True)
            for source in self.sources
        ]
        bias = heads.output.bias.to(by_head.dtype)
        output, update = seen.output[heard], seen.update[heard]
        valid = seen.mask.to(seen.normalised_context.dtype)
        mean = valid @ seen.normalised_context / valid.sum(-1, keepdim=True).clamp(min=1)
        return _Tokens(
            user=seen.user[row],
            place=heard.shape[1] - 1 - column,
            query=seen.query[heard],
            normalised=seen.normalised_query[heard],
            context=mean[heard],
            output=output,
            parts=torch.cat(
                [output[:, None], by_head, *by_source, update[:, None], bias.expand(len(row), 1, -1)], dim=1
            ),
            gate=seen.gate[heard],
            update=update,
            weights=weights.transpose(1, 2)[heard],
            valid=seen.mask[heard],
            paired=paired[heard],
            other_query=seen.query[swap][heard],
            other_normalised=seen.normalised_query[swap][heard],
            other_output=F.linear(swapped, heads.output.weight.to(swapped.dtype), bias.to(swapped.dtype)),
        )

    def rows(self) -> Iterator[Row]:
        """Everything so far."""
        with self._silence.sync_context():
            share = jackknife(Silence.measures, self._silence)["silent_share"]
            asked = int(self._silence.tokens.sum())
        yield Row(
            unit=self.name,
            direction=self.direction,
            site="query",
            measure="silent_share",
            **_interval(share),
            tokens=asked,
            users=self._asking.count,
        )
        yield from self._all.rows("all")
        for index in sorted(self._by_place):
            first, last = 2**index - 1, 2 ** (index + 1) - 2
            yield from self._by_place[index].rows(str(first) if last == first else f"{first}-{last}")


class _Measures:
    """All metrics of one set of a unit's tokens."""

    def __init__(self, unit: UnitProbe) -> None:
        config, parts = unit.config, len(unit.parts)
        self.unit = unit
        self.users = _Users()
        self.stream = Alignment(parts, config.folds, config.bins)
        self.stream_shuffled = Alignment(parts, config.folds, config.bins)
        self.normalised = Alignment(1, config.folds, config.bins)
        self.normalised_shuffled = Alignment(1, config.folds, config.bins)
        self.dependence = Dependence(unit.d_model, config.folds, config.subspace)
        self.control = Dependence(unit.d_model, config.folds, config.subspace)
        self.budget = NormBudget(config.folds)
        self.entropy = AttentionEntropy(unit.num_heads, config.folds)
        self.gate = GateStatistics(config.folds)

    @property
    def _metrics(self) -> list[Metric]:
        return [value for value in vars(self).values() if isinstance(value, Metric)]

    def update(self, tokens: _Tokens) -> None:
        for metric in self._metrics:
            _move(metric, tokens.user.device)
        fold = fold_of(tokens.user, self.unit.config.folds)
        self.users.add(tokens.user)
        self.stream.update(tokens.query, tokens.parts, fold)
        self.normalised.update(tokens.normalised, tokens.output[:, None], fold)
        self.dependence.update(tokens.query, tokens.context, tokens.output, fold)
        self.budget.update(tokens.query, tokens.update, fold)
        self.entropy.update(tokens.weights, tokens.valid, fold)
        self.gate.update(tokens.gate, tokens.output, tokens.update, fold)
        paired = tokens.paired
        self.stream_shuffled.update(tokens.other_query[paired], tokens.parts[paired], fold[paired])
        self.normalised_shuffled.update(tokens.other_normalised[paired], tokens.output[paired, None], fold[paired])
        self.control.update(
            tokens.other_query[paired], tokens.context[paired], tokens.other_output[paired], fold[paired]
        )

    def rows(self, position: str) -> Iterator[Row]:
        with contextlib.ExitStack() as stack:
            for metric in self._metrics:
                stack.enter_context(metric.sync_context())
            common = Row(
                unit=self.unit.name,
                direction=self.unit.direction,
                position=position,
                site="output",
                measure="",
                value=None,
                tokens=int(self.dependence.tokens.sum()),
                users=self.users.count,
            )
            config = self.unit.config
            matched = covariance_matched(self.dependence, config.samples, config.seed, config.bins)
            stream, normalised = (replace(common, query=query) for query in ("stream", "normalised"))
            yield from self._aligned(stream, self.stream, self.stream_shuffled, self.unit.parts, matched)
            yield from self._aligned(normalised, self.normalised, self.normalised_shuffled, self.unit.parts[:1], None)
            yield from self._dependent(common)
            yield from self._mechanical(common)

    def _aligned(
        self, common: Row, pairs: Alignment, shuffled: Alignment, parts: Sequence[_Part], matched: Alignment | None
    ) -> Iterator[Row]:
        """Cosines and energies; `matched`, which holds cosines of whole outputs, is the chance of the first part."""
        found = jackknife(Alignment.measures, pairs)
        ratio = jackknife(Alignment.log_ratio, pairs, shuffled)["alignment_ratio"].exp()
        shares = jackknife(Alignment.signed_shares, pairs)["signed_share"]
        uniform, by_pairs = isotropic(self.unit.d_model), Alignment.measures(total(shuffled))
        by_covariance = {} if matched is None else Alignment.measures(total(matched))
        for index, part in enumerate(parts):
            row = replace(common, direction=part.direction, head=part.head, site=part.site)
            gaussian = {} if index else {name: values[0] for name, values in by_covariance.items()}
            if part.adds_up:
                yield replace(row, measure="signed_share", **_interval(shares, index))
            if part.head == "bias":
                continue
            for name, estimate in found.items():
                yield replace(
                    row,
                    measure=name,
                    **_interval(estimate, index),
                    null_isotropic=uniform.get(name),
                    null_shuffled=number(by_pairs[name][index]),
                    null_covariance=number(gaussian.get(name, math.nan)),
                )
            chance = by_pairs["cos2_mean"][index]
            yield replace(
                row,
                measure="alignment_ratio",
                **_interval(ratio, index),
                null_isotropic=number(uniform["cos2_mean"] / chance),
                null_shuffled=number(chance / chance),
                null_covariance=number(gaussian.get("cos2_mean", math.nan) / chance),
            )
            yield from self._histogram(row, index, pairs, shuffled, matched if gaussian else None)

    def _histogram(
        self, row: Row, index: int, pairs: Alignment, shuffled: Alignment, matched: Alignment | None
    ) -> Iterator[Row]:
        shares = [
            (metric.histogram[part] / metric.histogram[part].sum()).tolist()
            for metric, part in ((pairs, index), (shuffled, index), (matched, 0))
            if metric is not None
        ]
        uniform = isotropic_histogram(self.unit.d_model, pairs.bins).tolist()
        for place in range(pairs.bins):
            yield replace(
                row,
                measure="cos_histogram",
                bin=2 * place / pairs.bins - 1,
                value=number(shares[0][place]),
                null_isotropic=uniform[place],
                null_shuffled=number(shares[1][place]),
                null_covariance=number(shares[2][place]) if matched is not None else None,
            )

    def _dependent(self, common: Row) -> Iterator[Row]:
        pairs, control = self.dependence, self.control
        chance = unrelated(pairs)
        for name, estimate in jackknife(pairs.shape, pairs).items():
            for index, site in enumerate(("query", "context", "output")):
                yield replace(common, site=site, measure=name, **_interval(estimate, index))
        for name, estimate in jackknife(pairs.shared, pairs).items():
            yield replace(common, measure=name, **_interval(estimate), null_isotropic=chance.get(name))
        by_control = control.explained(total(control))
        for name, estimate in jackknife(pairs.explained, pairs).items():
            yield replace(
                common,
                measure=name,
                **_interval(estimate),
                null_isotropic=chance[name],
                null_shuffled=number(by_control[name]),
            )
        for name, estimate in jackknife(pairs.beyond, pairs, control).items():
            yield replace(common, measure=name, **_interval(estimate), null_shuffled=0.0)
        for name, estimate in jackknife(pairs.energies, pairs, self.budget).items():
            yield replace(common, site="update", measure=name, **_interval(estimate))

    def _mechanical(self, common: Row) -> Iterator[Row]:
        for name, estimate in jackknife(NormBudget.measures, self.budget).items():
            yield replace(common, site="update", measure=name, **_interval(estimate))
        for name, estimate in jackknife(AttentionEntropy.measures, self.entropy).items():
            for head in range(self.unit.num_heads):
                yield replace(common, site="attention", head=str(head), measure=name, **_interval(estimate, head))
        for name, estimate in jackknife(GateStatistics.measures, self.gate).items():
            yield replace(common, site="gate", measure=name, **_interval(estimate))


def _move(metric: Metric, device: torch.device) -> None:
    if metric.device != device:
        metric.to(device)


def _reach(used: Bool[Tensor, "rows places"]) -> int:
    """Columns from the first that is used to the end; all of them where none is."""
    return used.shape[1] - int(used.any(0).int().argmax())


class _Users:
    """A set of users: one byte for each there is."""

    def __init__(self) -> None:
        self._known = torch.zeros(0, dtype=torch.bool)

    def add(self, users: Int[Tensor, " users"]) -> None:
        users = users.cpu().long()
        if len(users) and (missing := int(users.max()) + 1 - len(self._known)) > 0:
            self._known = F.pad(self._known, (0, missing))
        self._known[users] = True

    @property
    def count(self) -> int:
        return int(self._known.sum())


def _interval(estimate: Estimate, *index: int) -> dict[str, Any]:
    """Value and interval as columns."""
    return {name: number(value[index]) for name, value in estimate._asdict().items()}
