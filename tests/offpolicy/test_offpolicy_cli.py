"""The commands as a person types them, on synthetic data and on files of the Open Bandit form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from recsys.cli import app
from recsys.experiment import Experiment
from recsys.loading import dump_yaml, parse_config

DATA: dict[str, Any] = {
    "source": {"name": "synthetic", "num_users": 80, "items_per_domain": 60, "mean_events": 14, "max_events": 30}
}
POPULAR: dict[str, Any] = {"name": "popular", "data": DATA, "model": {"name": "popularity"}}
SASREC: dict[str, Any] = {
    "name": "sasrec",
    "data": DATA,
    "model": {"name": "sasrec", "d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 1},
    "loss": {"name": "softmax"},
    "trainer": {"epochs": 1, "batch_size": 16, "device": "cpu"},
}


def command(*words: object) -> Result:
    return CliRunner(env={"RECSYS_DATA": None, "COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = command(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*words: object) -> str:
    result = command(*words)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stderr.startswith("error: ")
    return result.stderr


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))  # which is YAML
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, and a log that one of them made."""
    place = tmp_path_factory.mktemp("offpolicy")
    for values in (POPULAR, SASREC):
        path = place / f"{values['name']}.yaml"
        values = values | {"eval": {"bootstrap_samples": 20, "permutations": 100}}
        path.write_text(dump_yaml(parse_config(values, Experiment, "test")))
        done("train", "-c", path, "--runs-dir", place / "runs")
    log = {
        "data": DATA,
        "logging": {
            "scores": {"name": "run", "path": str(place / "runs" / "popular-*")},
            "policy": {"name": "plackett_luce", "temperature": 2.0, "epsilon": 0.3},
        },
        "simulator": {"dimensions": 8},
        "requests": 1500,
        "slots": 2,
        "offer": 8,
    }
    write(place / "log.yaml", log)
    assert "the policy earns" in done("offpolicy", "log", "-c", place / "log.yaml", "-o", place / "log.parquet")
    study = {
        "log": {"name": "parquet", "path": str(place / "log.parquet")},
        "candidates": [
            {"scores": {"name": "run", "path": str(place / "runs" / "*")}, "policy": {"name": "plackett_luce"}},
            {"scores": {"name": "uniform"}},
        ],
        "evaluate": {"estimators": [{"name": "cascade_dr"}, {"name": "rips"}], "reward_model": {"name": "item_means"}},
    }
    write(place / "study.yaml", study)
    return place


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    done("offpolicy", "evaluate", "-c", place / "study.yaml", "-o", place / "out", "--by", "domain_1")
    return json.loads((place / "out" / "report.json").read_text())


