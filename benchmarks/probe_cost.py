"""What probing adds to an evaluation pass: time on the Food–Kitchen configuration, and memory against users.

    RECSYS_DATA=data python benchmarks/probe_cost.py

Passes with and without the probe take turns; what counts is the ratio of their medians in seconds of processor time,
which other work on the machine disturbs less than the clock. Weights are those of the start: the work is the same. The
result goes into benchmarks/results/ with hardware and date.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from recsys.evaluation.targets import EvalBatch
from recsys.experiment import Experiment, build_model, load_data
from recsys.loading import load_yaml
from recsys.probes import Probe, ProbeConfig, watch
from recsys.training.environment import describe_environment
from recsys.training.run import eval_batches, evaluate_model

HERE = Path(__file__).parent


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part, seen)
    elif type(value).__module__.startswith("recsys.probes"):
        yield from tensors(vars(value), seen)


def held(watching: Probe) -> int:
    """Bytes of all that a probe keeps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(watching, set()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs/amazon_afk/cross_domain.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "probe_cost.json")
    options = parser.parse_args()
    experiment = load_yaml(options.config, Experiment)
    data = load_data(experiment.data, None)
    model, device, config = build_model(experiment, data), torch.device("cpu"), ProbeConfig()
    protocols = experiment.eval.model_copy(update={"protocols": ("full",)})

    def evaluation() -> None:
        evaluate_model(model, experiment, data, protocols, "test", device)

    def evaluation_with_probe() -> None:
        with watch(model.eval(), data.catalog.domain_names, config) as watching:
            evaluation()
        watching.table(label="best")

    seconds: dict[str, list[float]] = {"evaluation": [], "evaluation_with_probe": []}
    evaluation()
    for _ in range(options.rounds):
        for work in (evaluation, evaluation_with_probe):
            start = time.process_time()
            work()
            seconds[work.__name__].append(time.process_time() - start)
            print(work.__name__, f"{seconds[work.__name__][-1]:.2f} s", flush=True)

    targets = list(eval_batches(experiment, data, protocols, "test", device))
    memory = []
    for share in (0.1, 0.3, 1.0):
        batches: list[EvalBatch] = targets[: max(1, round(share * len(targets)))]
        with watch(model.eval(), data.catalog.domain_names, config) as watching, torch.no_grad():
            for batch in batches:
                model(batch.batch)
        users = len(torch.cat([batch.batch.user for batch in batches]).unique())
        memory.append({"users": users, "bytes": held(watching)})
    base, probed = (median(values) for values in seconds.values())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": str(options.config.relative_to(HERE.parent)),
        "users": memory[-1]["users"],
        "processor_seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "added": round(probed / base - 1, 4),
        "memory": memory,
        "environment": describe_environment(device),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"probing adds {probed / base - 1:.1%} to an evaluation pass")
    for row in memory:
        print(f"{row['users']:>7,} users: {row['bytes'] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
