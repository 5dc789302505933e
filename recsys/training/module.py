"""The one LightningModule: it composes a model, a loss, a sampler and an optimizer, and knows none of them."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from recsys.balance import Pareto
from recsys.data.batches import TrainBatches
from recsys.evaluation import DotScorer, EvalBatch, rank_full
from recsys.evaluation.ranks import Seen
from recsys.evaluation.running import RankingMetrics
from recsys.optim import OptimConfig
from recsys.results import RunError
from recsys.training.objective import StepObjective
from recsys.types import Batch, Catalog, NegativeSampler, Recommender


class SequentialModule(pl.LightningModule):
    """Trains `model` on next items, and ranks the validation targets among all items of their domain.

    Batches are gathered on the training device and stay there. Whatever is drawn in training (dropout, negatives)
    starts each epoch from a seed made of the run's seed and the epoch: validation cannot disturb it, and a resumed
    run draws what an undisturbed one would. The sampler's state is in the checkpoint all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        negatives: NegativeSampler | None,
        optim: OptimConfig,
        metrics: RankingMetrics,
        catalog: Catalog,
        seen: Seen,
        monitor: str,
        seed: int,
        config: str,
        balance: Pareto | None = None,
        alignment_penalty: float | None = None,
        compiled: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """`config` goes into every checkpoint, to tell which experiment it belongs to. `balance`, `alignment_penalty`
        and `compiled` are those of `StepObjective`; validation and checkpoints know the model alone.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.negatives = negatives
        self.optim = optim
        self.metrics = metrics
        self.catalog = catalog
        self.seen: Seen = seen
        self.monitor = monitor
        self.seed = seed
        self.config = config
        self.generator = torch.Generator(catalog.item_domain.device)
        self.objective = StepObjective(model, loss, negatives, self.generator, balance, alignment_penalty, compiled)
        self._sums: dict[str, Tensor | float] = {}
        self._rows = 0

    @property
    def recommender(self) -> Recommender:
        return cast("Recommender", self.model)

    def configure_optimizers(self) -> Any:
        optimizer, schedulers = self.optim.build(self.model, int(self.trainer.estimated_stepping_batches), self.monitor)
        return [optimizer], schedulers

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def on_train_epoch_start(self) -> None:
        cast("TrainBatches", self.trainer.train_dataloader).set_epoch(self.current_epoch)
        seed = epoch_seed(self.seed, self.current_epoch)
        torch.manual_seed(seed)
        self.generator.manual_seed(seed)
        if self.negatives is not None:
            self.negatives.generator.manual_seed(seed)
        self._sums, self._rows = {}, 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.objective(batch)
        rows = len(batch.user)
        for name, value in step.values.items():
            plain = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + plain * rows
        self._rows += rows
        if self.trainer.is_last_batch:  # once an epoch: Lightning's own mean costs 1 to 2 ms a step
            means = {f"train/{name}": total / self._rows for name, total in self._sums.items()}
            self.log_dict(means, on_step=False, on_epoch=True, batch_size=rows)
        return step.loss

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        ranks, cross_entropy = rank_full(DotScorer(self.recommender), batch, self.catalog, self.seen)
        self.metrics.update(ranks, cross_entropy, batch.batch.target_domains[:, -1])

    def on_validation_epoch_end(self) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        require_metric(self.monitor, values)
        self.log_dict({key: value.float() for key, value in values.items()})
        for scheduler in self._plateaus():
            scheduler.step(float(values[self.monitor]))

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["train/loss"])
        if not np.isfinite(loss):
            raise RunError(
                f"the training loss of epoch {self.current_epoch + 1} is {loss}; "
                "try a lower optim.lr, a trainer.gradient_clip, or trainer.precision=32-true"
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps all but plateaus: those step where their metric is made, so that the epoch's checkpoint knows of it."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm. Lightning's own refuses a fused optimizer under mixed precision, for fp16's sake only."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
        if self.negatives is not None:
            checkpoint["negatives"] = self.negatives.generator.get_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.negatives is not None:
            self.negatives.generator.set_state(checkpoint["negatives"].cpu())

    def _plateaus(self) -> list[ReduceLROnPlateau]:
        configs = self.trainer.lr_scheduler_configs
        return [config.scheduler for config in configs if isinstance(config.scheduler, ReduceLROnPlateau)]


def require_metric(monitor: str, values: Mapping[str, Tensor]) -> None:
    """Raises RunError where validation had nothing to measure the metric on that picks the checkpoint."""
    if monitor not in values:
        raise RunError(f"trainer.monitor: validation gave no {monitor}: it has no target with a history there")


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch of one run; close seeds and epochs give unrelated ones."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
