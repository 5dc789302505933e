"""Interventions at inference: what becomes of a model when the update of its cross-attentions is another one.

A hook from outside replaces the update G = gate · X' just before it is added to the stream X, at every token that has
something to attend to. What a part of G does is told by what is lost without it, beside how much energy that part has:
at chance 1 − 1/d of the energy is orthogonal to X, so "the orthogonal part matters more" is what chance predicts, too.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys.models.attention import GatedCrossAttention, parallel_part
from recsys.probes.nulls import other_users
from recsys.probes.record import find_units, raw_module
from recsys.types import Batch

Update = Float[Tensor, "rows length d_model"]


@dataclass(frozen=True, eq=False)
class Call:
    """One pass through one unit, about to add its update."""

    module: GatedCrossAttention
    user: Int[Tensor, " rows"]
    """Distinct numbers for distinct users."""
    query: Update
    context: Float[Tensor, "rows context d_model"]
    mask: Bool[Tensor, "rows length context"]
    update: Update
    mean: Float[Tensor, " d_model"]
    """Of the unit's updates in the model as it was trained."""
    generator: torch.Generator
    """On the CPU."""

    @property
    def tokens(self) -> Bool[Tensor, "rows length"]:
        """Queries that have something to attend to; at all others nothing is added."""
        return self.mask.any(-1)

    @property
    def parallel(self) -> Update:
        return parallel_part(self.query, self.update)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def partners(self) -> Int[Tensor, "rows length"]:
        """A row of another user with a token in the same place; the row itself where there is none."""
        partner, paired = other_users(self.user, self.tokens, self.generator)
        return torch.where(paired, partner, torch.arange(len(partner), device=partner.device)[:, None])


Intervention = Callable[[Call], Update]


def scale_parts(call: Call, parallel: float, orthogonal: float) -> Update:
    along = call.parallel
    return parallel * along + orthogonal * (call.update - along)


def match_norm(call: Call, part: Intervention) -> Update:
    """A part, scaled to the norm of the whole; zeros where there is nothing of it."""
    kept = part(call)
    norm = kept.norm(dim=-1, keepdim=True)
    return kept * torch.where(norm > 0, call.update.norm(dim=-1, keepdim=True) / norm, 0.0)


def rotate(call: Call) -> Update:
    """A random rotation per token that fixes the query: cosine and norm stay, the content goes."""
    along = call.parallel
    rest = call.update - along
    noise = call.normal(rest)
    noise = noise - parallel_part(call.query, noise)
    return along + noise * rest.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def shuffle(call: Call) -> Update:
    """The update of another user in the same place."""
    places = torch.arange(call.update.shape[1], device=call.update.device)
    return call.update[call.partners(), places]


def swap_context(call: Call) -> Update:
    """What the query reads from the history that another user reads in the same place."""
    partner = call.partners()[:, -1]
    return _read(call, call.context[partner], call.mask[partner] & call.tokens[..., None])


def noise_context(call: Call) -> Update:
    """What the query reads from Gaussian noise with the mean and spread of each coordinate of the contexts."""
    there = call.mask.any(1)
    mean, spread = call.context[there].mean(0), call.context[there].std(0, unbiased=False)
    return _read(call, mean + spread * call.normal(call.context), call.mask)


def _read(call: Call, context: Tensor, mask: Tensor) -> Update:
    output = call.module.attention(call.query, context, mask)
    return call.module.update.forward(call.query, call.module.gate(call.query, output) * output)


_ORTHOGONAL = partial(scale_parts, parallel=0.0, orthogonal=1.0)
_PARALLEL = partial(scale_parts, parallel=1.0, orthogonal=0.0)

INTERVENTIONS: Mapping[str, Intervention] = {
    "orthogonal part": _ORTHOGONAL,
    "parallel part": _PARALLEL,
    "nothing": partial(scale_parts, parallel=0.0, orthogonal=0.0),
    "parallel × 0.5": partial(scale_parts, parallel=0.5, orthogonal=1.0),
    "parallel × 2": partial(scale_parts, parallel=2.0, orthogonal=1.0),
    "orthogonal × 0.5": partial(scale_parts, parallel=1.0, orthogonal=0.5),
    "orthogonal × 2": partial(scale_parts, parallel=1.0, orthogonal=2.0),
    "orthogonal part, full norm": partial(match_norm, part=_ORTHOGONAL),
    "parallel part, full norm": partial(match_norm, part=_PARALLEL),
    "mean": lambda call: call.mean.expand_as(call.update),
    "rotated": rotate,
    "another user's": shuffle,
    "another user's context": swap_context,
    "noise as context": noise_context,
}
"""What is added in place of the update, by the name it has in tables."""

