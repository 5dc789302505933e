"""Runs whose loss is weighed against a model's own term: what they log, that they resume, and what they refuse."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from recsys.balance import Pareto
from recsys.experiment import Experiment, load_data
from recsys.loading import parse_config
from recsys.results import RunDirectory, RunError
from recsys.training.module import SequentialModule
from recsys.training.run import open_run, train

SOURCE = {"name": "synthetic", "num_users": 60, "items_per_domain": 80, "mean_events": 14, "max_events": 30}
SIZE = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": SOURCE, "max_len": 15},
    "model": {"name": "autocdsr", **SIZE},
    "loss": {"name": "softmax"},
    "balance": {"name": "pareto", "sectors": 2},
    "optim": {"lr": 1e-2},
    "trainer": {"epochs": 3, "batch_size": 16, "device": "cpu"},
    "eval": {"bootstrap_samples": 20},
}

SPEED = ("seconds", "tokens_per_second", "sequences_per_second", "mfu", "peak_mib")
"""What a record says of its time; the rest is the same however often a run was cut off."""


def run_it(runs_dir: Path, retry: bool = False, **changes: Any) -> RunDirectory:
    config = parse_config(TINY | changes, Experiment, "test")
    return train(config, load_data(config.data, None), runs_dir, Console(file=io.StringIO()), retry=retry)


@pytest.mark.parametrize("name", ["autocdsr", "c2dsr"])
def test_a_run_that_goes_on_ends_as_if_nothing_had_happened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": name, **SIZE}
    whole = run_it(tmp_path / "whole", model=model)
    for record in whole.read_log():
        assert record["train/weight_loss"] > 0
        assert "train/weight_terms" in record
    with monkeypatch.context() as patch:
        original = SequentialModule.training_step

        def training_step(self: SequentialModule, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 2:
                raise OSError("power cut")
            return original(self, batch, batch_idx)

        patch.setattr(SequentialModule, "training_step", training_step)
        with pytest.raises(OSError, match="power cut"):
            run_it(tmp_path / "cut", model=model)
    resumed = run_it(tmp_path / "cut", retry=True, model=model)

    def metrics(run: RunDirectory) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in SPEED} for record in run.read_log()]

    assert metrics(resumed) == metrics(whole)
    weights = [open_run(run.path, None)[3].state_dict() for run in (whole, resumed)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_the_term_is_smaller_than_without(tmp_path: Path) -> None:
    """A solver without preference gives the attention as strong a pull as the loss."""
    plain = run_it(tmp_path, balance=None)
    balanced = run_it(tmp_path, balance={"name": "pareto"})
    assert "train/weight_loss" not in plain.read_log()[-1]
    ends = [run.read_log()[-1]["train/cross_attention"] for run in (plain, balanced)]
    assert ends[1] < ends[0]


def test_item_tables_have_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[torch.Size]] = []

    def weights(_: Pareto, loss: torch.Tensor, terms: torch.Tensor, parameters: Any) -> tuple[float, float]:
        asked.append({parameter.shape for parameter in parameters})
        return 1.0, 1.0

    monkeypatch.setattr(Pareto, "weights", weights)
    run_it(tmp_path, model={"name": "c2dsr", **SIZE}, trainer=TINY["trainer"] | {"epochs": 1})
    assert torch.Size([161, 8]) not in asked[0]
    assert {torch.Size([8, 8]), torch.Size([15, 8]), torch.Size([8])} <= asked[0]


def test_a_model_without_terms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no term beside the loss to weigh"):
        run_it(tmp_path, model={"name": "sasrec", **SIZE})


def test_a_model_that_counts_is_refused() -> None:
    with pytest.raises(ValidationError, match="balance: the model 'markov' counts"):
        Experiment.model_validate_json(
            '{"name": "x", "data": {"source": {"name": "synthetic"}}, "model": {"name": "markov"},'
            ' "balance": {"name": "pareto"}}'
        )
