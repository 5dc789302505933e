"""`make bench`: this package beside its peers, interleaved in one run, at equal model size, batch, negatives and data.

Every contender is a process of its own, peers in their own environments from the registry. They take turns: one piece
of work of the first, one of the second, and so on, so that a slow minute of the machine is everybody's. What counts is
the ratio of work per second; seconds are of this machine at this moment.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from recsys.data.split import TRAIN
from recsys.experiment import Experiment, load_data
from recsys.loading import load_yaml
from recsys.results import write_text
from recsys.training.environment import describe_environment

HERE = Path(__file__).parent
MATMUL = ("ours", "matmul")
RELEASED = "abxi"
"""A clone of the authors' repository in the folder of the peers; it is in no registry, so its cases run where it is."""


@dataclass(frozen=True)
class Case:
    """One line of the table: ours against one other, by units of work per second."""

    name: str
    unit: str
    ours: str
    other: tuple[str, str] | None
    """Environment (`ours` or that of a peer) and contender; None: held against the rate of matrix products."""
    label: str
    goal: str
    rounds: int = 7


CASES = [
    Case("ABXI step", "targets", "abxi", ("ours", "abxi_naive"), "the same equations, padded and gathered", "≥ 12x"),
    Case("ABXI step", "targets", "abxi", (RELEASED, "step"), "the released code", "≥ 12x", 9),
    Case(
        "SASRec softmax, d 256, 2 blocks", "targets", "sasrec_256", ("rectools", "rectools_sasrec"), "RecTools", "≥ 8x"
    ),
    Case("SASRec softmax, d 64, 2 layers", "targets", "sasrec_64", ("recbole", "recbole_sasrec"), "RecBole", "≥ 12x"),
    Case("SASRec softmax, d 64, 2 blocks", "targets", "sasrec_64", ("replay", "replay_sasrec"), "RePlay", ""),
    Case("exact ranking of all test users", "users", "ranking", ("ours", "ranking_naive"), "999 gathered", "≥ 10x", 9),
    Case("exact ranking of all test users", "users", "ranking", (RELEASED, "ranking"), "the released code", "≥ 10x", 9),
    Case("step with full softmax", "share", "roofline_full", None, "matrix products", "≥ 80 %", 11),
    Case("step with shared negatives", "share", "roofline_shared", None, "matrix products", "≥ 65 %", 21),
    Case("step with negatives per position", "share", "roofline_per_position", None, "matrix products", "≥ 45 %", 21),
]


@dataclass
class Contender:
    """A process that works one piece at a time, and what it has answered."""

    process: "subprocess.Popen[str]"
    about: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def work(self, keep: bool) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        answer = self._read()
        if keep:
            self.answers.append(answer)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended; its messages are above")  # type: ignore[union-attr,arg-type]
        return dict(json.loads(line))

    def rates(self) -> list[float]:
        """Units per second of each piece."""
        return [answer["units"] / answer["seconds"] for answer in self.answers]

    def close(self) -> None:
        """Ends a process that waits to be asked; Lightning would take a signal to end for one to be handled later."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(environment: str, name: str, peers: Path, folder: Path, threads: int) -> Contender:
    if environment == "ours":
        command = [sys.executable, str(HERE / "ours.py"), name]
    elif environment == RELEASED:
        command = [sys.executable, str(HERE / "peers" / "released_abxi.py"), str(peers / RELEASED), name]
    else:
        command = [str(peers / environment / "bin" / "python"), str(HERE / "peers" / f"{name}.py"), str(folder)]
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    contender = Contender(subprocess.Popen(command, env=settings, cwd=folder, **pipes))
    contender.about = contender._read()
    return contender


def make_environment(peers: Path, name: str) -> None:
    """A virtual environment with a peer's release, if there is none yet."""
    python = peers / name / "bin" / "python"
    ready = peers / name / ".ready"
    if ready.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", peers / name], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "-r", HERE / "peers" / f"{name}.txt"], check=True)
    ready.touch()