RANDOM = frozenset({"rotated", "another user's", "another user's context", "noise as context"})
"""Those that draw: they are repeated."""


class Ledger:
    """Energies of the updates that an intervention met, and their sums; a row that repeats the last counts once."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.changed: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, unit: str, call: Call, replaced: Update) -> None:
        fresh = torch.ones(len(call.update), 1, dtype=torch.bool, device=call.update.device)
        fresh[1:, 0] = (call.query[1:] != call.query[:-1]).flatten(1).any(1) | (
            call.context[1:] != call.context[:-1]
        ).flatten(1).any(1)
        chosen = call.tokens & fresh
        update, difference = call.update[chosen].double(), (replaced - call.update)[chosen].double()
        self.before[unit] = self.before.get(unit, 0.0) + float(update.square().sum())
        self.changed[unit] = self.changed.get(unit, 0.0) + float(difference.square().sum())
        self.sums[unit] = self.sums.get(unit, torch.zeros((), device=update.device)) + update.sum(0)
        self.tokens[unit] = self.tokens.get(unit, 0) + len(update)

    @property
    def energy(self) -> float:
        """Σ|G' − G|² / Σ|G|² over all tokens of the units: the share of energy that is removed, where a part is."""
        before = sum(self.before.values())
        return sum(self.changed.values()) / before if before else 0.0

    def means(self) -> dict[str, Tensor]:
        return {unit: total / max(self.tokens[unit], 1) for unit, total in self.sums.items()}


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    intervention: Intervention | None,
    *,
    means: Mapping[str, Tensor] | None = None,
    units: Collection[str] | None = None,
    seed: int = 0,
) -> Iterator[Ledger]:
    """The model with another update in `units` (None: in all of them), for as long as the block lasts.

    None as intervention leaves everything and only keeps the books: its `means` are what `mean` needs. The model
    itself does not change, and what is drawn comes from `seed` alone.
    """
    ledger, generator = Ledger(), torch.Generator().manual_seed(seed)
    inner = raw_module(model)
    batch: list[Batch] = []
    acted: set[str] = set()

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        batch[:] = [argument for argument in arguments if isinstance(argument, Batch)]
        acted.clear()

    with contextlib.ExitStack() as stack:
        stack.callback(inner.register_forward_pre_hook(begin).remove)
        for site in find_units(inner):
            if units is not None and site.name not in units:
                continue
            if means is not None:
                mean = means[site.name]
            else:
                mean = torch.zeros(site.module.attention.heads.output.out_features)
            replace = _Replacement(site.name, site.domain, intervention, mean, batch, acted, generator, ledger)
            stack.callback(site.module.register_forward_pre_hook(replace.note).remove)
            stack.callback(site.module.update.register_forward_hook(replace.act).remove)
        yield ledger


@dataclass
class _Replacement:
    """The hooks of one unit."""

    unit: str
    domain: int
    intervention: Intervention | None
    mean: Tensor
    batch: list[Batch]
    acted: set[str]
    """Units that have had their call of this pass. The batch comes first; a model may encode further users after it
    (CDSRNP's support), and their updates stay."""
    generator: torch.Generator
    ledger: Ledger
    given: tuple[Any, ...] = ()

    def note(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.given = (module, *arguments)

    def act(self, _: nn.Module, __: tuple[Any, ...], update: Tensor) -> Tensor | None:
        module, query, context, mask = self.given
        if self.unit in self.acted:
            return None
        self.acted.add(self.unit)
        [batch] = self.batch
        events = (batch.mask & (batch.domains == self.domain)).any(1)
        asked = (batch.mask & (batch.target_domains == self.domain)).any(1)
        rows = events if int(events.sum()) == len(query) else events | asked  # with or without slots for questions
        assert int(rows.sum()) == len(query), "a unit gets a row for every user of the batch with a state in its domain"
        mean = self.mean.to(update)
        call = Call(module, batch.user[rows], query, context, mask, update, mean, self.generator)
        if self.intervention is None:
            self.ledger.add(self.unit, call, update)
            return None
        replaced = torch.where(call.tokens[..., None], self.intervention(call).to(update.dtype), update)
        self.ledger.add(self.unit, call, replaced)
        return replaced
