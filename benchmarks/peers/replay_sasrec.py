"""RePlay's SASRec at RecBole's size (d 64, 2 blocks, 2 heads, softmax over the catalogue), its own module and loop.

`python replay_sasrec.py FOLDER`, where `training.csv` has the training events: user, item, time.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.models.nn.sequential import SasRec
from replay.models.nn.sequential.sasrec import SasRecTrainingDataset
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))
from worker import Turnstile


class Gate(lightning.Callback):
    """Lets one batch through at a time; the time from one to the next covers its making."""

    turnstile: Turnstile

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.turnstile = Turnstile({"parameters": sum(p.numel() for p in module.parameters())})
        self.turnstile.wait()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turnstile.report(int(batch["target_padding_mask"].sum()))
        self.turnstile.wait()


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    events = pd.read_csv(folder / "training.csv")
    events["item"] = events["item"].astype("category").cat.codes
    sequences = events.groupby("user", as_index=False)["item"].agg(list)
    items = TensorFeatureInfo(
        name="item",
        feature_type=FeatureType.CATEGORICAL,
        is_seq=True,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item")],
        cardinality=int(events["item"].max()) + 1,
        padding_value=int(events["item"].max()) + 1,
        embedding_dim=64,
    )
    dataset = PandasSequentialDataset(TensorSchema(items), "user", "item", sequences)
    training = SasRecTrainingDataset(dataset, max_sequence_length=50)
    module = SasRec(
        TensorSchema(items),
        block_count=2,
        head_count=2,
        hidden_size=64,
        max_seq_len=50,
        dropout_rate=0.5,
        loss_type="CE",
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_epochs=1000, accelerator="cpu", enable_checkpointing=False, callbacks=[Gate()], **quiet
    )
    trainer.fit(module, DataLoader(training, batch_size=96, shuffle=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
