"""The compiled pass: the same numbers, few graphs, and nothing of it in what a run leaves behind."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiled_passes
import pytest
import torch
from compiled_passes import MODELS, experiment
from rich.console import Console

from recsys.experiment import build_model, load_data
from recsys.loading import ConfigError
from recsys.results import RunError
from recsys.training.objective import compile_pass
from recsys.training.run import train, train_batches


def measured(*cases: str) -> dict[str, Any]:
    command = [sys.executable, compiled_passes.__file__, *cases]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "cases", [("sasrec", "abxi_dropout"), pytest.param(("cross_domain", "abxi", "hstu"), marks=pytest.mark.slow)]
)
def test_a_second_epoch_makes_no_graph(cases: tuple[str, ...]) -> None:
    for name, found in measured(*cases).items():
        assert found["graphs"] == found["shapes"]
        assert 1 < found["graphs"][0] == found["graphs"][1] <= 4
        if not MODELS[name]["dropout"]:
            assert found["difference"] < 1e-5


@pytest.mark.slow
def test_a_run_is_that_of_the_model_as_it_is() -> None:
    found = measured("runs")["runs"]
    for plain, compiled in zip(*found["logs"], strict=True):
        assert compiled["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-3)
        assert compiled["validation/macro/ndcg@10"] == pytest.approx(plain["validation/macro/ndcg@10"], rel=0.1)
    plain, compiled = found["weights"]
    assert plain.keys() == compiled.keys()
    assert compiled == pytest.approx(plain, rel=1e-2, abs=1e-3)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="alignment_penalty reads inside"):
        experiment("default", model=MODELS["cross_domain"], alignment_penalty=0.1)
    config = experiment("default", model={"name": "bert4rec", "d_model": 8, "num_heads": 1})
    data = load_data(config.data, None)
    with pytest.raises(RunError, match="BERT4Rec has an objective of its own"):
        compile_pass(build_model(config, data), "default")

    class Waits(torch.nn.Module):
        def forward(self, batch: Any) -> torch.Tensor:
            return torch.zeros(2 if batch.mask.any() else 1)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **options: real(model, backend="eager", **options))
    run = compile_pass(Waits(), "default")
    assert run is not None
    with pytest.raises(RunError, match="Waits does not fit into one graph"):
        run(next(iter(train_batches(config, data, torch.device("cpu"), seed=0))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_records_the_pass(tmp_path: Path) -> None:
    losses = []
    for mode in ("reduce-overhead", "default", None):
        config = experiment(mode, device="cuda")
        run = train(config, load_data(config.data, None), tmp_path, Console(file=io.StringIO()))
        losses.append(run.read_log()[-1]["train/loss"])
    assert losses == pytest.approx(losses[-1:] * 3, rel=1e-3)
