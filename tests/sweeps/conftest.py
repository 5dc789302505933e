"""A sweep of seconds."""

from pathlib import Path

import pytest
import yaml

BASE = {
    "name": "tiny",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 80, "mean_events": 12, "max_events": 24},
        "max_len": 12,
    },
    "model": {
        "name": "cross_domain",
        "d_model": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 1,
        "cross": {"num_heads": 1},
    },
    "loss": {"name": "softmax"},
    "optim": {"lr": 1e-2},
    "trainer": {"epochs": 2, "batch_size": 32, "device": "cpu"},
    "eval": {"bootstrap_samples": 20},
}
SWEEP = {
    "name": "tiny",
    "base": "base.yaml",
    "sizes": {"8": {"model.d_model": 8}},
    "arms": {"none": {"set": {"model.cross": None}}, "exchange": {}},
    "seeds": [0, 1],
}


@pytest.fixture(scope="session")
def write_sweep():
    """Writes a sweep file with some keys changed into a folder, and gives its path."""

    def write(folder: Path, **changes) -> Path:
        (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
        return path

    return write
