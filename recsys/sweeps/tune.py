"""A search over keys of an experiment: every trial an ordinary run, judged by validation alone.

What a model was given is on record, trial by trial and failures included, so that two models can be shown to have had
the same. No test target is ranked here; `train` does that for the config that was chosen.
"""

import difflib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, RootModel, model_validator
from rich.console import Console

from recsys.experiment import Data, Experiment, load_data
from recsys.loading import Config, ConfigError, apply_overrides, load_yaml, parse_config
from recsys.results import RunDirectory, RunError, write_json, write_text
from recsys.training.run import select

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SamplerName = Literal["random", "tpe"]

FIXED = ("name", "seed", "eval", "data.source", "data.split", "data.domain", "trainer.monitor", "trainer.device")
"""Keys that are not searched: with them the trials would not be measured alike, or (`seed`) luck would be picked."""


class Dimension(Config):
    """The values of one key: some to choose from, or a range."""

    choices: tuple[bool | int | float | str | None, ...] | None = Field(None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    """Included. Between two whole numbers all values are whole: write 1.0 for a range of real ones."""
    log: bool = False
    """Draw the logarithm."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Dimension":
        if (self.low is None) != (self.high is None) or (self.low is None) == (self.choices is None):
            raise ValueError("give either choices: [...], or low and high")
        if self.choices is not None and self.log:
            raise ValueError("log belongs to low and high, not to choices")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(f"low = {self.low} is above high = {self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"with log, low must be above 0, not {self.low}")
        return self

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=self.log)
        assert low is not None
        assert high is not None
        return FloatDistribution(low, high, log=self.log)


Space = Mapping[str, Dimension]
"""Dotted key of an experiment -> what it may be."""


@dataclass(frozen=True)
class Trial:
    """One set of values and what came of it: a number, or the reason why there is none."""

    number: int
    values: dict[str, Any]
    value: float | None
    error: str | None
    run: str
    """Name of the run's directory; empty where the values made no experiment."""
    seconds: float


def load_space(path: Path, experiment: Experiment) -> dict[str, Dimension]:
    """The search space of a YAML file, which maps keys of `experiment` to `{choices: …}` or `{low: …, high: …}`.

    Raises ConfigError, also for a key that the experiment lacks or that must not be searched.
    """
    values = load_yaml(path, _SpaceFile).root
    if not values:
        raise ConfigError(f"{path} names no key to search; write, for example, optim.lr: {{low: 1e-4, high: 1e-2}}")
    resolved = experiment.model_dump(mode="json")
    for key in values:
        _check_key(key, resolved, str(path))
    return {key: parse_config(value, Dimension, f"{path}: {key}") for key, value in values.items()}


def tune(
    experiment: Experiment,
    space: Space,
    directory: Path,
    *,
    trials: int,
    sampler: SamplerName,
    seed: int,
    data_root: Path | None,
    console: Console,
) -> list[Trial]:
    """Run trials until there are `trials` of them, failed ones included; gives all there are.

    Leaves in `directory` the run directories (`runs`), Optuna's journal, `trials.json`, and the best experiment so far
    as `best.yaml`. A search that was cut off goes on: a trial is on record once it has ended, and what the next one
    tries follows from `seed` and the trials before it. Raises RunError where the directory holds the trials of
    another search, and ConfigError or DataError for an experiment that cannot run at all.
    """
    optuna = _optuna()
    data = load_data(experiment.data, data_root)
    about = {
        "experiment": experiment.yaml(),
        "data": data.fingerprint,
        "space": {key: dimension.model_dump(mode="json", exclude_defaults=True) for key, dimension in space.items()},
        "sampler": sampler,
        "seed": seed,
    }
    distributions = {key: dimension.distribution() for key, dimension in space.items()}
    with RunDirectory(directory).held(), _quiet(optuna):
        study = _open_study(directory, about)
        while (number := len(study.trials)) < trials:
            # Optuna records a trial when it is drawn. Drawn from a copy, one that is cut off is not on record.
            drawing = optuna.create_study(direction="maximize", sampler=_sampler(sampler, seed, number))
            drawing.add_trials(study.trials)
            values = drawing.ask(distributions).params
            console.print(f"trial {number + 1} of {trials}: {values_text(values)}", highlight=False, markup=False)
            trial = _run(number, values, experiment, data, data_root, directory / "runs")
            outcome = trial.error if trial.value is None else f"{experiment.trainer.monitor} {trial.value:.4f}"
            console.print(f"  {outcome}  ({trial.seconds:.0f} s)", highlight=False, markup=False)
            study.add_trial(_frozen(trial, distributions))
            _write(directory, experiment, about, _trials(study))
        return _trials(study)


def best(trials: list[Trial]) -> Trial:
    """The first trial of the highest value. Raises RunError where no trial has one."""
    found = [trial for trial in trials if trial.value is not None]
    if not found:
        reason = f"; the first failed with {trials[0].error}" if trials else ""
        raise RunError(f"none of {len(trials)} trials gave a number{reason}")
    return max(found, key=lambda trial: trial.value or 0.0)


def trials_frame(trials: list[Trial], monitor: str) -> pd.DataFrame:
    """One row per trial as text, the best first and those that failed last."""
    rows = sorted(trials, key=lambda trial: (trial.value is None, -(trial.value or 0.0), trial.number))
    return pd.DataFrame(
        {
            "trial": str(trial.number + 1),
            monitor: "failed" if trial.value is None else f"{trial.value:.4f}",
            **{key: _text(value) for key, value in trial.values.items()},
            "seconds": f"{trial.seconds:.0f}",
            "run": trial.run or "–",
        }
        for trial in rows
    )


def values_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


class _SpaceFile(RootModel[dict[str, dict[str, Any]]]):
    """The file before its parts are read one by one, so that an error names the key."""


def _check_key(key: str, resolved: dict[str, Any], origin: str) -> None:
    """Raises ConfigError unless the resolved experiment has the key and it may be searched."""
    for fixed in FIXED:
        if key == fixed or key.startswith(f"{fixed}."):
            raise ConfigError(
                f"{origin}: {key} is not searched: it is the same for all trials; set it in the experiment"
            )
    node: Any = resolved
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = list(node) if isinstance(node, dict) else []
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {'.'.join([*parts[:depth], *near])}?"
                if near
                else f"here are: {', '.join(known) or 'none'}"
            )
            raise ConfigError(f"{origin}: the experiment has no key {key}; {hint}")
        node = node[part]


