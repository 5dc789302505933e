"""Runs that are trained as one: each leaves what it would have left by itself, whatever becomes of the others."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from recsys.experiment import Experiment, load_data
from recsys.loading import parse_config
from recsys.results import RunDirectory, RunError
from recsys.training import together
from recsys.training.checkpoint import read_checkpoint
from recsys.training.module import SequentialModule
from recsys.training.run import select, train
from recsys.training.together import Member, train_together

SOURCE = {"name": "synthetic", "num_users": 60, "items_per_domain": 80, "mean_events": 12, "max_events": 24}
SIZE = {"d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.2}
SAMPLED = {"loss": {"name": "sampled_softmax"}, "negatives": {"name": "uniform", "num_negatives": 8}}
MODELS: dict[str, dict[str, Any]] = {
    "exchange": {"model": {"name": "cross_domain", **SIZE, "cross": {"num_heads": 2, "dropout": 0.1}}, **SAMPLED},
    "sasrec": {"model": {"name": "sasrec", **SIZE, "target_query": "domain"}, "loss": {"name": "softmax"}},
    "hstu": {"model": {"name": "hstu", "d_model": 8, "num_layers": 1, "num_heads": 2}, **SAMPLED},
    "shuffled": {
        "model": {"name": "cross_domain", **SIZE, "cross": {"num_heads": 2, "context": "shuffled"}},
        **SAMPLED,
    },
    "autocdsr": {"model": {"name": "autocdsr", **SIZE}, **SAMPLED},
    "gru4rec": {"model": {"name": "gru4rec", "d_model": 8}, **SAMPLED},
}
RATES = (1e-3, 1e-2, 3e-3)
NOISE = 1e-5
"""Relative, of losses over a few epochs: products of stacked matrices add up in another order."""


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def experiment(model: str, rate: float) -> Experiment:
    values = {
        "name": "tiny",
        "data": {"source": SOURCE, "max_len": 12},
        "optim": {"lr": rate, "schedule": {"name": "plateau", "warmup_steps": 3, "patience": 0}},
        "trainer": {"epochs": 3, "batch_size": 16, "device": "cpu"},
        "eval": {"bootstrap_samples": 20},
    }
    return parse_config(values | MODELS[model], Experiment, "test")


def directories(model: str, folder: Path, rates: Sequence[float] = RATES) -> list[RunDirectory]:
    configs = [experiment(model, rate) for rate in rates]
    data = load_data(configs[0].data, None).fingerprint
    return [RunDirectory.of(folder, config.name, config.yaml(), data) for config in configs]


def run(model: str, rate: float, folder: Path, losses: Losses, *members: Member) -> RunDirectory:
    config = experiment(model, rate)
    data = load_data(config.data, None)
    return train(config, data, folder, Console(quiet=True), callbacks=[*members, losses])


def as_one(model: str, folder: Path, rates: Sequence[float] = RATES) -> tuple[list[RunDirectory], list[Losses]]:
    losses = [Losses() for _ in rates]
    pairs = zip(rates, losses, strict=True)
    return train_together([partial(run, model, rate, folder, own) for rate, own in pairs]), losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], tuple[RunDirectory, Losses]]:
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def made(model: str, rate: float) -> tuple[RunDirectory, Losses]:
        losses = Losses()
        return run(model, rate, folder, losses), losses

    return made


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models were stacked, step by step."""
    found: list[int] = []
    step = together._stacked_step

    def counted(members: Any, batch: Any) -> None:
        found.append(len(members))
        step(members, batch)

    monkeypatch.setattr(together, "_stacked_step", counted)
    return found


def same(one: RunDirectory, other: RunDirectory) -> None:
    """What two runs left is the same to fp32 noise, but for times."""
    assert {path.name for path in one.path.iterdir()} == {path.name for path in other.path.iterdir()}
    assert one.config.read_text() == other.config.read_text()
    logs = one.read_log(), other.read_log()
    assert len(logs[0]) == len(logs[1])
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if key in ("epoch", "step", "lr") or "/" in key:
                assert first[key] == pytest.approx(second[key], rel=NOISE), key
    finals = one.read_final(), other.read_final()
    assert finals[0]["selection"]["epoch"] == finals[1]["selection"]["epoch"]
    assert finals[0]["metrics"].keys() == finals[1]["metrics"].keys()
    for key, interval in finals[0]["metrics"].items():
        assert interval["value"] == pytest.approx(finals[1]["metrics"][key]["value"], rel=1e-3), key
    lr = one.read_log()[0]["lr"]
    for name in ("best", "last"):
        contents = [read_checkpoint(getattr(made, name)) for made in (one, other)]
        assert contents[0].keys() == contents[1].keys()
        for key in ("epoch", "global_step", "config"):
            assert contents[0][key] == contents[1][key]
        weights, others = (content["state_dict"] for content in contents)
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            if not key.endswith("key_value.bias"):  # that of keys moves no attention: Adam makes steps of its noise
                torch.testing.assert_close(others[key], value, rtol=0, atol=lr * 1e-2, msg=key)
        lengths = [getattr(made, name).stat().st_size for made in (one, other)]
        assert lengths[0] == pytest.approx(lengths[1], rel=0.05), "the stack must not get into a checkpoint"


