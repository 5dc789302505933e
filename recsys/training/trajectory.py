"""The probe of a run: before the first step, on the way, and at the checkpoint that validation picks."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytorch_lightning as pl
from torch import nn

from recsys.evaluation.targets import EvalBatch
from recsys.experiment import TrajectoryConfig
from recsys.probes import PROBES_SCHEMA, ProbeConfig, probe
from recsys.results import atomic

INITIAL, TRAINING, BEST = "initial", "training", "best"
"""Labels of the rows: before the first step, on the way, and at the checkpoint that validation picks."""


class Trajectory(pl.Callback):
    """Measures the exchange as training goes on and writes `probes.parquet` anew, whole, after each measurement.

    The model is put into evaluation mode for it, where nothing is drawn; chance levels draw from a generator of their
    own. A resumed run drops what was measured later than its checkpoint, as the log of epochs does.
    """

    def __init__(
        self,
        config: TrajectoryConfig,
        path: Path,
        batches: Iterable[EvalBatch],
        domain_names: Sequence[str],
        measures: ProbeConfig | None = None,
    ) -> None:
        self.config = config
        self.path = path
        self.batches = batches
        self.domain_names = domain_names
        self.measures = measures or ProbeConfig()
        self.table = PROBES_SCHEMA.empty_table()

    def begin(self, model: nn.Module, again: bool = False) -> None:
        """Take up what an earlier session has measured, and measure `model`, which is as it starts, where that is
        missing (or, `again`, in any case).
        """
        if self.path.exists():
            known = pq.read_table(self.path, schema=PROBES_SCHEMA)
            dropped = [INITIAL, BEST] if again else [BEST]
            self.table = known.filter(pc.invert(pc.is_in(known["label"], pa.array(dropped))))
        if INITIAL not in pc.unique(self.table["label"]).to_pylist():
            self.measure(model, INITIAL, 0, 0)

    def measure(self, model: nn.Module, label: str, step: int, epoch: int) -> None:
        was_training = model.training
        model.eval()
        try:
            rows = probe(
                model,
                self.batches,
                self.domain_names,
                self.measures,
                label=label,
                step=step,
                epoch=epoch,
                initial=None if label == INITIAL else self.table.filter(pc.equal(self.table["label"], INITIAL)),
            )
        finally:
            model.train(was_training)
        parts = [rows, self.table] if label == INITIAL else [self.table, rows]
        self.table = pa.concat_tables(parts)
        with atomic(self.path) as path:
            pq.write_table(self.table, path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.table = self.table.filter(pc.less_equal(self.table["step"], trainer.global_step))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.config.steps:
            self.measure(self._model(pl_module), TRAINING, trainer.global_step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.config.every is not None and epoch % self.config.every == 0:
            self.measure(self._model(pl_module), TRAINING, trainer.global_step, epoch)

    @staticmethod
    def _model(module: pl.LightningModule) -> nn.Module:
        model = module.model
        assert isinstance(model, nn.Module)
        return model
