"""What happens beside the steps: the progress bar and the log of epochs."""

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from recsys.results import write_text
from recsys.training.throughput import Throughput


class EpochLog(pl.Callback):
    """One JSON record per epoch in `metrics.jsonl`: epoch, step, learning rate, mean loss, validation metrics, speed.

    `seconds` are those of the whole epoch with its validation, the rest of the speed that of training alone. A resumed
    run drops the records that are later than its checkpoint, so no epoch stands there twice.
    """

    def __init__(self, path: Path, throughput: Throughput) -> None:
        """`throughput` is told of an epoch's end before this callback."""
        self.path = path
        self.throughput = throughput
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a line cut short by a crash
                    continue
                if record["step"] <= trainer.global_step:
                    kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - self._started, 3),
            **self.throughput.values,
        }
        validated = _validated(trainer)
        record |= {
            key: float(value)
            for key, value in sorted(trainer.callback_metrics.items())
            if validated or not key.startswith("validation/")  # Lightning keeps those of an earlier epoch
        }
        with self.path.open("a") as log:
            log.write(json.dumps(record) + "\n")


class EpochProgress(pl.Callback):
    """A bar over the steps of an epoch, and a line per epoch that stays; a star marks the best so far."""

    def __init__(self, console: Console, monitor: str, throughput: Throughput) -> None:
        """`throughput` is told of an epoch's end before this callback."""
        self.console = console
        self.monitor = monitor
        self.throughput = throughput
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._best = float("-inf")
        self._loss: _OnItsWay | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("", loss="")
        self._progress.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if self._progress is not None and self._task is not None:
            description = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._progress.reset(self._task, description=description, total=trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None or self._task is None:
            return
        if batch_idx % 20 == 0:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self._loss = _OnItsWay(loss) if isinstance(loss, Tensor) else None
        if self._loss is not None and self._loss.arrived:
            self._progress.update(self._task, loss=f"loss {self._loss.value:.4f}")
            self._loss = None
        self._progress.advance(self._task)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  loss {float(metrics['train/loss']):8.4f}"
        if _validated(trainer):
            value = float(metrics[self.monitor])
            better = value > self._best
            self._best = max(self._best, value)
            line += f"  {self.monitor} {value:.4f}{' *' if better else '  '}"
        line += f"  {time.perf_counter() - self._started:6.1f} s"
        line += f"  {self.throughput.values['tokens_per_second']:,.0f} tokens/s"
        self.console.print(line, highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _OnItsWay:
    """A number that a device sends while the steps go on; nobody waits for it."""

    def __init__(self, number: Tensor) -> None:
        self._copy = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._copy.copy_(number.detach(), non_blocking=True)
        self._sent = None
        if number.is_cuda:
            self._sent = torch.cuda.Event()
            self._sent.record()

    @property
    def arrived(self) -> bool:
        return self._sent is None or bool(self._sent.query())

    @property
    def value(self) -> float:
        return float(self._copy)


def _validated(trainer: pl.Trainer) -> bool:
    """Whether the epoch that ends had a validation."""
    return (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