@pytest.mark.parametrize("model", ["exchange", "sasrec"])
def test_each_leaves_what_it_leaves_by_itself(model: str, alone: Any, tmp_path: Path, sizes: list[int]) -> None:
    apart = [alone(model, rate) for rate in RATES]
    assert not sizes
    for (one, expected), other, losses in zip(apart, *as_one(model, tmp_path), strict=True):
        assert losses.values == pytest.approx(expected.values, rel=NOISE)
        same(one, other)
    assert sizes == [3] * len(apart[0][1].values)
    assert apart[0][1].values != apart[1][1].values


def test_a_run_that_diverges_fails_alone(alone: Any, tmp_path: Path, sizes: list[int]) -> None:
    rates = (1e-3, 1e30, 1e-2)
    with pytest.raises(Exception, match=r"diverged|is nan|is inf"):
        as_one("exchange", tmp_path, rates)
    good, bad, other = directories("exchange", tmp_path, rates)
    assert [made.state for made in (good, bad, other)] == ["done", "failed", "done"]
    assert "Traceback" in bad.failed.read_text()
    assert set(sizes) == {3, 2}
    same(alone("exchange", 1e-3)[0], good)
    same(alone("exchange", 1e-2)[0], other)


class Killed(BaseException):
    """What ends a run and leaves no trace, like a kill."""


def test_what_was_cut_off_goes_on_where_each_was(
    alone: Any, tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SequentialModule.training_step
    ends = dict(zip(RATES, (2, 0, 1), strict=True))

    def training_step(self: SequentialModule, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == ends[self.optim.lr] and batch_idx == 1:
            raise Killed
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SequentialModule, "training_step", training_step)
        as_one("exchange", tmp_path)
    cut = directories("exchange", tmp_path)
    assert [made.state for made in cut] == ["partial", "new", "partial"]
    sizes.clear()
    runs, _ = as_one("exchange", tmp_path)
    steps = runs[0].read_log()[0]["step"]
    assert sizes == [2] * steps + [3] * steps, "who is behind goes first, by itself where nobody is with it"
    for rate, other in zip(RATES, runs, strict=True):
        same(alone("exchange", rate)[0], other)


def test_a_model_that_does_not_stack_is_trained_by_itself(
    alone: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, losses = as_one("gru4rec", tmp_path, RATES[:2])
    assert "2 runs go on one after another: " in capsys.readouterr().err
    for rate, made, own in zip(RATES, runs, losses, strict=False):
        one, expected = alone("gru4rec", rate)
        assert own.values == expected.values
        assert one.final.read_bytes() == made.final.read_bytes()


def test_an_interrupt_leaves_runs_that_are_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("sasrec", RATES[0])
    data = load_data(config.data, None)

    def interrupt(members: Any, batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 20
        while not members[0].group.stopped and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(together, "_stacked_step", interrupt)

    def begin(member: Member) -> float:
        return select(config, data, tmp_path / str(member.index), Console(quiet=True), callbacks=[member])

    with pytest.raises(KeyboardInterrupt):
        train_together([begin, begin])
    assert [RunDirectory(path).state for path in sorted(tmp_path.glob("*/*"))] == ["new"] * 2


SEEDS = (0, 1, 2)


def of_seed(model: str, seed: int, folder: Path, losses: Losses, widths: int | None, *members: Member) -> RunDirectory:
    plain = experiment(model, RATES[0])
    config = plain.model_copy(
        update={"seed": seed, "trainer": plain.trainer.model_copy(update={"widths": widths})}, deep=True
    )
    return train(config, load_data(config.data, None), folder, Console(quiet=True), callbacks=[*members, losses])


@pytest.mark.parametrize(
    ("model", "widths", "together"),
    [
        ("exchange", 1, "all"),
        ("sasrec", 1, "all"),
        ("hstu", 1, "all"),
        ("shuffled", 1, "all"),
        ("sasrec", None, "not all"),
    ],
)
def test_seeds_of_one_shape(model: str, widths: int | None, together: str, tmp_path: Path, sizes: list[int]) -> None:
    """Each sees batches, coins and negatives of its own."""
    expected = [Losses() for _ in SEEDS]
    pairs = zip(SEEDS, expected, strict=True)
    apart = [of_seed(model, seed, tmp_path / "apart", losses, widths) for seed, losses in pairs]
    assert not sizes
    found = [Losses() for _ in SEEDS]
    runs = train_together(
        [
            partial(of_seed, model, seed, tmp_path / "together", losses, widths)
            for seed, losses in zip(SEEDS, found, strict=True)
        ]
    )
    for one, other, losses, own in zip(apart, runs, found, expected, strict=True):
        assert losses.values == pytest.approx(own.values, rel=NOISE)
        same(one, other)
    steps = len(expected[0].values)
    assert sizes == [3] * steps if together == "all" else len(sizes) < steps
    assert len({losses.values[0] for losses in expected}) == len(SEEDS)


def test_seeds_of_a_model_with_an_objective_of_its_own_are_trained_by_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_shape", lambda batch: None)
    expected, found = ([Losses() for _ in SEEDS[:2]] for _ in range(2))
    for seed, losses in zip(SEEDS, expected, strict=False):
        of_seed("autocdsr", seed, tmp_path / "apart", losses, None)
    train_together(
        [
            partial(of_seed, "autocdsr", seed, tmp_path / "together", losses, None)
            for seed, losses in zip(SEEDS, found, strict=False)
        ]
    )
    assert "2 runs go on one after another: AutoCDSR" in capsys.readouterr().err
    assert [losses.values for losses in found] == [losses.values for losses in expected]


def test_widths_are_refused_where_padding_would_count(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trainer.widths: AutoCDSR"):
        of_seed("autocdsr", 0, tmp_path, Losses(), 1)
