"""How the cost of training grows: one thing varies, the rest stays. `python benchmarks/growth.py`.

Random events, so that any size can be had; every point is a process of its own, so that its peak memory is its own.
Writes `benchmarks/results/growth-<date>-<hardware>.json` and the figure beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

BASE = {"events": 200_000, "items": 20_000, "d_model": 64, "length": 50, "domains": 2, "loss": "shared"}
"""20,000 items in 2 domains, 50 events a user, 64 users a step, 1,024 shared negatives."""
AXES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "events": ("events", [10_000, 100_000, 1_000_000, 10_000_000], {}),
    "items, shared negatives": ("items", [1_000, 10_000, 100_000, 1_000_000], {}),
    "items, full softmax": ("items", [1_000, 10_000, 100_000, 1_000_000], {"loss": "full"}),
    "width": ("d_model", [32, 64, 128, 256, 512], {}),
    "length": ("length", [25, 50, 100, 200, 400], {}),
    "domains, with exchange": ("domains", [2, 4, 8, 16], {"model": "cross_domain", "cross": {}}),
    "domains, without": ("domains", [2, 4, 8, 16], {"model": "cross_domain", "cross": None}),
}
USERS_PER_STEP = 64
STEPS = 5


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, seconds to make its batch, and peak memory."""
    import numpy as np
    import torch

    from recsys.data.batches import TrainBatches, make_catalog
    from recsys.data.sequences import Sequences
    from recsys.data.split import LeaveOneOut, make_split
    from recsys.experiment import Experiment
    from recsys.loading import parse_config
    from recsys.memory import keep_freed_memory

    keep_freed_memory()
    rng = np.random.default_rng(0)
    users, domains, items = point["events"] // point["length"], point["domains"], point["items"]
    item_domain = np.concatenate([[-1], np.arange(items) % domains])
    drawn = rng.integers(1, items + 1, users * point["length"])
    offsets = np.arange(users + 1) * point["length"]
    names = tuple(f"domain_{k}" for k in range(domains))
    times = np.tile(np.arange(point["length"]), users)
    sequences = Sequences.pack(drawn, item_domain[drawn], times, offsets, names, item_domain, "order")
    split = make_split(sequences, LeaveOneOut())
    catalog = make_catalog(sequences, split)
    full = point["loss"] == "full"
    size = {"d_model": point["d_model"], "d_ff": 4 * point["d_model"], "num_layers": 1, "num_heads": 2}
    values = {
        "name": "growth",
        "data": {"source": {"name": "synthetic"}, "max_len": point["length"]},
        "model": {"name": point.get("model", "sasrec"), **size}
        | ({"cross": point["cross"]} if "cross" in point else {}),
        "loss": {"name": "softmax", "catalogue": "all"} if full else {"name": "sampled_softmax"},
        "negatives": None if full else {"name": "uniform", "num_negatives": 1024, "shared": True},
    }
    experiment = parse_config(values, Experiment, "growth")
    model = experiment.model.build(catalog, point["length"], torch.Generator().manual_seed(0)).train()
    assert experiment.loss is not None
    loss = experiment.loss.build(catalog)
    sampler = experiment.negatives.build(catalog, torch.Generator().manual_seed(0)) if experiment.negatives else None
    optimizer, _ = experiment.optim.build(model, 1000, "")
    batches = TrainBatches(
        sequences,
        split,
        max_len=point["length"],
        batch_size=USERS_PER_STEP,
        seed=0,
        device="cpu",
        domain=None,
        windows="last",
    )
    steps, gathering = [], []
    stream = iter(batches)
    for _ in range(min(STEPS + 1, len(batches))):
        started = time.perf_counter()
        batch = next(stream)
        gathered = time.perf_counter()
        optimizer.zero_grad()
        loss(model(batch), model.item_embeddings(), batch, sampler).backward()
        optimizer.step()
        steps.append(time.perf_counter() - started)
        gathering.append(gathered - started)
    return {
        "seconds_per_step": median(steps[1:]),
        "seconds_per_batch": median(gathering[1:]),
        "seconds_per_epoch": median(steps[1:]) * len(batches),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def draw(results: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Time (of an epoch for events, of a step for the rest) and memory against each axis, in logarithms."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    panels = figure.subplots(2, len(results), sharex="col")
    for column, (name, points) in enumerate(results.items()):
        key = AXES[name][0]
        x = [point["point"][key] for point in points]
        measure_key = "seconds_per_epoch" if key == "events" else "seconds_per_step"
        for row, values in enumerate(([p[measure_key] for p in points], [p["peak_mib"] / 1024 for p in points])):
            axis = panels[row][column]
            axis.loglog(x, values, marker="o", markersize=3.5, color="0.2", linewidth=1)
            slope = np.log(values[-1] / values[-2]) / np.log(x[-1] / x[-2])
            axis.annotate(f"last slope {slope:.2f}", (0.05, 0.9), xycoords="axes fraction", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xticks(x, [f"{value:.0e}".replace("e+0", "e") if value >= 1000 else str(value) for value in x])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            low, high = min(values) / 1.3, max(values) * 1.5
            axis.set_ylim(min(low, 10 ** np.floor(np.log10(low) + 0.3)), max(high, 10 ** np.ceil(np.log10(high) - 0.3)))
            axis.tick_params(labelsize=7, which="both")
        panels[0][column].set_title(name, fontsize=9)
        panels[0][column].set_ylabel("s / epoch" if key == "events" else "s / step", fontsize=8)
        panels[1][column].set_ylabel("peak GiB", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--axis", action="append", choices=AXES, help="only this axis, the others kept; repeatable")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.point)))
        return

    import torch
    from bench import results_file

    from recsys.training.environment import describe_environment

    environment = describe_environment(torch.device("cpu"))
    path = results_file("growth-", environment, torch.get_num_threads())
    results: dict[str, list[dict[str, Any]]] = {}
    if arguments.axis and path.exists():
        kept = json.loads(path.read_text())["results"]
        results = {name: kept[name] for name in AXES if name in kept and name not in arguments.axis}
    for name in arguments.axis or AXES:
        key, values, others = AXES[name]
        for value in values:
            point = BASE | others | {key: value}
            command = [sys.executable, __file__, "--point", json.dumps(point)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} = {value}: {done.stderr[-2000:]}")
            found = {"point": point} | json.loads(done.stdout.splitlines()[-1])
            results.setdefault(name, []).append(found)
            print(f"{name:25} {value:>10,}  {1000 * found['seconds_per_step']:9.1f} ms  {found['peak_mib']:8.0f} MiB")
    results = {name: results[name] for name in AXES if name in results}
    path.write_text(
        json.dumps({"environment": environment, "load": os.getloadavg(), "results": results}, indent=1) + "\n"
    )
    title = f"{environment['processor']}, {torch.get_num_threads()} threads, {datetime.now(UTC):%Y-%m-%d}"
    draw(results, path.with_suffix(".png"), title)
    print(f"written  {path}")


if __name__ == "__main__":
    main()
