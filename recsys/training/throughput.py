"""How fast a run trains, beside what its device could do, and how much memory that takes."""

import resource
import sys
import time

import pytorch_lightning as pl
import torch

from recsys.data.batches import TrainBatches
from recsys.experiment import Experiment, TrainerConfig
from recsys.losses import SoftmaxConfig
from recsys.negatives import InBatchConfig
from recsys.scaling.count import count_flops
from recsys.types import Catalog

_PEAKS: dict[str, dict[str, float]] = {
    "NVIDIA A10": {"bf16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "NVIDIA A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "NVIDIA H100": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "NVIDIA H100 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "NVIDIA H200": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "NVIDIA H200 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "NVIDIA L4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "NVIDIA L40S": {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
}
"""FLOP/s of dense matrix products by device, from NVIDIA's data sheets (their figures with sparsity halved)."""


def device_peak(name: str, arithmetic: str) -> float | None:
    """FLOP/s of a GPU by its name (its longest known beginning, up to a word's end); None for one that is unknown."""
    known = [key for key in _PEAKS if name == key or name.startswith((f"{key} ", f"{key}-"))]
    return _PEAKS[max(known, key=len)][arithmetic] if known else None


def peak_rate(trainer: TrainerConfig, device: torch.device) -> float | None:
    """FLOP/s that the matrix products of a run could reach: of a GPU by the data sheet in the arithmetic that the run
    asks for, of a CPU the fp32 rate measured here and now, with the threads that the run has.
    """
    if device.type == "cuda":
        arithmetic = "bf16" if trainer.precision == "bf16-mixed" else "tf32" if trainer.tf32 else "fp32"
        return device_peak(torch.cuda.get_device_name(device), arithmetic)
    return matmul_rate(torch.device("cpu"), torch.float32, 1024)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the best of a few products of square matrices. Nothing is drawn."""
    a, b = (torch.full((size, size), value, device=device, dtype=dtype) for value in (0.5, 0.25))
    out = torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def flops_per_token(experiment: Experiment, catalog: Catalog, batches: TrainBatches) -> float:
    """Operations of a training step for each valid token, counted on one batch of middling length.

    The logits are in it: of all items that the loss compares with a target, or of those it draws. Padding up to the
    longest history is in it too, padding to one of few shapes is not.
    """
    [batch] = batches.sample(1)
    batch = batch.map(lambda tensor: tensor.cpu())
    rows, width = batch.mask.any(1), int(batch.mask.sum(1).max())
    batch = batch.map(lambda tensor: tensor[rows][:, -width:] if tensor.ndim == 2 else tensor[rows])
    flops = count_flops(experiment.model, catalog, batch, candidates_of(experiment, catalog, int(batch.mask.sum())))
    return (flops.step + flops.logits_step) / max(int(batch.mask.sum()), 1)


def candidates_of(experiment: Experiment, catalog: Catalog, targets: int) -> int | None:
    """Items that are scored for each of a batch's targets; None: its whole domain."""
    if isinstance(experiment.loss, SoftmaxConfig):
        return catalog.num_items if experiment.loss.catalogue == "all" else None
    negatives = experiment.negatives
    assert negatives is not None
    if isinstance(negatives, InBatchConfig):
        return targets
    return 1 + negatives.num_negatives * (catalog.num_domains if negatives.scope == "each_domain" else 1)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU since its count was reset, or that this process ever had in memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput(pl.Callback):
    """Speed of every epoch's training, its validation left out; the device is waited for once an epoch."""

    def __init__(self, batches: TrainBatches, flops_per_token: float, peak: float | None, device: torch.device) -> None:
        """`peak`: FLOP/s that the device could do, None where that is unknown."""
        self.batches = batches
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.device = device
        self.values: dict[str, float | None] = {}
        """Of the last epoch: valid tokens and training rows a second, share of the device's rate (model FLOPs
        utilisation, logits included), MiB."""
        self._started: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        """The epoch's steps are done; a second call tells nothing new."""
        if self._started is None:
            return
        _wait(self.device)
        seconds, self._started = time.perf_counter() - self._started, None
        tokens = self.batches.num_targets / seconds
        self.values = {
            "tokens_per_second": round(tokens, 1),
            "sequences_per_second": round(self.batches.num_rows / seconds, 2),
            "mfu": None if self.peak is None else round(tokens * self.flops_per_token / self.peak, 5),
            "peak_mib": round(peak_memory(self.device) / 2**20, 1),
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
