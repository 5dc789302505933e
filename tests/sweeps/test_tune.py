"""The search: what it tries, what it leaves on record, that it goes on, and that it never looks at a test target."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from recsys.cli import app
from recsys.data.batches import EvalBatches
from recsys.evaluation import summarize
from recsys.experiment import Data, Experiment, load_data
from recsys.loading import ConfigError, dump_yaml, load_yaml, parse_config
from recsys.results import RunDirectory, RunError
from recsys.sweeps import tune as tuning
from recsys.sweeps.tune import Dimension, Trial, best, load_space, trials_frame, tune, with_values
from recsys.training.run import evaluate_model, open_run, select, train

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 80, "mean_events": 12, "max_events": 24},
        "max_len": 12,
    },
    "model": {"name": "sasrec", "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1},
    "loss": {"name": "softmax"},
    "optim": {"lr": 1e-2},
    "trainer": {"epochs": 1, "batch_size": 32, "device": "cpu"},
    "eval": {"bootstrap_samples": 20},
}
SPACE = """
optim.lr: {low: 1e-3, high: 1e-1, log: true}
model.d_ff: {low: 4, high: 12}
model.norm_first: {choices: [true, false]}
"""


def experiment(**changes: Any) -> Experiment:
    return parse_config(TINY | changes, Experiment, "test")


def space_of(text: str, path: Path, config: Experiment | None = None) -> dict[str, Dimension]:
    file = path / "space.yaml"
    file.write_text(text)
    return load_space(file, config or experiment())


def search(directory: Path, text: str = SPACE, config: Experiment | None = None, **options: Any) -> list[Trial]:
    pytest.importorskip("optuna", reason="needs the extra `tune`")
    config = config or experiment()
    directory.mkdir(exist_ok=True)
    settings = {"trials": 3, "sampler": "random", "seed": 0} | options
    return tune(
        config,
        space_of(text, directory, config),
        directory / "search",
        **settings,
        data_root=None,
        console=Console(file=io.StringIO()),
    )


def outcome(trials: list[Trial]) -> list[tuple[Any, ...]]:
    """All but the time."""
    return [(trial.number, trial.values, trial.value, trial.error, trial.run) for trial in trials]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trial]]:
    place = tmp_path_factory.mktemp("done")
    return place / "search", search(place)


def test_every_trial_is_a_run_without_a_test(done: tuple[Path, list[Trial]]) -> None:
    directory, trials = done
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert len({json.dumps(trial.values) for trial in trials}) == 3
    for trial in trials:
        assert 1e-3 <= trial.values["optim.lr"] <= 1e-1
        assert trial.values["model.d_ff"] in range(4, 13)
        assert isinstance(trial.values["model.norm_first"], bool)
        run = RunDirectory.open(directory / "runs" / trial.run)
        assert {path.name for path in run.path.iterdir()} == {"config.yaml", "metrics.jsonl", "best.ckpt", "last.ckpt"}
        assert load_yaml(run.config, Experiment) == with_values(experiment(), trial.values)
        assert trial.value == run.read_log()[-1]["validation/macro/ndcg@10"]
        assert trial.error is None
        assert trial.seconds > 0


def test_the_record(done: tuple[Path, list[Trial]]) -> None:
    directory, trials = done
    record = json.loads((directory / "trials.json").read_text())
    assert (record["name"], record["metric"], record["failed"]) == ("tiny", "validation/macro/ndcg@10", 0)
    assert [entry["value"] for entry in record["trials"]] == [trial.value for trial in trials]
    assert record["best"] == best(trials).number + 1
    assert record["space"]["model.d_ff"]["high"] == 12
    frame = trials_frame(trials, "ndcg")
    assert frame["ndcg"].tolist() == sorted((f"{trial.value:.4f}" for trial in trials), reverse=True)
    assert frame["run"].iloc[0] == best(trials).run


def test_the_best_is_a_whole_experiment_and_train_only_adds_its_test(
    done: tuple[Path, list[Trial]], tmp_path: Path
) -> None:
    directory, trials = done
    chosen = load_yaml(directory / "best.yaml", Experiment)
    assert chosen == with_values(experiment(), best(trials).values)
    data = load_data(chosen.data, None)
    runs = shutil.copytree(directory / "runs", tmp_path / "runs")  # other tests look at what the search has left
    log = RunDirectory(runs / best(trials).run).log.read_bytes()
    run = train(chosen, data, runs, Console(quiet=True))
    assert run.path.name == best(trials).run
    assert run.read_final()["selection"]["value"] == best(trials).value
    assert run.log.read_bytes() == log, "nothing was trained again"
    whole = train(chosen, data, tmp_path / "whole", Console(quiet=True))
    assert whole.final.read_bytes() == run.final.read_bytes()
    value = select(chosen, data, tmp_path / "whole", Console(quiet=True))
    assert value == best(trials).value, "a finished run tells its value"


@pytest.mark.parametrize("model", [{"name": "sasrec", "d_model": 8, "d_ff": 8, "num_heads": 1}, {"name": "item_knn"}])
def test_no_test_target_is_looked_at(model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []

    class Watched(EvalBatches):
        def __init__(self, sequences: Any, split: Any, stage: Any, **options: Any) -> None:
            stages.append(stage)
            super().__init__(sequences, split, stage, **options)

    monkeypatch.setattr("recsys.training.run.EvalBatches", Watched)
    counts = model["name"] == "item_knn"
    config = experiment(model=model, loss=None if counts else TINY["loss"])
    text = "model.neighbors: {low: 5, high: 50}" if counts else SPACE
    trials = search(tmp_path, text, config, trials=2)
    assert all(trial.value is not None for trial in trials)
    assert set(stages) == {"validation"}
    for name in ("final.json", "ranks.parquet", "DONE"):
        assert not list((tmp_path / "search").rglob(name))


def test_a_model_that_counts_is_judged_by_the_same_metric(tmp_path: Path) -> None:
    config = experiment(model={"name": "item_knn"}, loss=None)
    data = load_data(config.data, None)
    value = select(config, data, tmp_path, Console(quiet=True))
    run = train(config, data, tmp_path, Console(quiet=True))
    _, _, data, model = open_run(run.path, None)
    found = evaluate_model(model, config, data, config.eval, "validation", torch.device("cpu"))
    assert value == pytest.approx(summarize(found.ranks, config.eval)["validation/macro/ndcg@10"].value)
    other = experiment(model={"name": "item_knn"}, loss=None, trainer={"monitor": "validation/macro/ndgc@10"})
    with pytest.raises(ConfigError, match="did you mean validation/macro/ndcg@10"):
        select(other, data, tmp_path, Console(quiet=True))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_goes_on_tries_what_an_undisturbed_one_would(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the values decide the number, so that many trials are quick and TPE leaves its random start."""

    def number(config: Experiment, *_: Any) -> float:
        return -abs(config.optim.lr - 0.03)

    monkeypatch.setattr(tuning, "select", number)
    whole = search(tmp_path / "whole", trials=14, sampler=sampler)
    search(tmp_path / "cut", trials=3, sampler=sampler)
    calls = []

    def interrupted(config: Experiment, *_: Any) -> float:
        calls.append(config)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return number(config)

    monkeypatch.setattr(tuning, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", trials=14, sampler=sampler)
    assert len(json.loads((tmp_path / "cut" / "search" / "trials.json").read_text())["trials"]) == 11
    assert outcome(search(tmp_path / "cut", trials=14, sampler=sampler)) == outcome(whole)
    assert outcome(search(tmp_path / "cut", trials=5, sampler=sampler)) == outcome(whole), "nothing more is run"
    other = search(tmp_path / "other", trials=3, sampler=sampler, seed=1)
    assert outcome(other) != outcome(whole[:3])


def test_a_failure_is_on_record_and_no_number(tmp_path: Path) -> None:
    text = """
        model.num_heads: {choices: [1, 3]}
        optim.lr: {choices: [1e-2, 1e20]}
        trainer.gradient_clip: {choices: [null]}
    """
    trials = search(tmp_path, text, trials=8)
    by_values = {(trial.values["model.num_heads"], trial.values["optim.lr"]): trial for trial in trials}
    assert len(by_values) == 4, "all kinds are among them"
    assert by_values[1, 1e-2].value is not None
    assert "num_heads = 3 does not divide" in by_values[3, 1e-2].error
    assert by_values[3, 1e-2].run == ""
    diverged = by_values[1, 1e20]
    assert diverged.value is None
    assert diverged.error
    run = RunDirectory(tmp_path / "search" / "runs" / diverged.run)
    assert run.state == "failed"
    record = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert record["failed"] == sum(trial.value is None for trial in trials) > 2
    assert best(trials) == next(trial for trial in trials if trial.value is not None)
    frame = trials_frame(trials, "ndcg")
    assert frame["ndcg"].tolist()[-record["failed"] :] == ["failed"] * record["failed"]
    with pytest.raises(RunError, match="failed earlier"):
        chosen = with_values(experiment(), diverged.values)
        select(chosen, load_data(chosen.data, None), tmp_path / "search" / "runs", Console(quiet=True))


def test_a_value_that_is_no_number_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "select", lambda *_: float("nan"))
    trials = search(tmp_path)
    assert [trial.value for trial in trials] == [None] * 3
    assert trials[0].error == "validation/macro/ndcg@10 is nan"
    assert not (tmp_path / "search" / "best.yaml").exists()
    with pytest.raises(RunError, match="none of 3 trials gave a number; the first failed with validation"):
        best(trials)