def _run(
    number: int, values: dict[str, Any], experiment: Experiment, data: Data, data_root: Path | None, runs: Path
) -> Trial:
    started = time.perf_counter()
    run, value, error = "", None, None
    try:
        chosen = with_values(experiment, values)
        own = data if chosen.data == experiment.data else load_data(chosen.data, data_root)
        run = RunDirectory.of(runs, chosen.name, chosen.yaml(), own.fingerprint).path.name
        value = select(chosen, own, runs, Console(quiet=True))
        if not np.isfinite(value):
            value, error = None, f"{chosen.trainer.monitor} is {value}"
    except Exception as problem:  # whatever it is, it is the outcome of this trial; the run keeps its traceback
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return Trial(number, values, value, error, run, round(time.perf_counter() - started, 1))


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with some keys set. Raises ConfigError where they do not go together."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    resolved = experiment.model_dump(mode="json")
    return parse_config(apply_overrides(resolved, overrides), Experiment, "these values")


def _frozen(trial: Trial, distributions: dict[str, "BaseDistribution"]) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.FAIL if trial.value is None else TrialState.COMPLETE,
        value=trial.value,
        params=trial.values,
        distributions=distributions,
        user_attrs={"error": trial.error, "run": trial.run, "seconds": trial.seconds},
    )


def _trials(study: "Study") -> list[Trial]:
    return [
        Trial(frozen.number, frozen.params, frozen.value, **frozen.user_attrs)
        for frozen in sorted(study.trials, key=lambda frozen: frozen.number)
    ]


def _open_study(directory: Path, about: dict[str, Any]) -> "Study":
    """The study of the directory, new or as it was left. Raises RunError where it is another search."""
    from optuna import create_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    study = create_study(storage=storage, study_name="tune", direction="maximize", load_if_exists=True)
    known = study.user_attrs
    different = [key for key, value in about.items() if known.get(key, value) != value]
    if different:
        raise RunError(
            f"{directory} holds the trials of a search with another {' and another '.join(different)}; "
            "go on with the same, or give another --output"
        )
    for key in about.keys() - known.keys():
        study.set_user_attr(key, about[key])
    return study


def _sampler(name: SamplerName, seed: int, number: int) -> "BaseSampler":
    """One sampler per trial, so that a search taken up again draws what an undisturbed one would."""
    from optuna.samplers import RandomSampler, TPESampler

    own = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])
    return RandomSampler(seed=own) if name == "random" else TPESampler(seed=own)


def _write(directory: Path, experiment: Experiment, about: dict[str, Any], trials: list[Trial]) -> None:
    """`trials.json`, and `best.yaml` as soon as there is a number."""
    failed = [trial for trial in trials if trial.value is None]
    found = best(trials) if len(failed) < len(trials) else None
    record = {
        "name": experiment.name,
        "metric": experiment.trainer.monitor,
        **{key: about[key] for key in ("sampler", "seed", "space", "data")},
        "failed": len(failed),
        "seconds": round(sum(trial.seconds for trial in trials), 1),
        "best": None if found is None else found.number + 1,
        "trials": [asdict(trial) | {"number": trial.number + 1} for trial in trials],
    }
    write_json(directory / "trials.json", record)
    if found is not None:
        head = (
            f"# Purpose: trial {found.number + 1}, the best of {len(trials)} of a search ({about['sampler']}, seed "
            f"{about['seed']}, {len(failed)} failed): {values_text(found.values)}.\n"
            f"# Command: python train.py --config {directory / 'best.yaml'} --runs-dir {directory / 'runs'}\n"
            f"# Expect:  {experiment.trainer.monitor} {found.value:.4f}; the test targets were not ranked yet.\n"
            f"# Time:    {found.seconds:.0f} s for the training, which is done.\n"
        )
        write_text(directory / "best.yaml", head + with_values(experiment, found.values).yaml())


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value).strip('"')


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna without its line for every study."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RunError("`recsys tune` needs Optuna: pip install 'recsys[tune]'") from None
    return optuna
