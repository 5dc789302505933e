"""Speed in figures that can be worked out by hand."""

import io
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from recsys.data.batches import TrainBatches
from recsys.experiment import Experiment, load_data
from recsys.loading import parse_config
from recsys.scaling.count import count_flops
from recsys.training.run import train
from recsys.training.throughput import Throughput, device_peak, flops_per_token, matmul_rate, peak_memory
from recsys.types import PAD_ID

CPU = torch.device("cpu")
SOURCE = {"name": "synthetic", "num_users": 40, "items_per_domain": 30, "mean_events": 12, "max_events": 20}
DRAWN = {"name": "uniform", "num_negatives": 3}
VALUES: dict[str, Any] = {
    "name": "speed",
    "data": {"source": SOURCE, "max_len": 20},
    "model": {"name": "sasrec", "d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 1},
    "loss": {"name": "softmax", "catalogue": "all"},
    "trainer": {"epochs": 2, "batch_size": 16, "device": "cpu", "validate_every": 2},
}


def experiment(**changes: Any) -> Experiment:
    return parse_config(VALUES | changes, Experiment, "test")


@pytest.fixture(scope="module")
def batches() -> TrainBatches:
    data = load_data(experiment().data, None)
    return TrainBatches(data.sequences, data.split, max_len=20, batch_size=16, seed=0, device="cpu")


def test_a_peak_is_that_of_the_longest_name_that_fits() -> None:
    assert device_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert device_peak("NVIDIA H100 80GB HBM3", "tf32") == 494.7e12
    assert device_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert device_peak("NVIDIA A10", "fp32") == 31.2e12
    assert device_peak("NVIDIA A10G", "fp32") is None
    assert device_peak("NVIDIA Something Else", "bf16") is None


def test_an_epoch_counts_its_valid_tokens_and_rows(batches: TrainBatches) -> None:
    found = list(batches)
    assert batches.num_targets == sum(int((batch.targets != PAD_ID).sum()) for batch in found)
    assert batches.num_rows == sum(len(batch.user) for batch in found)


def test_speed_is_work_over_the_time_before_validation(batches: TrainBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0, 99.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    throughput = Throughput(batches, flops_per_token=1000.0, peak=batches.num_targets * 500.0, device=CPU)
    throughput.start()
    throughput.stop()
    throughput.stop()
    assert throughput.values["tokens_per_second"] == pytest.approx(batches.num_targets / 4, abs=0.1)
    assert throughput.values["sequences_per_second"] == pytest.approx(batches.num_rows / 4, abs=0.01)
    assert throughput.values["mfu"] == pytest.approx(1000 / (4 * 500))
    assert throughput.values["peak_mib"] == pytest.approx(peak_memory(CPU) / 2**20, rel=0.5)


def test_without_a_known_peak_there_is_no_share(batches: TrainBatches) -> None:
    throughput = Throughput(batches, flops_per_token=1.0, peak=None, device=CPU)
    throughput.start()
    throughput.stop()
    assert throughput.values["mfu"] is None


@pytest.mark.parametrize(
    ("changes", "candidates"),
    [
        ({}, 60),
        ({"loss": {"name": "bce"}, "negatives": {"name": "uniform", "num_negatives": 3, "scope": "all"}}, 4),
        (
            {"loss": {"name": "infonce"}, "negatives": {"name": "uniform", "num_negatives": 3, "scope": "each_domain"}},
            7,
        ),
    ],
)
def test_operations_of_a_token_are_those_of_a_batch(
    batches: TrainBatches, changes: dict[str, Any], candidates: int
) -> None:
    config = experiment(**changes)
    catalog = load_data(config.data, None).catalog
    [batch] = batches.sample(1)
    tokens = int(batch.mask.sum())
    counted = count_flops(config.model, catalog, batch)
    expected = counted.step / tokens + 3 * 2 * 8 * candidates
    assert flops_per_token(config, catalog, batches) == pytest.approx(expected)


def test_measuring_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert matmul_rate(CPU, torch.float32, 64) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_ends_with_its_speed_in_a_line(tmp_path: Any) -> None:
    config = experiment()
    console = Console(file=io.StringIO(), width=200)
    run = train(config, load_data(config.data, None), tmp_path, console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    for line, record in zip(lines, run.read_log(), strict=True):
        assert line.endswith(f"{record['tokens_per_second']:,.0f} tokens/s")