def write_training_events(folder: Path) -> None:
    """The training events of Food–Kitchen for those who read tables: `training.csv` with user, item, time."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = load_yaml(HERE.parent / "configs" / "amazon_afk" / "sasrec.yaml", Experiment)
    data = load_data(experiment.data, None)
    sequences, trained = data.sequences, data.split.role == TRAIN
    lengths = np.diff(sequences.offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    # Ties in time are in the order of our file: the running number of an event is the time that others sort by.
    order = np.arange(len(user)) - np.repeat(sequences.offsets[:-1], lengths)
    frame = pd.DataFrame({"user": user, "item": sequences.items, "time": order})
    frame[trained].to_csv(folder / "training.csv", index=False)


def run_case(case: Case, peers: Path, folder: Path, threads: int, console: Console) -> dict[str, Any]:
    other = case.other or MATMUL
    contenders = [start("ours", case.ours, peers, folder, threads), start(*other, peers, folder, threads)]
    try:
        for turn in range(case.rounds + 2):
            for contender in contenders:
                contender.work(keep=turn >= 2)
            console.print(f"{case.name}: round {turn + 1} of {case.rounds + 2}", highlight=False, end="\r")
    finally:
        for contender in contenders:
            contender.close()
    ours, theirs = contenders
    if case.unit == "share":
        scale = ours.about["flop_per_target"]
        value = {"of_best": max(ours.rates()) * scale / max(theirs.rates())}
        value["of_median"] = median(ours.rates()) * scale / median(theirs.rates())
    else:
        value = {"of_best": max(ours.rates()) / max(theirs.rates())}
        value["of_median"] = median(ours.rates()) / median(theirs.rates())
    return {
        "case": case.name,
        "other": case.label,
        "unit": case.unit,
        "goal": case.goal,
        "ratio": value,
        "ours": {"about": ours.about, "answers": ours.answers},
        "theirs": {"about": theirs.about, "answers": theirs.answers},
        "load": os.getloadavg(),
    }


def table_of(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines that are shown, and stand in the README."""
    rows = []
    for result in results:
        ours, theirs = (
            [answer["units"] / answer["seconds"] for answer in result[who]["answers"]] for who in ("ours", "theirs")
        )
        ratio, share = result["ratio"], result["unit"] == "share"
        unit = "TFLOP/s" if share else f"{result['unit']}/s"
        scale = (result["ours"]["about"]["flop_per_target"] / 1e12, 1e-12) if share else (1, 1)
        form = ".3f" if share else ",.0f"
        rows.append(
            {
                "work": result["case"],
                "against": result["other"],
                "unit": unit,
                "here (best / median)": " / ".join(f"{scale[0] * x:{form}}" for x in (max(ours), median(ours))),
                "there (best / median)": " / ".join(f"{scale[1] * x:{form}}" for x in (max(theirs), median(theirs))),
                "ratio (best / median)": " / ".join(
                    f"{100 * ratio[k]:.0f} %" if share else f"{ratio[k]:.1f}x" for k in ("of_best", "of_median")
                ),
                "goal": result["goal"],
                "peak memory here / there": " / ".join(
                    f"{max(a['peak_mib'] for a in result[who]['answers']) / 1024:.1f} GiB" for who in ("ours", "theirs")
                ),
            }
        )
    return rows


def results_file(prefix: str, environment: dict[str, Any], threads: int) -> Path:
    """Named by day and hardware."""
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{environment['processor']}-{threads}".lower()).strip("-")
    return HERE / "results" / f"{prefix}{datetime.now(UTC):%Y-%m-%d}-{hardware}.json"


def keep(result: dict[str, Any], path: Path) -> None:
    """Adds a case to the file of the day, in the place of an earlier measurement of it."""
    kept = json.loads(path.read_text()) if path.exists() else []
    others = [one for one in kept if (one["case"], one["other"]) != (result["case"], result["other"])]
    write_text(path, json.dumps([*others, result], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORDS", help="only cases with these words; repeatable")
    parser.add_argument("--peers", type=Path, default=Path(".bench"), help="folder of the peers' environments")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every contender")
    parser.add_argument("--rounds", type=int, help="pieces of work per contender; default: as each case has it")
    arguments = parser.parse_args()
    console = Console()
    folder = arguments.peers.resolve() / "data"
    write_training_events(folder)
    cases = [c for c in CASES if not arguments.only or any(words in f"{c.name} {c.label}" for words in arguments.only)]
    environment = describe_environment(torch.device("cpu"))
    about = {"environment": environment, "machine": platform.platform(), "threads": arguments.threads}
    path = results_file("", environment, arguments.threads)
    results = []
    for case in cases:
        if arguments.rounds:
            case = Case(**{**case.__dict__, "rounds": arguments.rounds})
        if case.other is not None and case.other[0] == RELEASED and not (arguments.peers / RELEASED).is_dir():
            console.print(f"{case.name}, {case.label}: left out; clone it to {arguments.peers / RELEASED}")
            continue
        if case.other is not None and case.other[0] not in ("ours", RELEASED):
            make_environment(arguments.peers.resolve(), case.other[0])
        results.append(run_case(case, arguments.peers.resolve(), folder, arguments.threads, console) | about)
        keep(results[-1], path)
    rows = table_of(results)
    if not rows:
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(f"written  {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
