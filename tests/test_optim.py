from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recsys.optim import Constant, Cosine, OptimConfig, Plateau

MONITOR = "validation/macro/ndcg@10"


def rates(schedule, steps: int, total: int) -> list[float]:
    model = nn.Linear(2, 2)
    optimizer, schedulers = OptimConfig(lr=1.0, schedule=schedule).build(model, total, MONITOR)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            if scheduler["interval"] == "step":
                scheduler["scheduler"].step()
    return seen


def test_constant_warms_up_in_equal_steps_and_stays() -> None:
    assert rates(Constant(warmup_steps=3), 6, 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates(Constant(), 3, 3) == [1.0, 1.0, 1.0]


def test_cosine_by_hand() -> None:
    # after two steps of warm-up, four steps of half a cosine from 1 to .2: 1, .8828, .6, .3172, .2
    expected = [1 / 3, 2 / 3, 1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2, 0.2]
    assert rates(Cosine(warmup_steps=2, final_ratio=0.2), 8, 6) == pytest.approx(expected, abs=1e-6)


def test_plateau_cuts_after_patience_and_only_then() -> None:
    model = nn.Linear(2, 2)
    config = OptimConfig(lr=1.0, schedule=Plateau(factor=0.5, patience=1))
    optimizer, [plateau] = config.build(model, 10, MONITOR)
    assert plateau["monitor"] == MONITOR
    seen = []
    for value in (0.1, 0.2, 0.2, 0.15, 0.3):  # 0.2 twice is no improvement, 0.15 neither: then the cut
        plateau["scheduler"].step(value)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_what_decays() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer, _ = OptimConfig(weight_decay=0.5).build(model, 1, MONITOR)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.5 if p.ndim == 2 else 0.0 for p in model.parameters()}
    optimizer, _ = OptimConfig(weight_decay=0.5, decay="all").build(model, 1, MONITOR)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_one_step_of_adamw_by_hand() -> None:
    """p -= lr wd p, then lr times the sign of the gradient in the first step (bias-corrected moments cancel)."""
    weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    model = nn.Module()
    model.register_parameter("weight", weight)
    optimizer, _ = OptimConfig(lr=0.1, weight_decay=0.5).build(model, 1, MONITOR)
    (weight * torch.tensor([[3.0, -4.0]])).sum().backward()
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([[2.0 * 0.95 - 0.1, -0.95 + 0.1]]), atol=1e-6)


@pytest.mark.parametrize("values", [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"lr": float("inf")}, {"lr": 0.0}])
def test_values_that_no_optimizer_takes(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimConfig(**values)
