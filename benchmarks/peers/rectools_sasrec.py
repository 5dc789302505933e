"""RecTools' SASRec at the size of its defaults (d 256, 2 blocks, 4 heads, softmax, 128 users a step), its own loop.

`python rectools_sasrec.py FOLDER`, where `training.csv` has the training events: user, item, time.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

sys.path.append(str(Path(__file__).parents[1]))
from worker import Turnstile


class Gate(Callback):
    """Lets one batch through at a time; the time from one to the next covers its making."""

    turnstile: Turnstile

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.turnstile = Turnstile({"parameters": sum(p.numel() for p in module.parameters())})
        self.turnstile.wait()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turnstile.report(int((batch["y"] != 0).sum()))
        self.turnstile.wait()


def make_trainer() -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(max_epochs=1000, accelerator="cpu", enable_checkpointing=False, callbacks=[Gate()], **quiet)


def main(folder: Path) -> None:
    events = pd.read_csv(folder / "training.csv")
    events.columns = [Columns.User, Columns.Item, Columns.Datetime]
    events[Columns.Datetime] = pd.to_datetime(events[Columns.Datetime], unit="s")
    events[Columns.Weight] = 1.0
    model = SASRecModel(
        n_blocks=2,
        n_heads=4,
        n_factors=256,
        session_max_len=50,
        loss="softmax",
        batch_size=128,
        get_trainer_func=make_trainer,
    )
    model.fit(Dataset.construct(events))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
