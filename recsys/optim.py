"""AdamW and its learning-rate schedules."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from recsys.loading import Config

Schedulers = list[dict[str, Any]]
"""Schedulers as Lightning takes them: each with the interval it is stepped at and the metric it watches."""


def _warmup(optimizer: Optimizer, steps: int) -> Schedulers:
    """A linear rise over the first steps, to be chained with other schedulers; nothing where there is none."""
    if steps == 0:
        return []
    return [{"scheduler": LinearLR(optimizer, 1 / (steps + 1), total_iters=steps), "interval": "step"}]


class Constant(Config):
    """The learning rate stays, after a linear warm-up."""

    name: Literal["constant"] = "constant"
    warmup_steps: int = Field(0, ge=0)

    def build(self, optimizer: Optimizer, total_steps: int, monitor: str) -> Schedulers:
        return _warmup(optimizer, self.warmup_steps)


class Cosine(Config):
    """A linear warm-up, then half a cosine down to `final_ratio` of the learning rate at the last step."""

    name: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_ratio: float = Field(0.0, ge=0, le=1)

    def build(self, optimizer: Optimizer, total_steps: int, monitor: str) -> Schedulers:
        def ratio(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

        return [{"scheduler": LambdaLR(optimizer, ratio), "interval": "step"}]


class Plateau(Config):
    """A linear warm-up, then a cut by `factor` after `patience` validations without a better monitored value."""

    name: Literal["plateau"] = "plateau"
    warmup_steps: int = Field(0, ge=0)
    factor: float = Field(0.3162, gt=0, lt=1)
    patience: int = Field(3, ge=0)

    def build(self, optimizer: Optimizer, total_steps: int, monitor: str) -> Schedulers:
        plateau = ReduceLROnPlateau(optimizer, mode="max", factor=self.factor, patience=self.patience, threshold=0.0)
        return [*_warmup(optimizer, self.warmup_steps), {"scheduler": plateau, "interval": "epoch", "monitor": monitor}]


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019)."""

    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: tensors of two or more dimensions (tables and weights), or biases and norms as well."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    schedule: Annotated[Constant | Cosine | Plateau, Field(discriminator="name")] = Constant()

    def build(self, model: nn.Module, total_steps: int, monitor: str) -> tuple[Optimizer, Schedulers]:
        """The optimizer over all trainable parameters, fused, and its schedulers (`monitor` grows when better)."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = [p for p in parameters if self.decay == "all" or p.ndim >= 2]
        spared = [p for p in parameters if self.decay == "matrices" and p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        optimizer = AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )
        return optimizer, self.schedule.build(optimizer, total_steps, monitor)
