"""What a run will cost, before it is started: a few of its steps and batches are done here and counted up."""

import time
from dataclasses import dataclass

from recsys.evaluation import evaluate, summarize
from recsys.experiment import Data, Experiment, build_model
from recsys.sweeps.speed import Speed, measure_speed
from recsys.training.run import choose_device, eval_batches, make_scorer

STEPS = 8
"""Spread over an epoch, as batches of short and of long histories take unlike times."""


@dataclass(frozen=True)
class Estimate:
    steps: int
    """Batches whose steps were timed, each equally often."""
    speed: Speed
    epochs: int
    """At most; with `trainer.patience` training may stop before."""
    seconds_to_evaluate: float
    """The test targets under all protocols of the experiment, with their intervals."""

    @property
    def seconds(self) -> float:
        """Of the whole run, all epochs."""
        return self.epochs * self.speed.seconds_per_epoch + self.seconds_to_evaluate


def estimate(experiment: Experiment, data: Data, memory: bool = True) -> Estimate:
    """Measured on this machine as it is now, with or without the memory of a step; nothing is written."""
    speed = measure_speed(experiment, data, memory=memory, steps=STEPS)
    return Estimate(STEPS, speed, experiment.trainer.epochs, _evaluation(experiment, data))


def _evaluation(experiment: Experiment, data: Data) -> float:
    """Seconds, from the batch in the middle, which is of middling length."""
    device = choose_device(experiment.trainer)
    scorer = make_scorer(build_model(experiment, data).to(device).eval(), experiment)
    catalog = data.catalog.to(device)
    batches = eval_batches(experiment, data, experiment.eval, "test", device)
    middle = list(batches)[len(batches) // 2]
    seconds = []
    for _ in range(2):  # the first pass finds caches and memory as the steps left them
        started = time.perf_counter()
        ranked = evaluate(scorer, [middle], catalog, experiment.eval, split="test", split_hash=data.split.hash)
        summarize(ranked.ranks, experiment.eval)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * len(batches)