def test_another_search_does_not_mix_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "select", lambda *_: 0.5)
    search(tmp_path)
    with pytest.raises(RunError, match="another space; go on with the same, or give another --output"):
        search(tmp_path, "optim.lr: {low: 1e-3, high: 1e-2}")
    with pytest.raises(RunError, match="another seed"):
        search(tmp_path, seed=1)
    with pytest.raises(RunError, match="another experiment"):
        search(tmp_path, config=experiment(seed=3))
    with RunDirectory(tmp_path / "search").held(), pytest.raises(RunError, match="another process"):
        search(tmp_path)


def test_tpe_learns_from_the_trials_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten at random, the same whatever comes of them; then not."""
    tried = []
    for sign in (1, -1):
        monkeypatch.setattr(tuning, "select", lambda config, *_, sign=sign: sign * config.optim.lr)
        trials = search(tmp_path / f"{sign}", trials=12, sampler="tpe")
        tried.append([trial.values for trial in trials])
    assert tried[0][:10] == tried[1][:10]
    assert tried[0][10:] != tried[1][10:]


def test_a_trial_has_the_data_of_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def width(config: Experiment, data: Data, *_: Any) -> float:
        assert data.text is not None
        assert config.data.text is not None
        seen.append((config.data.text.d_text, data.text.vectors.shape[1]))
        return 0.1

    monkeypatch.setattr(tuning, "select", width)
    config = experiment(data=TINY["data"] | {"text": {"name": "tfidf", "d_text": 2}})
    search(tmp_path, "data.text.d_text: {choices: [2, 4]}", config, trials=6)
    assert set(seen) == {(2, 2), (4, 4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr: {low: 1, high: 2}", "the experiment has no key optim.lrr; did you mean optim.lr?"),
        ("modl.dropout: {low: 0, high: 1}", "did you mean model?"),
        ("model.dropout.x: {choices: [1]}", "no key model.dropout.x; here are: none"),
        ("negatives.num_negatives: {choices: [1]}", "no key negatives.num_negatives"),
        ("seed: {choices: [1, 2]}", "seed is not searched"),
        ("trainer.monitor: {choices: [a]}", "trainer.monitor is not searched"),
        ("data.split.name: {choices: [a]}", "data.split.name is not searched"),
        ("optim.lr: {lo: 1, high: 2}", "optim.lr:\n  lo: unknown key; did you mean low?"),
        ("optim.lr: {low: 1}", "give either choices: [...], or low and high"),
        ("optim.lr: {low: 1, high: 2, choices: [3]}", "give either choices"),
        ("optim.lr: {}", "give either choices"),
        ("optim.lr: {choices: [1], log: true}", "log belongs to low and high"),
        ("optim.lr: {choices: []}", "choices"),
        ("optim.lr: {low: 2, high: 1}", "low = 2 is above high = 1"),
        ("optim.lr: {low: 0, high: 1, log: true}", "with log, low must be above 0"),
        ("optim.lr: 3", "optim.lr: input should be an object"),
        ("{}", "names no key to search"),
    ],
)
def test_what_a_space_refuses(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(text, tmp_path)
    assert message in str(error.value)


def test_kinds_of_dimensions() -> None:
    pytest.importorskip("optuna", reason="needs the extra `tune`")
    whole, real = (Dimension(low=low, high=high).distribution() for low, high in ((1, 4), (1.0, 4)))
    assert (type(whole).__name__, type(real).__name__) == ("IntDistribution", "FloatDistribution")
    assert Dimension(choices=(None, 2, "a", True)).distribution().choices == (None, 2, "a", True)
    assert Dimension(low=1e-3, high=1, log=True).distribution().log


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(SPACE, tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RunError, match=r"pip install 'recsys\[tune\]'"):
        tune(
            experiment(),
            space,
            tmp_path / "search",
            trials=1,
            sampler="random",
            seed=0,
            data_root=None,
            console=Console(quiet=True),
        )
    assert not (tmp_path / "search").exists()


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra `tune`")
    (tmp_path / "tiny.yaml").write_text(dump_yaml(experiment()))
    (tmp_path / "space.yaml").write_text("optim.lr: {choices: [1e-2, 1e-3]}")

    def command(*words: str) -> Any:
        known = ["tune", "-c", str(tmp_path / "tiny.yaml"), "--space", str(tmp_path / "space.yaml")]
        runner = CliRunner(env={"RECSYS_DATA": None, "COLUMNS": "200"})
        return runner.invoke(app, [*known, "-o", str(tmp_path / "out"), *words])

    result = command("-n", "2")
    assert result.exit_code == 0, result.output
    assert "trial 2 of 2: optim.lr=" in result.output
    assert "validation/macro/ndcg@10" in result.output
    assert (
        f"recsys train --config {tmp_path / 'out' / 'best.yaml'} --runs-dir {tmp_path / 'out' / 'runs'}"
        in result.output
    )
    csv = command("-n", "2", "-f", "csv").output.splitlines()
    assert csv[0] == "trial,validation/macro/ndcg@10,optim.lr,seconds,run"
    assert len(csv) == 3
    refused = command("--seed", "4")
    assert refused.exit_code == 2
    assert "another seed" in refused.stderr