def test_evaluate_writes_estimates_beside_the_truth(place: Path, report: dict[str, Any]) -> None:
    names = [candidate["candidate"].split("-")[0] for candidate in report["candidates"]]
    assert names == ["popular", "sasrec", "uniform"]
    for candidate in report["candidates"]:
        first = candidate["estimates"][0]
        assert first["interval"]["low"] < candidate["truth"]["value"] < first["interval"]["high"]
        assert first["diagnostics"]["support_known"]
        assert sum(candidate["weights"]) == 1500
    assert report["environment"]["date"]
    assert report["log"]["made_by"]["offer"] == 8
    table = pd.read_csv(place / "out" / "estimates.csv")
    assert set(table["estimator"]) == {"cascade_dr", "rips"}
    for figure in ("cascade_dr", "rips", "weights"):
        assert (place / "out" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_select_ranks_and_says_how_well_estimators_choose(place: Path, report: dict[str, Any]) -> None:
    words = ("offpolicy", "select", place / "out" / "report.json", "-k", 1, "-k", 2, "-f", "csv")
    lines = done(*words, "--figure", place / "risk.png").splitlines()
    assert lines[0] == "rank,candidate,value,low,high,against_logging,verdict,truth"
    best = max(report["candidates"], key=lambda candidate: candidate["estimates"][0]["value"])
    assert lines[1].split(",")[:2] == ["1", best["candidate"]]
    start = lines.index("estimator,k,regret,sharpe_ratio,cvar,violation,spearman,refused")
    assert [line.split(",")[:2] for line in lines[start + 1 : start + 3]] == [["cascade_dr", "1"], ["cascade_dr", "2"]]
    assert (place / "risk.png").exists()
    assert "it has cascade_dr, rips" in refused(*words, "-e", "dr")
    assert "no report of" in refused("offpolicy", "select", place / "study.yaml")


def test_the_same_log_twice(place: Path) -> None:
    done("offpolicy", "log", "-c", place / "log.yaml", "-o", place / "again.parquet")
    assert (place / "again.parquet").read_bytes() == (place / "log.parquet").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-s", "slotz=3"], "slotz: unknown key; did you mean slots?"),
        (["-s", "slots=9"], "offers 8 items, which fill no slate of 9"),
        (["-s", "logging.scores.path=nowhere/*"], "there is no run directory nowhere/*"),
        (["-s", "logging.policy={name: epsilon_greedy, epsilon: 0}"], "a deterministic policy showed only"),
        (["-s", "data.source.num_users=81"], "trained on other events than the log was made of"),
        (["-s", "simulator.dimensions=300"], "lower simulator.dimensions"),
        (["-s", "logging.scores={name: table, path: none.csv}"], "none.csv: there is no such file"),
    ],
)
def test_what_log_refuses(place: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused("offpolicy", "log", "-c", place / "log.yaml", "-o", tmp_path / "log.parquet", *words)
    assert not list(tmp_path.iterdir())


def test_a_log_needs_one_policy(place: Path, tmp_path: Path) -> None:
    several = f"logging.scores.path={place}/runs/*"
    words = ("offpolicy", "log", "-c", place / "log.yaml", "-o", tmp_path / "log.parquet", "-s", several)
    assert "one policy makes a log" in refused(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-s", "log.path=none.parquet"], "none.parquet: there is no such file"),
        (["-s", "evaluate.estimators=[{name: dr}]"], "use cascade_dr for slates"),
        (["-s", "evaluate.reward={clicks: 1}"], "did you mean 'click'?"),
        (["-s", "candidates=[]"], "candidates: "),
        (["--by", "domain_9"], "no requests for 'domain_9'; it can be asked by all, domain_1, domain_2"),
    ],
)
def test_what_evaluate_refuses(place: Path, tmp_path: Path, words: list[str], message: str) -> None:
    small = ["-s", "candidates=[{scores: {name: uniform}}]"] if "candidates" not in words[1] else []
    assert message in refused("offpolicy", "evaluate", "-c", place / "study.yaml", "-o", tmp_path, *small, *words)


@pytest.fixture
def bandit(tmp_path: Path) -> Path:
    """A folder in the form of Open Bandit: 400 rows, four items, logged uniformly."""
    folder = tmp_path / "random" / "all"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = 400
    item = generator.integers(4, size=rows)
    frame = pd.DataFrame(
        {
            "timestamp": "2019-11-24 00:00:00+00:00",
            "item_id": item,
            "position": generator.integers(1, 4, size=rows),
            "click": (generator.random(rows) < 0.2 + 0.15 * item).astype(int),
            "propensity_score": 0.25,
        }
    )
    frame.to_csv(folder / "all.csv")
    pd.DataFrame({"item_id": range(4)}).to_csv(folder / "item_context.csv")
    return folder


def study_of(folder: Path, *candidates: dict[str, Any]) -> Path:
    values = {
        "log": {"name": "open_bandit", "path": str(folder)},
        "candidates": [{"scores": {"name": "uniform"}}, *candidates],
    }
    return write(folder.parent / "study.yaml", values)


def test_open_bandit_files(bandit: Path, tmp_path: Path) -> None:
    table = tmp_path / "greedy.csv"
    table.write_text("item,score\n3,2.5\n2,1\n1,0\n0,0\n")
    study = study_of(bandit, {"scores": {"name": "table", "path": str(table)}})
    done("offpolicy", "evaluate", "-c", study, "-o", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    uniform, greedy = report["candidates"]
    assert uniform["estimates"][0]["value"] == pytest.approx(report["log"]["value"])
    assert greedy["estimates"][0]["interval"]["low"] > report["log"]["value"]
    assert uniform["truth"] is None
    output = done("offpolicy", "select", tmp_path / "out" / "report.json", "-f", "csv")
    assert output.splitlines()[1].startswith("1,greedy,")
    assert ",above," in output.splitlines()[1]
    assert "regret" not in output
    run = {"scores": {"name": "run", "path": str(tmp_path)}}
    assert "there is no run directory" in refused("offpolicy", "evaluate", "-c", study_of(bandit, run), "-o", tmp_path)
    study_of(bandit, {"scores": {"name": "table", "path": str(table)}})
    table.write_text("item,score\n9,2.5\n")
    assert "there is no item '9'" in refused("offpolicy", "evaluate", "-c", study, "-o", tmp_path)
    table.write_text("item,score\n3,2.5\n")
    assert "3 items of the catalogue have no score" in refused("offpolicy", "evaluate", "-c", study, "-o", tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("propensity_score", 0.0, "the propensity 0.0 is no probability"),
        ("propensity_score", 1.5, "the propensity 1.5 is no probability"),
        ("propensity_score", None, "no propensity"),
        ("click", None, "the reward 'click' nan is missing"),
        ("item_id", 7, "the item 8 is outside the catalogue 1..4"),
    ],
)
def test_bad_rows_are_errors(bandit: Path, tmp_path: Path, column: str, value: float | None, message: str) -> None:
    path = bandit / "all.csv"
    frame = pd.read_csv(path)
    frame[column] = frame[column].astype(object)
    frame.loc[5, column] = value
    frame.to_csv(path)
    error = refused("offpolicy", "evaluate", "-c", study_of(bandit), "-o", tmp_path / "out")
    assert message in error
    assert "request 5, position" in error


