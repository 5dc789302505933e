"""What a sweep is: which arms, at which sizes, with which seeds, and what each costs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator

from recsys.data.batches import TrainBatches
from recsys.experiment import Data, Experiment, load_data
from recsys.loading import Config, ConfigError, load_yaml
from recsys.results import fingerprint
from recsys.scaling.count import Flops, Parameters, count_flops, count_model
from recsys.scaling.match import TOLERANCE, Basis, Control, match
from recsys.sweeps.executors import ExecutorConfig, LocalConfig
from recsys.sweeps.learning_rate import Tuning
from recsys.sweeps.tune import with_values
from recsys.training.throughput import candidates_of

Values = dict[str, JsonValue]
"""Dotted keys of an experiment and what they become."""

_SAMPLED_STEPS = 4


class ArmConfig(Config):
    """One architecture: the base with some keys set, or a control of another arm's size."""

    set: Values = Field(default_factory=dict)
    match: Control | None = None
    """The control; null: the arm is no control and is what the base and `set` make it."""
    to: str | None = None
    """The arm, without a match of its own, that the control is a control of."""
    basis: Basis = "dense"
    tolerance: float = Field(TOLERANCE, gt=0)
    """Largest relative gap."""

    @model_validator(mode="after")
    def _check(self) -> "ArmConfig":
        if (self.match is None) != (self.to is None):
            raise ValueError("match and to go together: `match: wide_ffn, to: exchange`")
        if self.match is not None and any(key.split(".")[0] == "model" for key in self.set):
            raise ValueError("the model of a matched arm follows from the match; set other keys only")
        return self


