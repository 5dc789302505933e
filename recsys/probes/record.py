"""What passes through every cross-attention of a model, seen from outside."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys.models.attention import GatedCrossAttention, MultiHeadAttention
from recsys.models.exchange import context_rows
from recsys.models.streams import Streams, cut_streams
from recsys.types import Batch

_COMPILED = "_orig_mod"
"""Under this name `torch.compile` keeps the module that it wraps."""

_SITES = {
    "normalised_query": "attention.query_norm",
    "normalised_context": "attention.context_norm",
    "projected_query": "attention.heads.query",
    "projected_context": "attention.heads.key_value",
    "output": "attention",
    "gate": "gate",
    "update": "update",
}
"""What is read at the exit of which module of a unit."""

_OF_QUERIES = (
    "real",
    "asked",
    "query",
    "normalised_query",
    "projected_query",
    "attended",
    "output",
    "gate",
    "update",
    "result",
)
_OF_CONTEXT = ("context_domain", "context", "normalised_context", "projected_context")


@dataclass(frozen=True, eq=False)
class UnitRecord:
    """One pass through one unit: the states of the domain that asks (queries) and what they read (context).

    A row of queries is a user of the batch who has a state in the domain, left padded to the longest of them; the
    context is that user's merged history, or the one that the unit reads instead. Nothing is detached.
    """

    name: str
    """Path of the unit in the model."""
    domain: int
    """The domain that asks."""
    row: Int[Tensor, " rows"]
    """Row of the batch behind each row of queries."""
    user: Int[Tensor, " rows"]
    real: Bool[Tensor, "rows length"]
    """False at padding."""
    asked: Bool[Tensor, "rows length"]
    """True where the batch puts a question: the states that are ranked or trained."""
    mask: Bool[Tensor, "rows length context"]
    """True where a query may attend."""
    context_domain: Int[Tensor, "rows context"]
    """Domain of each event of the context, `NO_DOMAIN` at padding."""
    query: Float[Tensor, "rows length d_model"]
    """X, the stream as it enters, before its LayerNorm."""
    normalised_query: Float[Tensor, "rows length d_model"]
    context: Float[Tensor, "rows context d_model"]
    normalised_context: Float[Tensor, "rows context d_model"]
    projected_query: Float[Tensor, "rows length d_model"]
    """The queries of all heads side by side."""
    projected_context: Float[Tensor, "rows context keys_values"]
    """The keys of all heads, then their values."""
    attended: Float[Tensor, "rows length d_model"]
    """What the heads have read, side by side, before the out-projection."""
    output: Float[Tensor, "rows length d_model"]
    """X', after the out-projection; exact zeros for a query without a valid key."""
    gate: Float[Tensor, "rows length d_model"]
    update: Float[Tensor, "rows length d_model"]
    """What is added to the stream: gate · X', after dropout."""
    result: Float[Tensor, "rows length d_model"]
    """The stream after the residual."""
    heads: MultiHeadAttention = field(repr=False)

    @property
    def tokens(self) -> Bool[Tensor, "rows length"]:
        """Real queries with at least one valid key."""
        return self.real & self.mask.any(-1)

    @property
    def silent(self) -> Bool[Tensor, "rows length"]:
        """Real queries without a valid key: nothing is added to them, and their output means nothing."""
        return self.real & ~self.mask.any(-1)

    def last(self, length: int, events: int) -> "UnitRecord":
        """The record without all but the last `length` places of the queries and `events` of the context."""
        places, kept = slice(self.mask.shape[1] - length, None), slice(self.mask.shape[2] - events, None)
        return replace(
            self,
            mask=self.mask[:, places, kept],
            **{name: getattr(self, name)[:, places] for name in _OF_QUERIES},
            **{name: getattr(self, name)[:, kept] for name in _OF_CONTEXT},
        )

    @property
    def keys(self) -> Float[Tensor, "rows heads context width"]:
        return self._split(self.projected_context.chunk(2, dim=-1)[0])

    @property
    def values(self) -> Float[Tensor, "rows heads context width"]:
        return self._split(self.projected_context.chunk(2, dim=-1)[1])

    def weights(
        self, projected_query: Float[Tensor, "rows length d_model"]
    ) -> Float[Tensor, "rows heads length context"]:
        """Attention of `projected_query` to the valid keys of each place, in fp32; zeros where there is none."""
        queries = self._split(projected_query).float()
        logits = queries @ self.keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5
        return logits.masked_fill(~self.mask[:, None], -torch.inf).softmax(-1).nan_to_num(nan=0.0)

    def head_outputs(self, attended: Float[Tensor, "*places d_model"]) -> Float[Tensor, "*places heads d_model"]:
        """Each head's part in the out-projection, without its bias: they add up to X' less the bias."""
        width = attended.shape[-1] // self.heads.num_heads
        weight = self.heads.output.weight.to(attended.dtype).unflatten(1, (self.heads.num_heads, width))
        return torch.einsum("...hw,dhw->...hd", attended.unflatten(-1, (self.heads.num_heads, width)), weight)

    def _split(self, x: Float[Tensor, "rows places d_model"]) -> Float[Tensor, "rows heads places width"]:
        return x.unflatten(-1, (self.heads.num_heads, x.shape[-1] // self.heads.num_heads)).transpose(1, 2)


@dataclass(frozen=True)
class UnitSite:
    """A unit of exchange in a model."""

    name: str
    domain: int
    module: GatedCrossAttention = field(repr=False)


def find_units(model: nn.Module) -> list[UnitSite]:
    """The units of a model in the order of its modules; none in a model without an exchange.

    Their names end in the domain that asks: `early.<unit>.<domain>`, `stack.<unit>.<domain>`.
    """
    units = []
    for name, module in raw_module(model).named_modules():
        if isinstance(module, GatedCrossAttention):
            path = ".".join(part for part in name.split(".") if part != _COMPILED)
            domain = path.rpartition(".")[2]
            if not domain.isdecimal():
                raise ValueError(f"the name of a unit ends in the domain that asks, and {path!r} does not")
            units.append(UnitSite(path, int(domain), module))
    return units


def raw_module(model: nn.Module) -> nn.Module:
    """The module itself, where `model` is a compiled wrapper of it: hooks on what is compiled never fire."""
    inner = getattr(model, _COMPILED, model)
    assert isinstance(inner, nn.Module)
    return inner


class Recorder:
    """The latest forward pass of `model`, unit by unit. Made by `record`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = raw_module(model)
        """Call this one."""
        self.batch: Batch | None = None
        """What the latest pass was asked."""
        self.units: dict[str, UnitRecord] = {}
        """A unit that no user of the batch has a state for is not called and has no record."""
        self._sites = find_units(self.model)
        self._streams: Streams | None = None
        self._running = False
        self._seen: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget)
            stack.callback(self.model.register_forward_pre_hook(self._begin, prepend=True).remove)
            stack.callback(self.model.register_forward_hook(self._end, prepend=True, always_call=True).remove)
            for site in self._sites:
                for key, path in _SITES.items():
                    module = site.module.get_submodule(path)
                    stack.callback(module.register_forward_hook(self._keep(key)).remove)
                heads = site.module.attention.heads.output
                stack.callback(heads.register_forward_pre_hook(self._keep_input("attended")).remove)
                stack.callback(site.module.register_forward_hook(self._finish(site)).remove)
            yield

    def _begin(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.units = {}
        self.batch = next((argument for argument in arguments if isinstance(argument, Batch)), None)
        self._streams = None
        self._running = True

    def _end(self, *_: object) -> None:
        self._running = False

    def _keep(self, key: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._seen[key] = output

        return hook

    def _keep_input(self, key: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._seen[key] = arguments[0]

        return hook

    def _finish(self, site: UnitSite) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            query, context, mask = arguments
            seen, self._seen = self._seen, {}
            if not self._running or self.batch is None:
                raise RuntimeError(
                    f"{site.name} ran outside a forward pass of the model that is recorded, so nobody knows which "
                    "users ask; call `recorder.model` with a batch, and no compiled wrapper of it"
                )
            if site.name in self.units:
                return  # the batch comes first; a model may encode further users after it (CDSRNP's support)
            if self._streams is None:
                domains = 1 + max(other.domain for other in self._sites)
                self._streams = cut_streams(self.batch, domains)
            streams, batch = self._streams, self.batch
            block = streams.blocks[site.domain]
            expected = (block.rows, block.length, batch.items.shape[1])
            if tuple(mask.shape) != expected:
                raise ValueError(
                    f"{site.name} was asked for {tuple(mask.shape)} queries and keys (users, states, events), but the "
                    f"batch has {expected} of domain {site.domain}: a probe can only tell which user asks where units "
                    "get their states from `cut_streams` and their masks from `look`"
                )
            row = streams.users()[site.domain]
            asked = torch.zeros(len(streams.real) + 1, dtype=torch.bool, device=mask.device)
            asked[streams.question_slot] = True
            self.units[site.name] = UnitRecord(
                name=site.name,
                domain=site.domain,
                row=row,
                user=batch.user[row],
                real=streams.split(streams.real)[site.domain],
                asked=streams.split(asked[:-1])[site.domain],
                mask=mask,
                context_domain=batch.domains[context_rows(batch, site.module.context)[0][row]],
                query=query,
                context=context,
                result=output,
                heads=site.module.attention.heads,
                **seen,
            )

        return hook

    def _forget(self) -> None:
        self.units, self.batch, self._streams, self._seen = {}, None, None, {}


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recorder]:
    """Watch every unit of exchange of `model` for as long as the block lasts; nothing of the model changes.

    A compiled model runs through its raw module meanwhile, `recorder.model`.

        with record(model) as recorder:
            recorder.model(batch)
            recorder.units["early.0.1"].output
    """
    recorder = Recorder(model)
    with recorder._attached(), _uncompiled(recorder.model):
        yield recorder


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """What parts of the model are compiled runs as written: hooks on it would not fire."""
    compiled = any(module._compiled_call_impl is not None or _COMPILED in module._modules for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
