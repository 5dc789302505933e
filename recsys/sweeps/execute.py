"""A sweep at work: what is to be run next follows from what lies on disk, so that it can be stopped at any moment."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from recsys.evaluation.metrics import metric_key
from recsys.experiment import Data, DataConfig, Experiment, load_data
from recsys.loading import dump_yaml
from recsys.results import RunDirectory, RunHeld, State, atomic, write_json, write_text
from recsys.scaling.records import PARAMETERS, RESPONSES, TRIAL_COLUMNS, from_runs
from recsys.sweeps.executors import Handle
from recsys.sweeps.grouping import bundle
from recsys.sweeps.learning_rate import choose_rate, next_steps
from recsys.sweeps.plan import Cell, Plan
from recsys.sweeps.tune import with_values
from recsys.training.run import select, train
from recsys.training.together import train_together

_WAIT = 0.2
"""Seconds between two looks at what is running."""

_TRIAL = "trial.json"


@dataclass(frozen=True)
class Job:
    """One run of a cell."""

    cell: Cell
    experiment: Experiment
    trial: bool
    """Whether it is for the learning rate: then no test target is ranked."""

    def directory(self, runs: Path) -> RunDirectory:
        return RunDirectory.of(runs, self.experiment.name, self.experiment.yaml(), self.cell.data)

    @property
    def label(self) -> str:
        what = f"trial at {self.experiment.optim.lr:.3g}" if self.trial else f"seed {self.experiment.seed}"
        return f"{self.cell.label}, {what}"


CellState = Literal["fixed", "interior", "edge", "untuned", "tuning"]


@dataclass(frozen=True)
class Progress:
    """Where a cell stands: what it is to be run with, and the runs that can be run now."""

    cell: Cell
    tuned: CellState
    rate: float | None
    jobs: tuple[Job, ...]


class Desk:
    """The folder of a sweep: its runs, and its table."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self.runs = directory / "runs"

    def progress(self, cell: Cell) -> Progress:
        """Read off the disk. Runs that are done or failed are no jobs any more."""
        tuning = self.plan.config.tuning
        tuned: CellState
        if tuning is None:
            tuned, rate = "fixed", cell.experiment.optim.lr
        else:
            trials = self.trials(cell)
            open_jobs = tuple(job for job in trials.values() if isinstance(job, Job))
            if open_jobs:
                return Progress(cell, "tuning", None, open_jobs)
            chosen = choose_rate(tuning, {step: loss for step, loss in trials.items() if not isinstance(loss, Job)})
            if chosen is None or not chosen.interior:
                stuck: CellState = "untuned" if chosen is None else "edge"
                return Progress(cell, stuck, None if chosen is None else chosen.rate, ())
            tuned, rate = "interior", chosen.rate
        jobs = (self.final(cell, rate, seed) for seed in self.plan.config.seeds)
        return Progress(cell, tuned, rate, tuple(job for job in jobs if self.state(job) in ("new", "partial")))

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """All that can be run now."""
        return [job for cell in cells for job in self.progress(cell).jobs]

    def trials(self, cell: Cell) -> dict[float, float | Job | None]:
        """Step -> its loss, None where it failed, or the job where it has not ended. Trials of the future follow."""
        tuning = self.plan.config.tuning
        assert tuning is not None
        found: dict[float, float | Job | None] = {}
        while True:
            ended = {step: loss for step, loss in found.items() if not isinstance(loss, Job)}
            if len(ended) < len(found):
                return found
            steps = next_steps(tuning, ended)
            if not steps:
                return found
            for step in steps:
                job = self.trial(cell, tuning.rate(step))
                found[step] = job if not self.ended(job) else self.loss(job)

    def trial(self, cell: Cell, rate: float) -> Job:
        assert self.plan.config.tuning is not None
        values = {"seed": self.plan.config.tuning.seed, "optim.lr": rate}
        return Job(cell, with_values(cell.experiment, values), trial=True)

    def final(self, cell: Cell, rate: float, seed: int) -> Job:
        return Job(cell, with_values(cell.experiment, {"seed": seed, "optim.lr": rate}), trial=False)

    def state(self, job: Job) -> State:
        return job.directory(self.runs).state

    def ended(self, job: Job) -> bool:
        run = job.directory(self.runs)
        return run.state == "failed" or (run.path / _TRIAL).exists()

    def loss(self, job: Job) -> float | None:
        """Of a trial that has ended; None where it failed."""
        run = job.directory(self.runs)
        if run.state == "failed":
            return None
        value = json.loads((run.path / _TRIAL).read_text())["cross_entropy"]
        return None if value is None else float(value)

    def forget_failures(self) -> None:
        """Failed runs are run again, from their last checkpoint where they have one."""
        for failed in self.runs.glob("*/FAILED"):
            failed.unlink()

    def table(self) -> pd.DataFrame:
        """One row per run that counts, also where it is not done: then it says why and has no numbers."""
        return from_runs([row for cell in self.plan.cells for row in self._rows(cell)])

    def trials_table(self) -> pd.DataFrame:
        """One row per trial that has ended: the bowl of each cell. A failed one has no loss."""
        rows = [
            {"study": cell.study, "arm": cell.arm, "size": cell.size, "learning_rate": rate, "cross_entropy": loss}
            for cell in self.plan.cells
            if self.plan.config.tuning is not None
            for step, loss in sorted(self.trials(cell).items())
            if not isinstance(loss, Job)
            for rate in [self.plan.config.tuning.rate(step)]
        ]
        return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))

    def write_tables(self) -> pd.DataFrame:
        """`table.csv`, and `trials.csv` where learning rates are tried; gives the former."""
        table = self.table()
        tables = {"table.csv": table}
        if self.plan.config.tuning is not None:
            tables["trials.csv"] = self.trials_table()
        for name, frame in tables.items():
            with atomic(self.directory / name) as path:
                frame.to_csv(path, index=False, lineterminator="\n")
        return table

    def _rows(self, cell: Cell) -> Iterator[dict[str, Any]]:
        progress = self.progress(cell)
        about: dict[str, Any] = {"study": cell.study, "arm": cell.arm, "size": cell.size}
        about |= {"tuned": progress.tuned, "learning_rate": progress.rate}
        about |= {"matched_on": cell.basis, "gap": None if cell.gap is None else round(cell.gap, 6)}
        about |= {name: getattr(cell.parameters, name) for name in PARAMETERS} | {"targets": cell.targets}
        for seed in self.plan.config.seeds:
            row = about | {"seed": seed, "state": {"tuning": "new"}.get(progress.tuned, progress.tuned)}
            if progress.tuned in ("fixed", "interior"):
                assert progress.rate is not None
                job = self.final(cell, progress.rate, seed)
                run = job.directory(self.runs)
                row |= {"state": run.state, "run": run.path.name}
                if run.state == "done":
                    row |= _numbers(run, cell)
            yield row


