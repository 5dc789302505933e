"""What it brings to train runs of one shape as one: `python benchmarks/together.py`.

Runs that differ in their learning rate (or seed, `--vary seed`: then those that are trained as one have batches of one
shape), one after another and several as one, take turns in this process on one thread.
A step is from the end of one to the end of the next, whatever is between them; a run is everything from its
directory to its last validation. Both in seconds of the clock and of the processor, which other work on the machine
disturbs less. Writes `benchmarks/results/together-<rate or seed>-<date>-<hardware>.json`.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console

from recsys.experiment import Data, Experiment, load_data
from recsys.loading import parse_config
from recsys.training.environment import describe_environment
from recsys.training.run import select
from recsys.training.together import train_together

HERE = Path(__file__).parent
SIZES = (1, 3, 5, 8)
CASES = [(8, 16), (8, 64), (16, 64), (32, 64), (64, 64)]
"""d_model and users per step."""
CLOCKS: dict[str, Callable[[], float]] = {"clock": time.perf_counter, "processor": time.process_time}


def experiment(d_model: int, batch_size: int, rate: float, seed: int = 0, widths: int | None = None) -> Experiment:
    """Two domains with an exchange, on 1,200 users with up to 60 events and 1,200 items."""
    source = {"name": "synthetic", "num_users": 1200, "items_per_domain": 600, "mean_events": 30, "max_events": 60}
    size = {"d_model": d_model, "d_ff": 4 * d_model, "num_layers": 1, "num_heads": 2}
    values = {
        "name": "together",
        "seed": seed,
        "data": {"source": source, "max_len": 30},
        "model": {"name": "cross_domain", **size, "cross": {"num_heads": 2}},
        "loss": {"name": "softmax"},
        "optim": {"lr": rate},
        "trainer": {"epochs": 2, "validate_every": 2, "batch_size": batch_size, "device": "cpu", "widths": widths},
    }
    return parse_config(values, Experiment, "benchmark")


class Steps(pl.Callback):
    """Seconds of every step but the first of an epoch, by clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in CLOCKS}
        self._last: dict[str, float] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = {name: clock() for name, clock in CLOCKS.items()}
        if self._last is not None:
            for name, seconds in self.seconds.items():
                seconds.append(now[name] - self._last[name])
        self._last = now


def measure(d_model: int, batch_size: int, size: int, data: Data, as_one: bool, vary: str) -> dict[str, Any]:
    """Seconds of a step, and of whole runs; `size` of them as one, or as many one after another."""
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:

        def run(index: int, *callbacks: pl.Callback) -> float:
            own = [*callbacks, *([steps] if index == 0 or not as_one else [])]
            seed, widths = (index, 1 if as_one else None) if vary == "seed" else (0, None)
            rate = 0.001 if vary == "seed" else 0.001 * (1 + index / 10)
            config = experiment(d_model, batch_size, rate, seed, widths)
            return select(config, data, Path(folder), Console(quiet=True), callbacks=own)

        runs = [partial(run, index) for index in range(size)]
        started = {name: clock() for name, clock in CLOCKS.items()}
        if as_one:
            train_together(runs)
        else:
            for one in runs:
                one()
        taken = {name: clock() - started[name] for name, clock in CLOCKS.items()}
    return {"steps": steps.seconds, "runs": taken}


def summary(found: list[dict[str, Any]], size: int, models_in_step: int) -> dict[str, Any]:
    """Of a few rounds: milliseconds of a step per model, and runs per hour in the median round."""
    values: dict[str, Any] = {}
    for name in CLOCKS:
        steps = [1000 * seconds / models_in_step for one in found for seconds in one["steps"][name]]
        values[name] = {
            "step_ms_min": round(min(steps), 3),
            "step_ms_median": round(median(steps), 3),
            "runs_per_hour": round(3600 * size / median(one["runs"][name] for one in found), 1),
        }
    return values


def _line(alone: dict[str, Any], one: dict[str, Any], gains: dict[str, Any]) -> list[str]:
    return [
        f"{name}: a step {alone[name]['step_ms_median']:.2f} -> {one[name]['step_ms_median']:.2f} ms a model, "
        f"gain {gains[name]['step_median']:.2f}, in runs per hour {gains[name]['runs_per_hour']:.2f}"
        for name in CLOCKS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", type=int, action="append", help="only this one of the cases, from 0; repeatable")
    parser.add_argument("--vary", choices=["rate", "seed"], default="rate", help="what the runs differ in")
    arguments = parser.parse_args()
    vary = arguments.vary
    torch.set_num_threads(1)
    results = []
    for d_model, batch_size in [CASES[index] for index in arguments.case] if arguments.case else CASES:
        data = load_data(experiment(d_model, batch_size, 0.001).data, None)
        measure(d_model, batch_size, 1, data, as_one=False, vary=vary)  # warms up
        found: dict[tuple[int, bool], list[dict[str, Any]]] = {}
        for _ in range(arguments.rounds):
            for size in SIZES:
                found.setdefault((1, False), []).append(measure(d_model, batch_size, 1, data, as_one=False, vary=vary))
                found.setdefault((size, True), []).append(
                    measure(d_model, batch_size, size, data, as_one=True, vary=vary)
                )
        alone = summary(found[1, False], 1, 1)
        for size in SIZES:
            one = summary(found[size, True], size, size)
            gains = {
                name: {
                    "step_min": round(alone[name]["step_ms_min"] / one[name]["step_ms_min"], 2),
                    "step_median": round(alone[name]["step_ms_median"] / one[name]["step_ms_median"], 2),
                    "runs_per_hour": round(one[name]["runs_per_hour"] / alone[name]["runs_per_hour"], 2),
                }
                for name in CLOCKS
            }
            results.append(
                {"d_model": d_model, "batch_size": batch_size, "models": size, "alone": alone, "as_one": one}
                | {"gain": gains}
            )
            print(f"d {d_model:3} batch {batch_size:3} models {size}", *_line(alone, one, gains), sep="  ", flush=True)
    environment = describe_environment(torch.device("cpu"))
    today = datetime.now(UTC)
    hardware = re.sub(r"[^a-z0-9]+", "-", environment["processor"].lower()).strip("-")
    path = HERE / "results" / f"together-{vary}-{today:%Y-%m-%d}-{hardware}-1.json"
    record = {"date": today.isoformat(timespec="seconds"), "environment": environment, "load": os.getloadavg()}
    path.write_text(
        json.dumps(record | {"vary": vary, "rounds": arguments.rounds, "results": results}, indent=1) + "\n"
    )
    print(f"written  {path}")


if __name__ == "__main__":
    main()