class SweepConfig(Config):
    """Every combination of arm, size and seed, and all of that for each combination of `grid`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    base: str
    """The experiment that all runs start from; its path is relative to the sweep's file."""
    set: Values = Field(default_factory=dict)
    """Keys of the base that are other for all runs."""
    sizes: dict[str, Values] = Field(min_length=1)
    """Name of a size -> the keys that make it, ascending."""
    grid: dict[str, tuple[JsonValue, ...]] = Field(default_factory=dict)
    """Key -> its values; a study of its own for every combination, for example one for each dataset."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1), min_length=1)
    tuning: Tuning | None = None
    """The learning rates that every arm gets at every size; null: all runs have that of the base."""
    threads: int = Field(1, ge=1)
    """Of torch, in every run. Results depend on it in their last bits, so it is the sweep's and not the machine's."""
    together: int = Field(1, ge=1)
    """Runs that differ in their optimizer alone (the learning rates of a tuning) are trained as one, so many at a time;
    with `trainer.widths: 1`, those that differ in their seed too. Losses are equal to fp32 noise, not to the bit, so a
    table is that of 1 to about four digits. 1: each by itself."""
    executor: ExecutorConfig = LocalConfig()

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        for name, arm in self.arms.items():
            if arm.to is not None and (arm.to not in self.arms or self.arms[arm.to].match is not None):
                plain = ", ".join(other for other, its in self.arms.items() if its.match is None)
                raise ValueError(f"arms.{name}.to: {arm.to!r} is no arm without a match; there are: {plain or 'none'}")
        for name in (*self.arms, *self.sizes):
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"{name!r} is part of a file name: use letters, digits, '_', '.' and '-'")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each seed once")
        if self.tuning is not None and self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is one of seeds; tune with another, or luck is picked")
        return self


@dataclass(frozen=True)
class Cell:
    """One arm at one size on one study: tuned once, run with every seed."""

    study: str
    """The combination of `grid`; empty without one."""
    arm: str
    size: str
    experiment: Experiment
    """With the base's learning rate, and the first seed."""
    data: str
    """Fingerprint."""
    parameters: Parameters
    flops: Flops
    """Of an epoch: its steps times the mean over a few of its batches."""
    targets: int
    """That an epoch trains on, each once."""
    basis: Basis | None
    """What it is matched on; None for an arm that is no control."""
    gap: float | None
    """(control - treatment) / treatment on that basis."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.study, self.arm, self.size

    @property
    def label(self) -> str:
        return " ".join(part for part in self.key if part)


@dataclass(frozen=True)
class Plan:
    config: SweepConfig
    cells: tuple[Cell, ...]


def load_sweep(path: Path, overrides: list[str]) -> tuple[SweepConfig, Experiment]:
    """The sweep of a file and its base. Raises ConfigError, also where an arm, a size or the grid sets no key of it."""
    config = load_yaml(path, SweepConfig, overrides)
    base = with_values(load_yaml(path.parent / config.base, Experiment), config.set)
    return config, base


def make_plan(config: SweepConfig, base: Experiment, data_root: Path | None) -> Plan:
    """Every cell with its model and what that costs, size by size, so that a sweep cut short has whole sizes.

    Raises ConfigError where values do not go together, and NoMatch where a control comes within its tolerance of no
    treatment: an arm is never called matched where it is not.
    """
    if base.counts:
        raise ConfigError(f"the model {base.model.name!r} counts; a sweep is for models that are trained")
    load = cache(lambda data: load_data(data, data_root))
    cells = [
        _cell(config, study, arm, size, with_values(base, values), load)
        for study, values in _studies(config.grid)
        for size in config.sizes
        for arm in config.arms
    ]
    _require_different(cells)
    return Plan(config, tuple(cells))


def _studies(grid: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Values]]:
    for chosen in product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        label = "_".join(
            str(value) if isinstance(value, str) else f"{key.split('.')[-1]}-{value}" for key, value in values.items()
        )
        yield re.sub(r"[^A-Za-z0-9_.-]", "-", label), values


def _cell(config: SweepConfig, study: str, arm: str, size: str, base: Experiment, load: Any) -> Cell:
    own = config.arms[arm]
    origin = config.arms[own.to] if own.to is not None else own
    values = origin.set | config.sizes[size]
    name = "-".join(part for part in (config.name, study, arm, size) if part)
    experiment = with_values(base, values | own.set | {"name": name, "seed": config.seeds[0]})
    data: Data = load(experiment.data)
    gap = None
    if own.match is not None:
        treatment = with_values(base, values).model
        nearest = match(
            treatment,
            own.match,
            data.catalog,
            experiment.data.max_len,
            basis=own.basis,
            tolerance=own.tolerance,
        )[0]
        experiment = experiment.model_copy(update={"model": nearest.config})
        gap = nearest.gap(own.basis)
    return Cell(
        study=study,
        arm=arm,
        size=size,
        experiment=experiment,
        data=data.fingerprint,
        parameters=count_model(experiment.model, data.catalog, experiment.data.max_len),
        flops=epoch_flops(experiment, data),
        targets=_batches(experiment, data).num_targets,
        basis=own.basis if own.match is not None else None,
        gap=gap,
    )


def epoch_flops(experiment: Experiment, data: Data) -> Flops:
    """Of an epoch of training: batches are of many lengths, so a few are counted and their mean stands for all."""
    batches = _batches(experiment, data)
    every = max(1, len(batches) // _SAMPLED_STEPS)
    sampled = [batch for index, batch in enumerate(batches) if index % every == 0]
    counted = [
        count_flops(
            experiment.model, data.catalog, batch, candidates_of(experiment, data.catalog, int(batch.mask.sum()))
        )
        for batch in sampled
    ]
    return Flops(
        *(
            round(sum(getattr(one, field) for one in counted) * len(batches) / len(counted))
            for field in ("forward", "step", "logits_forward", "logits_step")
        )
    )


def _batches(experiment: Experiment, data: Data) -> TrainBatches:
    return TrainBatches(
        data.sequences,
        data.split,
        max_len=experiment.data.max_len,
        batch_size=experiment.trainer.batch_size,
        seed=0,
        device="cpu",
        domain=experiment.data.domain,
        windows=experiment.data.windows,
        length_pool=experiment.trainer.length_pool,
    )


def _require_different(cells: list[Cell]) -> None:
    """Raises ConfigError where two cells are the same experiment: a forgotten key would show as a perfect tie."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        config = fingerprint(with_values(cell.experiment, {"name": "x"}).yaml(), cell.data)
        if config in seen:
            raise ConfigError(f"{seen[config].label} and {cell.label} are the same experiment; set another key in one")
        seen[config] = cell
