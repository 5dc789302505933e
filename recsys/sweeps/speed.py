"""How fast a model trains here and how much memory a step takes, from a few steps on its own data."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from json import loads
from pathlib import Path

import torch

from recsys.evaluation import rank_full
from recsys.experiment import Data, Experiment, build_model
from recsys.memory import keep_freed_memory
from recsys.training.objective import StepObjective, compile_pass
from recsys.training.run import choose_device, eval_batches, make_scorer, matmul_precision, train_batches

_SECONDS = 2.0
"""That a measurement takes at least."""


@dataclass(frozen=True)
class Speed:
    seconds_per_step: float
    """Forward, backward and optimizer, the median of a few steps."""
    examples_per_second: float
    peak_bytes: int | None
    """Most memory that tensors held at once during a step, weights and optimizer included; None where not asked."""
    seconds_per_epoch: float
    """With a validation, as often as the experiment asks for one."""


def measure_speed(experiment: Experiment, data: Data, *, memory: bool, steps: int = 3) -> Speed:
    """Trains a model that is thrown away on `steps` batches spread over an epoch.

    First for some seconds that are not timed, as caches fill and memory grows (where it is compiled, one step for each
    batch), then each batch equally often, for some seconds.
    """
    keep_freed_memory()
    device = choose_device(experiment.trainer)
    config = experiment.trainer
    batches = train_batches(experiment, data, device, seed=0)
    sampled = batches.sample(steps + 1)
    catalog = data.catalog.to(device)
    assert experiment.loss is not None
    loss = experiment.loss.build(catalog).to(device)
    negatives = None
    if experiment.negatives is not None:
        negatives = experiment.negatives.build(catalog, torch.Generator(device).manual_seed(0))
    model = build_model(experiment, data).to(device).train()
    optimizer, _ = experiment.optim.build(model, len(sampled), config.monitor)

    objective = StepObjective(
        model,
        loss,
        negatives,
        torch.Generator(device).manual_seed(0),
        balance=None if experiment.balance is None else experiment.balance.build(),
        alignment_penalty=experiment.alignment_penalty,
        compiled=compile_pass(model, config.compile),
    )

    def step(index: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed")
        with matmul_precision("high" if config.tf32 else "highest"):
            with precision:
                loss = objective(sampled[index % len(sampled)]).loss
            loss.backward()
        optimizer.step()

    started = time.perf_counter()
    for index in range(len(sampled)):
        step(index)
        if config.compile is None and time.perf_counter() - started > _SECONDS:
            break
    times: list[float] = []
    while sum(times) < _SECONDS:
        times += [_seconds(partial(step, index), device) for index in range(1, steps + 1)]
    seconds, mean = sorted(times)[len(times) // 2], sum(times) / len(times)
    rows = sum(int(batch.mask.any(1).sum()) for batch in sampled) / len(sampled)
    return Speed(
        seconds_per_step=seconds,
        examples_per_second=rows / seconds,
        peak_bytes=_peak(lambda: step(0), device) if memory else None,
        seconds_per_epoch=mean * len(batches) + _validation(experiment, data, model, device) / config.validate_every,
    )


def _validation(experiment: Experiment, data: Data, model: torch.nn.Module, device: torch.device) -> float:
    """Seconds, from one of its batches."""
    scorer, catalog = make_scorer(model.eval(), experiment), data.catalog.to(device)
    batches = eval_batches(experiment, data, experiment.eval, "validation", device)
    middle = list(batches)[len(batches) // 2]
    once = [_seconds(lambda: rank_full(scorer, middle, catalog, experiment.eval.seen), device) for _ in range(3)]
    return min(once) * len(batches)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """On a CPU from the profiler's record of what was allocated and freed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device))
    with (
        _no_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = loads(trace.read_text())["traceEvents"]
    return max(int(event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler announces itself there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
