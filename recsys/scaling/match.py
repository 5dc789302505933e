"""Baselines of a treatment's size. "Parameter-matched" is not one thing: each control rules out another explanation."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, get_args

from recsys.errors import UserError
from recsys.loading import ConfigError
from recsys.models import ModelConfig
from recsys.scaling.count import Flops, Parameters, count_flops, count_model, full_batch
from recsys.types import Catalog

Basis = Literal["dense", "total", "active", "flops"]
Control = Literal["wide_ffn", "deeper", "wider", "self_attention", "shuffled_context", "table_wider"]
CONTROLS: tuple[Control, ...] = get_args(Control)

TOLERANCE = 0.005


def control_named(name: str) -> Control:
    """Raises ConfigError for a name that is none."""
    for control in CONTROLS:
        if control == name:
            return control
    near = difflib.get_close_matches(name, CONTROLS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no control {name!r}{hint} (one of {', '.join(CONTROLS)})")


class NoMatch(UserError):
    """Nothing comes within the tolerance; the message names the two nearest."""


@dataclass(frozen=True)
class Cost:
    """Of one configured model."""

    parameters: Parameters
    flops: Flops
    """Of a training step on one history of full length, every target scored against its domain."""

    def on(self, basis: Basis) -> int:
        """The number that is matched. FLOPs are those of a step without the logits."""
        return self.flops.step if basis == "flops" else getattr(self.parameters, basis)


@dataclass(frozen=True)
class Match:
    """A control and the treatment that it stands against."""

    control: Control
    config: ModelConfig
    cost: Cost
    treatment: Cost

    def gap(self, basis: Basis) -> float:
        """(control - treatment) / treatment."""
        return self.cost.on(basis) / self.treatment.on(basis) - 1


def match(
    treatment: ModelConfig,
    control: Control,
    catalog: Catalog,
    max_len: int,
    *,
    baseline: ModelConfig | None = None,
    basis: Basis = "dense",
    tolerance: float = TOLERANCE,
) -> list[Match]:
    """Every variant of the baseline that `control` allows within `tolerance` of the treatment, nearest first.

    The baseline is the treatment without its exchange unless another is given, such as another model, or the treatment
    itself where it is to be shrunk. `wide_ffn` changes d_ff; `deeper` adds blocks and then sets d_ff, upwards or
    downwards; `wider` widens d_model behind a projection, the item table kept as it is; `table_wider` widens d_model
    and all that hangs on it, most of it the item table, as papers have done: match it on `total`.

    `self_attention` and `shuffled_context` are the treatment itself, reading a user's own domain or another user's
    history: equal in everything but what can be learnt from it. They take no baseline.

    Match on `dense` first: where the item table is most of a model, two models of one total can differ twofold in
    everything else. Raises NoMatch, with the two nearest; ConfigError where a model lacks the key to be changed.
    """
    if baseline is not None and control in CONTEXT_CONTROLS:
        raise ConfigError(f"{control} is the treatment itself with another context; it takes no baseline")
    if baseline is None:
        baseline = treatment if control in CONTEXT_CONTROLS else _without_exchange(treatment)
    batch = full_batch(catalog, max_len)

    @cache
    def measure(config: ModelConfig) -> int:
        if basis == "flops":
            return count_flops(config, catalog, batch).step
        return getattr(count_model(config, catalog, max_len), basis)

    def cost(config: ModelConfig) -> Cost:
        return Cost(count_model(config, catalog, max_len), count_flops(config, catalog, batch))

    search = _Search(baseline, measure(treatment), tolerance, measure)
    found = [(abs(search.gap(config)), config) for config in _CONTROLS[control](search)]
    found.sort(key=lambda pair: pair[0])
    within = [config for gap, config in found if gap <= tolerance]
    if not within:
        nearest = "; ".join(
            f"{_changes(baseline, config)} is off by {search.gap(config):+.2%}" for _, config in found[:2]
        )
        raise NoMatch(
            f"{control} cannot bring {baseline.name} to {search.goal:,} ({basis}) within {tolerance:.2%}: "
            f"{nearest or 'it is larger as it is'}; try another control or a larger tolerance"
        )
    aim = cost(treatment)
    return [Match(control, config, cost(config), aim) for config in within]


@dataclass(frozen=True)
class _Search:
    start: ModelConfig
    goal: int
    tolerance: float
    measure: Callable[[ModelConfig], int]

    def gap(self, config: ModelConfig) -> float:
        return self.measure(config) / self.goal - 1


def _wide_ffn(search: _Search) -> Iterator[ModelConfig]:
    yield from _set_d_ff(search, search.start)


def _deeper(search: _Search) -> Iterator[ModelConfig]:
    """One block more, two, and so on, while each keeps a quarter of the d_ff that it had."""
    least = max(1, _value(search.start, "d_ff") // 4)
    layers = _value(search.start, "num_layers") + 1
    while search.gap(_with(search.start, num_layers=layers, d_ff=least)) <= search.tolerance:
        yield from _set_d_ff(search, _with(search.start, num_layers=layers))
        layers += 1


def _wider(search: _Search) -> Iterator[ModelConfig]:
    """As `table_wider`, with the item vectors as wide as they were."""
    fixed = _with(search.start, d_item=_value(search.start, "d_model"))
    yield from _table_wider(replace(search, start=fixed))


def _table_wider(search: _Search) -> Iterator[ModelConfig]:
    """The last width below the goal and the first above it; d_ff stays unless neither of them will do."""
    step = _value(search.start, "num_heads")

    def at(steps: int) -> ModelConfig:
        return _with(search.start, d_model=_value(search.start, "d_model") + steps * step)

    above = 1
    while search.measure(at(above)) < search.goal:
        above *= 2
    below = above // 2  # 0 is the baseline itself
    while above - below > 1:
        middle = (above + below) // 2
        if search.measure(at(middle)) < search.goal:
            below = middle
        else:
            above = middle
    widths = [at(steps) for steps in (below, above) if steps]
    yield from widths
    if all(abs(search.gap(config)) > search.tolerance for config in widths):
        for config in widths:
            yield from _set_d_ff(search, config)


CONTEXT_CONTROLS: dict[Control, str] = {"self_attention": "own", "shuffled_context": "shuffled"}
"""Controls that are the treatment reading something else, and what."""


def _reading(context: str, search: _Search) -> Iterator[ModelConfig]:
    cross = getattr(search.start, "cross", None)
    if cross is None:
        raise ConfigError(f"the model {search.start.name!r} has no exchange that could read something else")
    yield _replaced(search.start, {"cross": {**cross.model_dump(), "context": context}})


_CONTROLS: dict[Control, Callable[[_Search], Iterator[ModelConfig]]] = {
    "wide_ffn": _wide_ffn,
    "deeper": _deeper,
    "wider": _wider,
    **{control: partial(_reading, context) for control, context in CONTEXT_CONTROLS.items()},
    "table_wider": _table_wider,
}


def _set_d_ff(search: _Search, config: ModelConfig) -> Iterator[ModelConfig]:
    """The two integers around the d_ff that would meet the goal; every count is linear in d_ff."""
    one, two = (search.measure(_with(config, d_ff=d_ff)) for d_ff in (1, 2))
    exact = (search.goal - one) // (two - one) + 1
    for d_ff in (exact, exact + 1):
        if d_ff >= 1:
            yield _with(config, d_ff=d_ff)


def _without_exchange(config: ModelConfig) -> ModelConfig:
    if getattr(config, "cross", None) is None:
        raise ConfigError(f"the model {config.name!r} has no exchange to be compared without; give a baseline")
    return _replaced(config, {"cross": None})


def _with(config: ModelConfig, **changes: int) -> ModelConfig:
    for key in changes:
        _require(config, key)
    return _replaced(config, changes)


def _replaced(config: ModelConfig, changes: Mapping[str, object]) -> ModelConfig:
    """A validated copy; pydantic's own copy checks nothing."""
    return type(config).model_validate({**config.model_dump(), **changes})


def _value(config: ModelConfig, key: str) -> int:
    _require(config, key)
    return getattr(config, key)


def _require(config: ModelConfig, key: str) -> None:
    if key not in type(config).model_fields:
        raise ConfigError(f"the model {config.name!r} has no key {key!r}, which this control changes")


def _changes(start: ModelConfig, config: ModelConfig) -> str:
    return ", ".join(
        f"{key} = {value}" for key, value in config.model_dump().items() if value != getattr(start, key, None)
    )