def _numbers(run: RunDirectory, cell: Cell) -> dict[str, Any]:
    final = run.read_final()
    epoch, epochs = final["selection"]["epoch"], final["selection"]["epochs"]
    [chosen] = [record for record in run.read_log() if record["epoch"] == epoch]
    values = {response: chosen[metric_key("validation", "macro", response, "full")] for response in RESPONSES}
    tests = {response: metric_key("test", "macro", response, "full") for response in RESPONSES}
    tested = {f"test_{name}": final["metrics"].get(key, {}).get("value") for name, key in tests.items()}
    work = {"training_flops": cell.flops.step + cell.flops.logits_step, "logits_flops": cell.flops.logits_step}
    return (
        values
        | tested
        | {name: epochs * value for name, value in work.items()}
        | {
            "epochs": epochs,
            "chosen_epoch": epoch,
        }
    )


def run_sweep(
    plan: Plan,
    directory: Path,
    *,
    data_root: Path | None,
    shard: tuple[int, int],
    budget_minutes: float | None,
    retry: bool,
    watch: Callable[["Desk", list[str]], None],
) -> pd.DataFrame:
    """Run what is not done yet; gives the table. `watch` is told whenever a run begins or ends.

    Of `shard` = (i, n), only every n-th cell from the i-th on is run here; the table is that of all. After
    `budget_minutes` no further run is begun. What fails inside a run is the run's: its traceback stays in its
    directory, and the others go on. Raises what keeps a run from beginning at all.
    """
    started = time.monotonic()
    desk = Desk(plan, directory)
    desk.runs.mkdir(parents=True, exist_ok=True)
    write_text(directory / "sweep.yaml", dump_yaml(plan.config))
    if retry:
        desk.forget_failures()
    cells = plan.cells[shard[0] - 1 :: shard[1]]
    executor = plan.config.executor
    running: dict[tuple[str, ...], tuple[tuple[Job, ...], Handle]] = {}
    with executor.open(directory) as submit:
        while True:
            spent = budget_minutes is not None and time.monotonic() - started > 60 * budget_minutes
            jobs = {} if spent else {job.directory(desk.runs).path.name: job for job in desk.jobs(cells)}
            begun = {name for names in running for name in names}
            bundles = bundle([job for name, job in jobs.items() if name not in begun], plan.config.together)
            for own in bundles[: executor.workers - len(running)]:
                watch(desk, [*_labels(running), *(job.label for job in own)])
                runs = [(job.experiment, job.trial) for job in own]
                handle = submit(execute, runs, desk.runs, data_root, plan.config.threads)
                running[tuple(job.directory(desk.runs).path.name for job in own)] = own, handle
            if not running:
                break
            held = [names for names in _await(running) if not running.pop(names)[1].result()]
            watch(desk, _labels(running))
            if held:
                time.sleep(_WAIT)  # another sweep is at it, or a process of one that was killed ends just now
    return desk.write_tables()


