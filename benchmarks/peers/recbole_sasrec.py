"""RecBole's SASRec at its defaults (d 64, 2 layers, softmax over the catalogue, 2,048 prefixes a step), its own loop.

`python recbole_sasrec.py FOLDER`, where `training.csv` has the training events: user, item, time.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

sys.path.append(str(Path(__file__).parents[1]))
from worker import Turnstile


class Gated:
    """A loader whose batches pass one by one; all else is the loader's."""

    def __init__(self, loader: Any, turnstile: Turnstile) -> None:
        self.loader, self.turnstile = loader, turnstile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            self.turnstile.wait()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self.turnstile.report(len(batch))


def main(folder: Path) -> None:
    # RecBole holds out the last two events of each user, so two are added that no prefix is trained on.
    events = pd.read_csv(folder / "training.csv")
    held_out = events.groupby("user", as_index=False).last()
    held_out = pd.concat([held_out.assign(time=held_out["time"] + later) for later in (1, 2)])
    atomic = folder / "training"
    atomic.mkdir(exist_ok=True)
    renamed = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    pd.concat([events, held_out]).rename(columns=renamed).to_csv(atomic / "training.inter", sep="\t", index=False)

    values = {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "use_gpu": False,
        "show_progress": False,
        "checkpoint_dir": str(folder),
        "worker": 0,
    }
    sys.argv = sys.argv[:1]
    config = Config(model="SASRec", dataset="training", config_dict=values)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    training, _, _ = data_preparation(config, dataset)
    model = get_model("SASRec")(config, training.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    parameters = sum(p.numel() for p in model.parameters())
    trainer.fit(Gated(training, Turnstile({"parameters": parameters})), saved=False, show_progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
