"""A whole run on a small synthetic dataset: what it leaves behind, that it repeats, resumes, fails and is refused."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from recsys.experiment import Experiment, load_data
from recsys.loading import ConfigError, dump_yaml, parse_config
from recsys.results import RunDirectory, RunError
from recsys.training.checkpoint import read_checkpoint
from recsys.training.module import epoch_seed
from recsys.training.run import _check_monitor, evaluate_model, open_run, select, train

CPU = torch.device("cpu")
SOURCE = {"name": "synthetic", "num_users": 80, "items_per_domain": 120, "mean_events": 16, "max_events": 40}
SPEED = ("seconds", "tokens_per_second", "sequences_per_second", "mfu", "peak_mib")
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": SOURCE, "max_len": 20},
    "model": {
        "name": "cross_domain",
        "d_model": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 1,
        "cross": {"num_heads": 1},
    },
    "loss": {"name": "sampled_softmax"},
    "negatives": {"name": "uniform", "num_negatives": 8},
    "optim": {"lr": 1e-2, "schedule": {"name": "plateau", "warmup_steps": 3, "patience": 0}},
    "trainer": {"epochs": 4, "batch_size": 16, "device": "cpu"},
    "eval": {"protocols": ["full", "uni_100"], "ks": [5, 10], "bootstrap_samples": 50},
}


def experiment(**changes: Any) -> Experiment:
    return parse_config(TINY | changes, Experiment, "test")


def run_it(config: Experiment, runs_dir: Path, **options: bool) -> RunDirectory:
    return train(config, load_data(config.data, None), runs_dir, Console(file=io.StringIO()), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_it(experiment(), tmp_path_factory.mktemp("runs"))


class Losses(pl.Callback):
    """Every step's loss with the rows of its batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((float(outputs["loss"]), len(batch.user)))


def test_the_logged_loss_is_the_mean_over_rows(tmp_path: Path) -> None:
    config, losses = experiment(trainer={"epochs": 2, "batch_size": 30, "device": "cpu"}), Losses()
    data = load_data(config.data, None)
    run = train(config, data, tmp_path, Console(file=io.StringIO()), callbacks=[losses])
    assert len({rows for _, rows in losses.steps}) > 1, "the last batch is a smaller one"
    half = len(losses.steps) // 2
    for record, steps in zip(run.read_log(), (losses.steps[:half], losses.steps[half:]), strict=True):
        mean = sum(loss * rows for loss, rows in steps) / sum(rows for _, rows in steps)
        assert record["train/loss"] == pytest.approx(mean, rel=1e-6)


def test_what_a_run_leaves_behind(finished: RunDirectory) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        *("config.yaml", "env.json", "metrics.jsonl", "final.json", "ranks.parquet", "curve.png"),
        *("best.ckpt", "last.ckpt", "DONE"),
    }
    final = finished.read_final()
    value = final["metrics"]["test/macro/ndcg@10"]
    assert value["low"] <= value["value"] <= value["high"]
    assert 0 < value["n"] <= 80
    assert "test/domain_1/hr@5[uni_100]" in final["metrics"]
    assert (
        sum(count for group, count in final["parameters"].items() if group != "total") == final["parameters"]["total"]
    )
    log = finished.read_log()
    assert [record["epoch"] for record in log] == list(range(1, len(log) + 1))
    for record in log:
        assert all(record[key] > 0 for key in SPEED)
        assert record["mfu"] < 1
        assert record["tokens_per_second"] > record["sequences_per_second"]
    chosen = max(log, key=lambda record: record["validation/macro/ndcg@10"])
    assert final["selection"]["epoch"] == chosen["epoch"]
    assert final["selection"]["value"] == pytest.approx(chosen["validation/macro/ndcg@10"])
    environment = json.loads(finished.environment.read_text())
    assert environment["packages"]["torch"]
    assert environment["seconds"] >= environment["seconds_to_train"] > 0


def test_the_same_config_gives_the_same_numbers(finished: RunDirectory, tmp_path: Path) -> None:
    again = run_it(experiment(), tmp_path)
    assert again.path.name == finished.path.name
    assert again.final.read_bytes() == finished.final.read_bytes()
    assert pq.read_table(again.ranks).equals(pq.read_table(finished.ranks))