Running = Mapping[tuple[str, ...], tuple[tuple[Job, ...], Handle]]
"""Names of the runs that were handed over together -> the runs, and their handle."""


def _labels(running: Running) -> list[str]:
    return [job.label for jobs, _ in running.values() for job in jobs]


def _await(running: Running) -> list[tuple[str, ...]]:
    """What has ended, once something has."""
    while True:
        ended = [names for names, (_, handle) in running.items() if handle.done()]
        if ended:
            return ended
        time.sleep(_WAIT)


def execute(runs: Sequence[tuple[Experiment, bool]], directory: Path, data_root: Path | None, threads: int) -> bool:
    """One run, or several as one, in whatever process; False where another process has one of them in hand.

    With every experiment goes whether it is a trial.
    """
    torch.set_num_threads(threads)
    if len(runs) == 1:
        return _execute(*runs[0], directory, data_root)
    return all(train_together([partial(_execute, *run, directory, data_root) for run in runs]))


def _execute(experiment: Experiment, trial: bool, runs: Path, data_root: Path | None, *callbacks: Callback) -> bool:
    data = _data(experiment.data, data_root)
    run = RunDirectory.of(runs, experiment.name, experiment.yaml(), data.fingerprint)
    quiet = Console(quiet=True)
    try:
        if not trial:
            train(experiment, data, runs, quiet, callbacks=callbacks)
        else:
            select(experiment, data, runs, quiet, callbacks=callbacks)
            outcome = {"learning_rate": experiment.optim.lr, "cross_entropy": _loss(run, experiment)}
            write_json(run.path / _TRIAL, outcome)
    except RunHeld:
        return False
    except Exception:
        if run.state != "failed":
            raise
    return True


def _loss(run: RunDirectory, experiment: Experiment) -> float | None:
    """The loss at the epoch that validation chose; None where it is not finite."""
    monitor, key = experiment.trainer.monitor, metric_key("validation", "macro", "cross_entropy", "full")
    chosen = max((record for record in run.read_log() if monitor in record), key=lambda record: record[monitor])
    value = float(chosen[key])
    return value if abs(value) < float("inf") else None


@lru_cache(maxsize=4)
def _data(config: DataConfig, data_root: Path | None) -> Data:
    return load_data(config, data_root)
