"""What a sweep will cost, and how far it is."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recsys.experiment import load_data
from recsys.scaling.records import RESPONSES
from recsys.sweeps.estimate import estimate
from recsys.sweeps.execute import Desk
from recsys.sweeps.plan import Cell, Plan

_SIGNS = {"done": "✓", "failed": "✗", "partial": "…", "new": "·", "edge": "edge", "untuned": "✗"}


def estimate_frame(plan: Plan, cells: Sequence[Cell], data_root: Path | None) -> tuple[pd.DataFrame, float]:
    """One row per cell as text, and the seconds of all, from a few steps of each; nothing is kept of them.

    A run that stops early takes less. The process then has the sweep's number of threads.
    """
    torch.set_num_threads(plan.config.threads)
    load = cache(lambda config: load_data(config, data_root))
    tuning, seeds = plan.config.tuning, len(plan.config.seeds)
    runs = seeds + (0 if tuning is None else tuning.trials)
    rows, total = [], 0.0
    for cell in cells:
        seconds = estimate(cell.experiment, load(cell.experiment.data), memory=False).seconds
        total += seconds * runs
        study = {"study": cell.study} if cell.study else {}
        rows.append(
            study
            | {
                "size": cell.size,
                "arm": cell.arm,
                "dense": f"{cell.parameters.dense:,}",
                "total": f"{cell.parameters.total:,}",
                "gap": "–" if cell.gap is None else f"{cell.gap:+.2%} {cell.basis}",
                "FLOPs an epoch": f"{cell.flops.step + cell.flops.logits_step:.3g}",
                "of logits": f"{cell.flops.logits_step / (cell.flops.step + cell.flops.logits_step):.0%}",
                "runs": str(runs),
                "a run": _duration(seconds),
                "all": _duration(seconds * runs),
            }
        )
    return pd.DataFrame(rows), total


class Watcher:
    """Shows a sweep as it goes: a table that is drawn anew on a terminal, a line per event elsewhere."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self.console = console
        self.live = live
        self.begun: dict[str, float] = {}

    def __call__(self, desk: Desk, running: list[str]) -> None:
        now = time.monotonic()
        for label in [label for label in self.begun if label not in running]:
            self._say(f"ended   {label}  ({_duration(now - self.begun.pop(label))})")
        for label in [label for label in running if label not in self.begun]:
            self.begun[label] = now
            self._say(f"begins  {label}")
        if self.live is not None:
            self.live.update(progress_table(desk, running), refresh=True)

    def _say(self, line: str) -> None:
        if self.live is None:
            self.console.print(line, highlight=False, markup=False)


def progress_table(desk: Desk, running: Sequence[str] = ()) -> Table:
    """A row per cell: its learning rate, and a sign for each seed, followed by the mean of what is done."""
    table = Table(title=desk.plan.config.name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("size", "arm", "learning rate", "seeds", *RESPONSES):
        table.add_column(name, justify="left" if name in ("size", "arm") else "right", overflow="fold")
    for (study, size, arm), rows in desk.table().groupby(["study", "size", "arm"], sort=False):
        rate, tuned = rows["learning_rate"].iloc[0], rows["tuned"].iloc[0]
        done = rows[rows["state"] == "done"]
        cells = [
            " ".join(part for part in (str(study), str(size)) if part),
            str(arm),
            "tuning" if tuned == "tuning" else "–" if pd.isna(rate) else f"{rate:.3g}",
            " ".join(_SIGNS[state] for state in rows["state"]),
            *("" if done.empty else f"{done[response].astype(float).mean():.4f}" for response in RESPONSES),
        ]
        table.add_row(*map(Text, cells))
    if running:
        table.caption = Text("\n".join(f"now: {label}" for label in running))
        table.caption_justify = "left"
    return table


def watching(console: Console, use: Callable[[Watcher], pd.DataFrame]) -> pd.DataFrame:
    """Gives `use` a watcher that suits the console."""
    if not console.is_terminal:
        return use(Watcher(console, None))
    with Live(console=console, auto_refresh=False) as live:
        return use(Watcher(console, live))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