def test_another_seed_gives_another_run(finished: RunDirectory, tmp_path: Path) -> None:
    other = run_it(experiment(seed=1), tmp_path)
    assert other.path.name != finished.path.name
    assert other.read_final()["selection"]["value"] != finished.read_final()["selection"]["value"]


class Crash(Exception):
    pass


def crash_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process goes wrong in the middle of an epoch, with `epochs` behind it."""
    from recsys.training.module import SequentialModule

    step = SequentialModule.training_step

    def training_step(self: SequentialModule, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == epochs and batch_idx == 2:
            raise Crash
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SequentialModule, "training_step", training_step)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_that_goes_on_ends_as_if_nothing_had_happened(
    finished: RunDirectory, tmp_path: Path, epochs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after(epochs, patch)
        run_it(experiment(), tmp_path)
    [cut] = [RunDirectory(path) for path in tmp_path.iterdir()]
    assert cut.state == "failed"
    assert "Crash" in cut.failed.read_text()
    with pytest.raises(RunError, match="--retry"):
        run_it(experiment(), tmp_path)
    resumed = run_it(experiment(), tmp_path, retry=True)
    assert resumed.final.read_bytes() == finished.final.read_bytes()
    weights = [torch.load(run.last, weights_only=True) for run in (resumed, finished)]
    for key, value in weights[1]["state_dict"].items():
        assert torch.equal(weights[0]["state_dict"][key], value), key
    assert weights[0]["lr_schedulers"] == weights[1]["lr_schedulers"]
    logs = [
        [{k: v for k, v in record.items() if k not in SPEED} for record in run.read_log()]
        for run in (resumed, finished)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("patience", [1, None])
def test_a_run_cut_off_after_training_is_not_trained_on(tmp_path: Path, patience: int | None) -> None:
    config = experiment(trainer=TINY["trainer"] | {"epochs": 8, "patience": patience}, optim={"lr": 3e-2})
    whole = run_it(config, tmp_path / "whole")
    assert (whole.read_final()["selection"]["epochs"] < 8) == (patience is not None), "stops early, or does not"

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr("recsys.training.run.evaluate_model", crash)
        run_it(config, tmp_path / "cut")
    resumed = run_it(config, tmp_path / "cut", retry=True)
    assert resumed.final.read_bytes() == whole.final.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_process_goes_on(sent: signal.Signals, code: int, finished: RunDirectory, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_yaml(experiment()))
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "train.py"), "--config", str(config), "--runs-dir", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    assert process.wait() == code
    subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=240)
    [run] = [RunDirectory(path) for path in (tmp_path / "runs").iterdir()]
    assert run.final.read_bytes() == finished.final.read_bytes()


def test_two_processes_cannot_work_on_one_run(finished: RunDirectory) -> None:
    before = finished.final.read_bytes()
    with finished.held():
        with pytest.raises(RunError, match="another process is working on"):
            run_it(experiment(), finished.path.parent, overwrite=True)
        assert finished.final.read_bytes() == before
    with finished.held():  # free again
        pass


def test_a_finished_run_is_not_run_again(finished: RunDirectory) -> None:
    before = finished.final.stat().st_mtime_ns
    run_it(experiment(), finished.path.parent)
    assert finished.final.stat().st_mtime_ns == before


def test_the_numbers_come_back_from_the_checkpoint(finished: RunDirectory) -> None:
    _, config, data, model = open_run(finished.path, None)
    for batch_size in (3, 512):
        evaluation = evaluate_model(
            model, config, data, config.eval.model_copy(update={"batch_size": batch_size}), "test", CPU
        )
        written, column = pq.read_table(finished.ranks), "cross_entropy"
        assert evaluation.ranks.drop_columns(column).equals(written.drop_columns(column))
        # The host packs a stream per domain: its shapes, and with them the last bits of its scores, go with the batch.
        again, before = (table[column].to_numpy() for table in (evaluation.ranks, written))
        assert again == pytest.approx(before, rel=1e-6, nan_ok=True)


def test_a_checkpoint_of_another_config_is_refused(finished: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path)
    for path in finished.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy.config.write_text(finished.config.read_text().replace("d_model: 8", "d_model: 16"))
    with pytest.raises(RunError, match="belongs to another config"):
        open_run(tmp_path, None)
    copy.config.write_bytes(finished.config.read_bytes())
    copy.best.write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match="not a checkpoint that can be read"):
        open_run(tmp_path, None)
    torch.save({"weights": torch.ones(2)}, copy.best)
    with pytest.raises(RunError, match="not a checkpoint of a run"):
        open_run(tmp_path, None)
    copy.best.unlink()
    with pytest.raises(RunError, match="there is no checkpoint"):
        open_run(tmp_path, None)


def test_other_data_are_refused(finished: RunDirectory, tmp_path: Path) -> None:
    for path in finished.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    final = finished.read_final()
    final["data"]["fingerprint"] = "0" * 64
    (tmp_path / "final.json").write_text(json.dumps(final))
    with pytest.raises(RunError, match="made on other data"):
        open_run(tmp_path, None)


def test_a_full_disk_leaves_no_half_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recsys.training.run.pq.write_table", full)
    config = experiment(model={"name": "popularity"}, loss=None, negatives=None)
    with pytest.raises(OSError, match="No space left"):
        run_it(config, tmp_path)
    [run] = [RunDirectory(path) for path in tmp_path.iterdir()]
    assert run.state == "failed"
    assert not run.final.exists()
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "best.ckpt", "FAILED"}


def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third epoch cannot be written; what the second left is whole, and the run goes on from there."""
    save, calls = torch.save, []

    def half(content: Any, file: BinaryIO) -> None:
        calls.append(file)
        if len(calls) < 6:  # best and last of an epoch, while each epoch is the best
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        try:  # as torch does
            try:
                raise OSError(28, "No space left on device")
            finally:
                raise RuntimeError("enforce fail")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match=r"\.ckpt could not be written .*No space left.* earlier one is kept"):
            run_it(experiment(), tmp_path / "full")
    [run] = [RunDirectory(path) for path in (tmp_path / "full").iterdir()]
    assert run.state == "failed"
    assert calls[-1].closed, "its space is free for the traceback"
    assert "No space left" in run.failure()
    assert read_checkpoint(run.best)["config"] == read_checkpoint(run.last)["config"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]
    whole = run_it(experiment(), tmp_path / "whole")
    assert run_it(experiment(), tmp_path / "full", retry=True).final.read_bytes() == whole.final.read_bytes()


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    whole = run_it(experiment(), tmp_path)
    whole.done.unlink()
    whole.last.write_bytes(whole.last.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"last\.ckpt is not a checkpoint that can be read.*--overwrite"):
        run_it(experiment(), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    config = experiment(optim={"lr": 1e20}, trainer=TINY["trainer"] | {"gradient_clip": None})
    with pytest.raises(Exception, match=r"try a lower optim\.lr|diverged"):
        run_it(config, tmp_path)
    [run] = [RunDirectory(path) for path in tmp_path.iterdir()]
    assert run.state == "failed"
    assert not run.final.exists()


@pytest.mark.parametrize("work", [train, select])
@pytest.mark.parametrize(
    ("monitor", "domain", "message"),
    [
        ("validation/macro/ndgc@10", None, r"did you mean validation/macro/ndcg@10\? .*domain_1, domain_2.*mrr, auc"),
        ("validation/macro/ndcg@20", None, r"did you mean validation/macro/ndcg@10\?"),
        ("loss", None, r"no metric 'loss'; \(validation/<one of macro, micro, domain_1.*hr@5, hr@10"),
        ("validation/domain_2/mrr", "domain_1", r"did you mean validation/domain_1/mrr\? .*macro, micro, domain_1>"),
    ],
)
def test_an_unknown_monitor_is_refused_before_the_run(
    work: Callable[..., Any], monitor: str, domain: str | None, message: str, tmp_path: Path
) -> None:
    model = {"name": "sasrec", "d_model": 8, "d_ff": 16, "num_heads": 1}
    config = experiment(
        data=TINY["data"] | {"domain": domain}, model=model, trainer=TINY["trainer"] | {"monitor": monitor}
    )
    with pytest.raises(ConfigError, match=message):
        work(config, load_data(config.data, None), tmp_path, Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_a_monitor_is_any_metric_that_validation_logs(finished: RunDirectory) -> None:
    logged = [key for key in finished.read_log()[0] if key.startswith("validation/")]
    data = load_data(experiment().data, None)
    assert len(logged) == 4 * 7  # macro, micro, two domains
    for monitor in logged:
        _check_monitor(experiment(trainer=TINY["trainer"] | {"monitor": monitor}), data)


def test_models_that_count_are_trained_without_a_monitor(tmp_path: Path) -> None:
    trainer = TINY["trainer"] | {"monitor": "validation/macro/ndcg@20"}
    config = experiment(model={"name": "popularity"}, loss=None, negatives=None, trainer=trainer)
    assert run_it(config, tmp_path).state == "done"


def test_the_times_are_those_of_all_sessions(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after(2, patch)
        run_it(experiment(), tmp_path)
    [run] = [RunDirectory(path) for path in tmp_path.iterdir()]
    run.log.write_text("".join(json.dumps(record | {"seconds": 1000.0}) + "\n" for record in run.read_log()))
    run_it(experiment(), tmp_path, retry=True)
    environment = run.read_environment()
    assert 2000 < environment["seconds_to_train"] <= environment["seconds"] < 3000
    run_it(experiment(), tmp_path, overwrite=True)
    assert run.read_environment()["seconds"] < 1000, "nothing of the run that was forgotten"


def test_the_star_knows_the_best_epoch_before_the_cut(tmp_path: Path) -> None:
    """A learning rate of nothing makes no epoch better than the first."""
    config = experiment(optim={"lr": 1e-30})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after(2, patch)
        run_it(config, tmp_path)
    shown = io.StringIO()
    train(config, load_data(config.data, None), tmp_path, Console(file=shown, width=200), retry=True)
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert not [line for line in lines if "*" in line]


@pytest.mark.parametrize("name", ["popularity", "markov", "item_knn"])
def test_models_that_count(name: str, tmp_path: Path) -> None:
    config = experiment(model={"name": name}, loss=None, negatives=None)
    run = run_it(config, tmp_path)
    assert run.read_final()["selection"] is None
    _, _, data, model = open_run(run.path, None)
    evaluation = evaluate_model(model, config, data, config.eval, "test", CPU)
    assert evaluation.ranks.equals(pq.read_table(run.ranks))


def test_one_domain_alone_keeps_the_split_of_all(finished: RunDirectory, tmp_path: Path) -> None:
    config = experiment(
        data=TINY["data"] | {"domain": "domain_2"},
        model={"name": "sasrec", "d_model": 8, "d_ff": 16, "num_heads": 1},
        trainer=TINY["trainer"] | {"monitor": "validation/domain_2/ndcg@10"},
    )
    run = run_it(config, tmp_path)
    assert run.read_final()["data"]["split"]["hash"] == finished.read_final()["data"]["split"]["hash"]
    assert set(pq.read_table(run.ranks)["domain"].to_pylist()) == {"domain_2"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision(precision: str, tmp_path: Path) -> None:
    config = experiment(trainer=TINY["trainer"] | {"epochs": 1, "precision": precision})
    run = run_it(config, tmp_path)
    weights = torch.load(run.best, weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_validation_does_not_disturb_training(tmp_path: Path) -> None:
    """Twice as many validations, the same weights."""
    weights = []
    for every in (1, 2):
        trainer = TINY["trainer"] | {"epochs": 2, "validate_every": every, "patience": None}
        run = run_it(experiment(trainer=trainer, optim={"lr": 1e-2}), tmp_path)
        weights.append(torch.load(run.last, weights_only=True)["state_dict"])
        validated = ["validation/macro/ndcg@10" in record for record in run.read_log()]
        assert validated == [epoch % every == 0 for epoch in (1, 2)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_seeds_of_epochs_differ() -> None:
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


def test_tensorboard(tmp_path: Path) -> None:
    config = experiment(trainer=TINY["trainer"] | {"epochs": 1, "tensorboard": True})
    run = run_it(config, tmp_path)
    assert list((run.path / "tensorboard").glob("events.*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_a_gpu(precision: str, tmp_path: Path) -> None:
    trainer = TINY["trainer"] | {"device": "cuda", "precision": precision}
    runs = [run_it(experiment(trainer=trainer), tmp_path / name) for name in ("one", "two")]
    assert runs[0].final.read_bytes() == runs[1].final.read_bytes()


def test_lightning_is_not_a_stolen_one() -> None:
    assert pl.__version__ not in ("2.6.2", "2.6.3")
