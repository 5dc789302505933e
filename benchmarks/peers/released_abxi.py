"""The released ABXI on Food–Kitchen at its published settings, its own loader and trainer: a training step of 256
users, or the ranking of 1,024 users among 1,000 items.

`python released_abxi.py CODE step|ranking`, where CODE is a clone of the authors' repository with its data.
"""

import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
from worker import serve

PUBLISHED = {
    "data": "afk",
    "raw": True,
    "len_max": 50,
    "n_neg": 128,
    "n_mtc": 999,
    "d_embed": 256,
    "n_attn": 1,
    "n_head": 2,
    "dropout": 0.5,
    "temp": 0.75,
    "rd": 16,
    "ri": 64,
    "bs": 256,
    "n_worker": 0,
    "n_epoch": 500,
    "n_warmup": 10,
    "lr": 1e-4,
    "l2": 3.0,
    "lr_g": 0.3162,
    "lr_p": 30,
    "len_trim": 47,
    "bse": 1024,
}


class Silent:
    """Takes whatever the trainer wants to note."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def make_trainer(code: Path) -> Any:
    os.chdir(code)
    sys.path.insert(0, str(code))
    from trainer import Trainer

    data = code / "data" / "afk"
    files = {"path_data": str(data), "f_raw": str(data / "afk_50_preprocessed.txt"), "f_data": str(data / "seq.pkl")}
    return Trainer(Namespace(**PUBLISHED, **files, device=torch.device("cpu")), Silent())


class Step:
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.trainer.model.train()
        self.batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(trainer.train_loader))

    def __call__(self) -> int:
        batch = next(self.batches)
        self.trainer.optimizer.zero_grad()
        self.trainer.train_batch(batch)
        return int((batch[3] != 0).sum())


class Ranking:
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.trainer.model.eval()
        self.batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(trainer.test_loader))

    def __call__(self) -> int:
        batch = next(self.batches)
        with torch.no_grad():
            self.trainer.evaluate_batch(batch)
        return len(batch[0])


if __name__ == "__main__":
    code, work = Path(sys.argv[1]).resolve(), {"step": Step, "ranking": Ranking}[sys.argv[2]]
    with redirect_stdout(sys.stderr):
        trainer = make_trainer(code)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    serve(work(trainer), {"parameters": parameters, "torch": torch.__version__})