def test_a_log_that_cannot_tell_gives_no_number(bandit: Path, tmp_path: Path) -> None:
    """A policy that the log hardly ever shows: the table has no value for it, and select no rank."""
    path = bandit / "all.csv"
    frame = pd.read_csv(path)
    frame["propensity_score"] = np.where(frame["item_id"] == 3, 1e-4, 0.25)
    frame.to_csv(path)
    done("offpolicy", "evaluate", "-c", study_of(bandit), "-o", tmp_path / "out")
    (candidate,) = json.loads((tmp_path / "out" / "report.json").read_text())["candidates"]
    for estimate in candidate["estimates"]:
        assert estimate["value"] is None
        assert estimate["diagnostics"]["verdict"] == "do not use"
    assert ",refused,do not use" in done("offpolicy", "select", tmp_path / "out" / "report.json", "-f", "csv")


def test_help_names_the_commands() -> None:
    output = done("offpolicy", "--help")
    for name in ("log", "evaluate", "select"):
        assert name in output


def test_learn_from_a_run_makes_a_candidate(place: Path) -> None:
    [run] = (place / "runs").glob("sasrec-*")
    values = {
        "log": {"name": "parquet", "path": str(place / "log.parquet")},
        "init": str(run),
        "epochs": 4,
        "batch_size": 128,
        "optim": {"lr": 0.01},
    }
    words = ("-c", write(place / "learn.yaml", values), "-o", place / "learnt")
    assert "after   snips" in done("offpolicy", "learn", *words)
    outcome = json.loads((place / "learnt" / "learning.json").read_text())
    assert outcome["truth"]["after"]["value"] > outcome["truth"]["before"]["value"] + 0.01
    assert outcome["before"]["logged_value"] == outcome["after"]["logged_value"]
    learnt = f"candidates=[{{scores: {{name: run, path: {place / 'learnt'}, scale: raw}}}}]"
    done("offpolicy", "evaluate", "-c", place / "study.yaml", "-s", learnt, "-o", place / "again")
    (candidate,) = json.loads((place / "again" / "report.json").read_text())["candidates"]
    assert candidate["truth"]["value"] == pytest.approx(outcome["truth"]["after"]["value"], abs=0.01)
    done("recommend", "--help")
    popular = next((place / "runs").glob("popular-*"))
    assert "has no gradient to follow" in refused("offpolicy", "learn", *words, "-s", f"init={popular}")
    assert "needs a reward model" in refused("offpolicy", "learn", *words, "-s", "objective={name: mdpo}")
    assert "there is no 'exp_smooth'; did you mean exp_smoothing" in refused(
        "offpolicy", "learn", *words, "-s", "objective={name: exp_smooth}"
    )


def test_learn_a_table_from_open_bandit(bandit: Path, tmp_path: Path) -> None:
    values = {
        "log": {"name": "open_bandit", "path": str(bandit)},
        "objective": {"name": "dr"},
        "reward_model": {"name": "item_means"},
        "epochs": 10,
        "batch_size": 64,
        "optim": {"lr": 0.1, "weight_decay": 0.0},
    }
    done("offpolicy", "learn", "-c", write(tmp_path / "learn.yaml", values), "-o", tmp_path / "learnt")
    scores = pd.read_csv(tmp_path / "learnt" / "scores.csv").set_index("item")["score"]
    assert scores.sort_values().index.tolist() == [0, 1, 2, 3], "more clicks, a higher score"
    table = {"scores": {"name": "table", "path": str(tmp_path / "learnt" / "scores.csv")}, "name": "learnt"}
    done("offpolicy", "evaluate", "-c", study_of(bandit, table), "-o", tmp_path / "out")
    assert "reads histories" not in (tmp_path / "out" / "report.json").read_text()
