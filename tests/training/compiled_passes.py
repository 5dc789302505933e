"""Compiled passes without the checks of types, which do not fit into a graph: `python compiled_passes.py CASE…`.

The backend is one that needs no C++ compiler; the graphs are the same. Prints a line of JSON.
"""

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._dynamo.utils import counters

from recsys.experiment import Experiment, build_model, load_data
from recsys.loading import parse_config
from recsys.training.checkpoint import read_checkpoint
from recsys.training.objective import compile_pass
from recsys.training.run import train, train_batches

SOURCE = {"name": "synthetic", "num_users": 60, "items_per_domain": 60, "mean_events": 20, "max_events": 45}
SIZE = {"d_model": 8, "num_heads": 1, "dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec", **SIZE, "d_ff": 16, "num_layers": 1},
    "cross_domain": {"name": "cross_domain", **SIZE, "d_ff": 16, "num_layers": 1, "cross": {"dropout": 0.0}},
    "hstu": {"name": "hstu", **SIZE},
    "abxi": {"name": "abxi", **SIZE, "d_ff": 12},
    "abxi_dropout": {"name": "abxi", **SIZE, "d_ff": 12, "dropout": 0.3},
}
TRAINER = {"epochs": 2, "batch_size": 8, "length_pool": 4}


def experiment(compile_: str | None, device: str = "cpu", **changes: Any) -> Experiment:
    values = {
        "name": "compiled",
        "data": {"source": SOURCE, "max_len": 40},
        "model": MODELS["sasrec"],
        "loss": {"name": "softmax"},
        "trainer": TRAINER | {"compile": compile_, "device": device},
        "eval": {"bootstrap_samples": 10},
    }
    return parse_config(values | changes, Experiment, "test")


def epochs(model: str) -> dict[str, Any]:
    """Graphs after each of two epochs, and how many shapes of batch those have had."""
    torch._dynamo.reset()
    counters.clear()
    config = experiment("default", model=MODELS[model])
    data = load_data(config.data, None)
    module = build_model(config, data).train()
    run = compile_pass(module, "default")
    assert run is not None
    batches = train_batches(config, data, torch.device("cpu"), seed=0)
    found: dict[str, Any] = {"graphs": [], "shapes": []}
    shapes = set()
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            shapes.add(batch.items.shape)
            hidden = run(batch)
            hidden.sum().backward()
        found["graphs"].append(int(counters["stats"]["unique_graphs"]))
        found["shapes"].append(len(shapes))
    real = batch.mask[..., None]
    found["difference"] = float(((hidden - module(batch)) * real).abs().max().detach())
    return found


def runs() -> dict[str, Any]:
    """A run as it is and one that is compiled: what they log and keep."""
    found: dict[str, Any] = {"logs": [], "weights": []}
    with tempfile.TemporaryDirectory() as folder:
        for mode in (None, "reduce-overhead"):
            config = experiment(mode)
            run = train(config, load_data(config.data, None), Path(folder), Console(file=io.StringIO()))
            found["logs"].append(run.read_log())
            weights = read_checkpoint(run.last)["state_dict"]
            found["weights"].append({name: float(value.norm()) for name, value in weights.items()})
    return found


def main(cases: list[str]) -> None:
    real = torch.compile

    def compile_(model: Any, *, mode: str, fullgraph: bool, dynamic: bool) -> Any:
        assert mode in ("default", "reduce-overhead")
        return real(model, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)

    torch.compile = compile_
    print(json.dumps({case: runs() if case == "runs" else epochs(case) for case in cases}))


if __name__ == "__main__":
    main(sys.argv[1:])
