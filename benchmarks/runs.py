"""What a user waits for, in whole runs of the command: the first step, the end, a model that is worth something.

    python benchmarks/runs.py start      # seconds from the command to the end of its first step
    python benchmarks/runs.py estimate   # what `recsys estimate` says of a run, and what it then takes
    python benchmarks/runs.py quality    # NDCG@10 of a short run, beside an epoch of the released ABXI

Each adds to benchmarks/results/runs-<date>-<hardware>.json. For the last, a clone of the released code is looked for
in the folder of the peers, as in bench.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import HERE, RELEASED, results_file, start
from rich.console import Console
from rich.table import Table

from recsys.results import write_text
from recsys.training.environment import describe_environment

ROOT = HERE.parent
CONFIGS = ROOT / "configs" / "amazon_afk"
STEPS_OF_AN_EPOCH = 7144 / 256
"""Of the released code: its users over its batch."""

FIRST_STEP = """
import json, os, runpy, sys, time
from recsys.training.module import SequentialModule

step = SequentialModule.optimizer_step

def first(self, *arguments, **options):
    step(self, *arguments, **options)
    print(json.dumps(time.time()), file=sys.stderr, flush=True)
    os._exit(0)

SequentialModule.optimizer_step = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script up to the end of its first training step, and says when that was."""

ESTIMATE = """
import sys
from pathlib import Path
from recsys.experiment import Experiment, load_data
from recsys.loading import load_yaml
from recsys.sweeps.estimate import estimate

experiment = load_yaml(Path(sys.argv[1]), Experiment, sys.argv[2:])
print(estimate(experiment, load_data(experiment.data, None)).seconds)
"""

ESTIMATED = {
    "hstu_sampled": [],
    "sasrec": ["trainer.epochs=3"],
    "cross_domain": ["trainer.epochs=3"],
    "gru4rec": ["trainer.epochs=3"],
    "abxi": ["trainer.epochs=3"],
}
"""Runs that are short enough to be seen through, their settings otherwise as committed."""


def run(config: str, overrides: list[str], folder: Path) -> tuple[float, Path]:
    """Seconds of `train.py` from start to end, and the directory that it leaves."""
    options = [part for value in overrides for part in ("--set", value)]
    command = [
        sys.executable,
        ROOT / "train.py",
        "--config",
        CONFIGS / f"{config}.yaml",
        "--runs-dir",
        folder,
        *options,
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    [directory] = folder.iterdir()
    return seconds, directory


def first_step(rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for name in ("cross_domain", "abxi"):
        found[name] = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                script = [ROOT / "train.py", "--config", CONFIGS / f"{name}.yaml", "--runs-dir", folder]
                started = time.time()
                ended = subprocess.run(
                    [sys.executable, "-c", FIRST_STEP, *script], check=True, stderr=subprocess.PIPE, text=True
                )
                found[name].append(json.loads(ended.stderr.splitlines()[-1]) - started)
    return {"seconds_to_first_step": found}


def estimates(rounds: int) -> dict[str, Any]:
    found = []
    for name, overrides in ESTIMATED.items():
        command = [sys.executable, "-c", ESTIMATE, CONFIGS / f"{name}.yaml", *overrides]
        said = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        with tempfile.TemporaryDirectory() as folder:
            _, directory = run(name, overrides, Path(folder))
            took = json.loads((directory / "env.json").read_text())["seconds"]
        found.append({"config": name, "overrides": overrides, "estimate": said, "seconds": took, "ratio": said / took})
        print(f"{name}: {said:.0f} s said, {took:.0f} s taken", flush=True)
    return {"estimates": found}


def quality(rounds: int, peers: Path) -> dict[str, Any]:
    """Steps of the released code before and after our run, so that a slow quarter of an hour is everybody's."""
    steps: list[float] = []

    def released() -> None:
        if not (peers / RELEASED).is_dir():
            print(f"the released code is left out; clone it to {peers / RELEASED}")
            return
        contender = start(RELEASED, "step", peers, Path(tempfile.gettempdir()), os.cpu_count() or 1)
        try:
            for turn in range(1 + rounds):
                contender.work(keep=turn > 0)
        finally:
            contender.close()
        steps.extend(answer["seconds"] for answer in contender.answers)

    released()
    with tempfile.TemporaryDirectory() as folder:
        seconds, directory = run("hstu_sampled", [], Path(folder))
        metrics = json.loads((directory / "final.json").read_text())["metrics"]
    released()
    ndcg = {domain: metrics[f"test/{domain}/ndcg@10[abxi_999]"]["value"] for domain in ("food", "kitchen")}
    found: dict[str, Any] = {"config": "hstu_sampled", "seconds": seconds, "ndcg@10[abxi_999]": ndcg}
    if steps:
        epoch = median(steps) * STEPS_OF_AN_EPOCH
        found |= {"released_steps": steps, "released_epoch": epoch, "share_of_it": seconds / epoch}
    return {"quality": found}


def table_of(kept: dict[str, Any]) -> list[dict[str, str]]:
    """The lines that are shown, and stand in the README."""
    rows = []
    for name, seconds in kept.get("seconds_to_first_step", {"found": {}})["found"].items():
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}, n = {len(seconds)}"
        rows.append(("from the command to the end of its first step", name, f"{median(seconds):.1f} s ({spread})"))
    for one in kept.get("estimates", {"found": []})["found"]:
        setting = ", ".join([one["config"], *one["overrides"]])
        told = f"{one['estimate']:.0f} s said, {one['seconds']:.0f} s taken"
        rows.append(("what `recsys estimate` says of a run", setting, told))
    if "quality" in kept:
        found = kept["quality"]["found"]
        ndcg = " and ".join(f"{value:.3f}" for value in found["ndcg@10[abxi_999]"].values())
        told = f"{found['seconds']:.0f} s, NDCG@10 {ndcg} under abxi_999"
        if "share_of_it" in found:
            told += f"; {found['share_of_it']:.2f} of an epoch of the released ABXI ({found['released_epoch']:.0f} s)"
        rows.append(("a short run, from the command to its test numbers", found["config"], told))
    return [dict(zip(("what", "config", "found"), row, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "estimate", "quality"], nargs="+")
    parser.add_argument("--peers", type=Path, default=Path(".bench"), help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    environment = describe_environment(torch.device("cpu"))
    path = results_file("runs-", environment, os.cpu_count() or 1)
    kept = json.loads(path.read_text()) if path.exists() else {}
    for what in arguments.what:
        if what == "start":
            found = first_step(arguments.rounds)
        elif what == "estimate":
            found = estimates(arguments.rounds)
        else:
            found = quality(arguments.rounds, arguments.peers.resolve())
        kept |= {key: {"found": value, "environment": environment} for key, value in found.items()}
        write_text(path, json.dumps(kept, indent=1) + "\n")
    rows = table_of(kept)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    console.print(f"written  {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
