"""Losses of a pinned seed: a refactor leaves them alone, and a change of numbers updates `tests/golden/` and says so.

To update: `python tests/training/test_golden.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.data.batches import TrainBatches
from recsys.experiment import Experiment, build_model, load_data
from recsys.loading import parse_config
from recsys.training.objective import StepObjective

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 6
SOURCE = {"name": "synthetic", "num_users": 64, "items_per_domain": 60, "mean_events": 14, "max_events": 30}
SIZE = {"d_model": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
UNIFORM = {"name": "uniform", "num_negatives": 5}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec", **SIZE},
    "sasrec_domain_query": {"name": "sasrec", **SIZE, "target_query": "domain", "norm_first": False},
    "cross_domain_null": {"name": "cross_domain", **SIZE},
    "cross_domain_early": {"name": "cross_domain", **SIZE, "cross": {"placement": "early"}},
    "cross_domain_stack": {"name": "cross_domain", **SIZE, "cross": {"placement": "stack", "gate": "tanh"}},
}
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "softmax": ({"name": "softmax"}, None),
    "sampled_softmax": ({"name": "sampled_softmax"}, {**UNIFORM, "shared": True}),
    "bce": ({"name": "bce"}, {**UNIFORM, "num_negatives": 1}),
    "gbce": ({"name": "gbce"}, UNIFORM),
    "infonce": ({"name": "infonce"}, {**UNIFORM, "scope": "each_domain"}),
}
CASES = [(model, "softmax") for model in MODELS] + [
    ("cross_domain_early", loss) for loss in LOSSES if loss != "softmax"
]


def losses(model: str, loss: str) -> list[float]:
    """The loss before each of the first steps."""
    config, negatives = LOSSES[loss]
    values = {
        "name": "golden",
        "data": {"source": SOURCE},
        "model": MODELS[model],
        "loss": config,
        "negatives": negatives,
        "optim": {"lr": 1e-2},
    }
    experiment = parse_config(values, Experiment, "golden")
    data = load_data(experiment.data, None)
    module = build_model(experiment, data)
    assert experiment.loss is not None
    criterion = experiment.loss.build(data.catalog)
    sampler = None
    if experiment.negatives is not None:
        sampler = experiment.negatives.build(data.catalog, torch.Generator().manual_seed(0))
    objective = StepObjective(module, criterion, sampler, torch.Generator())
    optimizer, _ = experiment.optim.build(module, STEPS, "")
    batches = TrainBatches(data.sequences, data.split, max_len=20, batch_size=8, seed=0, device="cpu")
    torch.manual_seed(0)
    found = []
    for batch, _ in zip(batches, range(STEPS), strict=False):
        value = objective(batch).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize(("model", "loss"), CASES)
def test_losses_are_what_they_were(model: str, loss: str) -> None:
    golden = json.loads(GOLDEN.read_text())[f"{model}/{loss}"]
    assert losses(model, loss) == pytest.approx(golden, rel=1e-4)
    assert golden[-1] != golden[0]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({f"{m}/{loss}": losses(m, loss) for m, loss in CASES}, indent=1) + "\n")
