"""Runs beside published numbers."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.loading import load_yaml
from recsys.report.replication import Published, replicate, replication_frame
from recsys.results import RunDirectory, RunError, write_json

ROOT = Path(__file__).parents[2]
PUBLISHED = """
experiments:
  - name: toy
    paper: a paper
    source: its table
    protocol: uni_100
    band: 0.05
    values: {food: {ndcg@10: 0.20, mrr: 0.10}}
    spread: {food: {ndcg@10: 0.01}}
"""


def make_run(folder: Path, seed: int, ndcg: float, *, done: bool = True, name: str = "toy") -> RunDirectory:
    run = RunDirectory(folder / f"{name}-{seed}")
    run.path.mkdir(parents=True)
    run.config.write_text("name: toy\n")
    metrics = {
        "test/food/ndcg@10[uni_100]": {"value": ndcg, "low": 0.1, "high": 0.3, "n": 7},
        "test/food/mrr[uni_100]": {"value": 0.08, "low": 0.1, "high": 0.3, "n": 7},
        "test/food/ndcg@10": {"value": 0.05, "low": 0.04, "high": 0.06, "n": 7},
    }
    final = {"name": name, "seed": seed, "parameters": {"total": 9}, "metrics": metrics}
    write_json(run.final, final | {"selection": {"epoch": 3, "epochs": 5}})
    environment = {"commit": "abcdef123", "command": "train.py", "processor": "CPU", "torch_threads": 2}
    write_json(run.environment, environment | {"device": "cpu", "started": "2026-11-21T08:00:00", "seconds": 300.0})
    if done:
        run.done.touch()
    return run


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.yaml"
    path.write_text(PUBLISHED)
    return path


def test_means_and_differences(tmp_path: Path, published: Path) -> None:
    runs = [make_run(tmp_path, 0, 0.18), make_run(tmp_path, 1, 0.21), make_run(tmp_path, 2, 9.0, done=False)]
    ndcg, mrr = replicate(runs, load_yaml(published, Published))
    assert ndcg["value"] == pytest.approx(0.195)
    assert ndcg["spread"] == pytest.approx(0.03 / 2**0.5)
    assert ndcg["relative_difference"] == pytest.approx(-0.025)
    assert ndcg["within_band"]
    assert ndcg["seeds"] == 2
    assert ndcg["full"] == pytest.approx(0.05)
    assert [run["seed"] for run in ndcg["runs"]] == [0, 1]
    assert mrr["relative_difference"] == pytest.approx(-0.2)
    assert not mrr["within_band"]
    assert mrr["full"] is None
    assert mrr["published_spread"] is None
    frame = replication_frame([ndcg, mrr])
    assert frame["published"].tolist() == ["0.2000 ± 0.0100", "0.1000"]
    assert frame["difference"].tolist() == ["-2.5 %", "-20.0 % (beyond 5 %)"]
    assert frame["time"].tolist() == ["5 min", "5 min"]


def test_one_seed_has_no_spread(tmp_path: Path, published: Path) -> None:
    [ndcg, _] = replicate([make_run(tmp_path, 0, 0.18)], load_yaml(published, Published))
    assert ndcg["spread"] is None
    assert replication_frame([ndcg])["here"].tolist() == ["0.1800"]


def test_nothing_to_hold_against_is_an_error(tmp_path: Path, published: Path) -> None:
    with pytest.raises(RunError, match="train one of toy"):
        replicate([make_run(tmp_path, 0, 0.1, name="other")], load_yaml(published, Published))


def test_a_run_without_the_protocol_is_an_error(tmp_path: Path, published: Path) -> None:
    run = make_run(tmp_path, 0, 0.1)
    final = json.loads(run.final.read_text())
    del final["metrics"]["test/food/mrr[uni_100]"]
    write_json(run.final, final)
    with pytest.raises(RunError, match=r"has no test/food/mrr\[uni_100\]"):
        replicate([run], load_yaml(published, Published))


def test_the_command_writes_what_it_shows(tmp_path: Path, published: Path) -> None:
    make_run(tmp_path / "runs", 0, 0.18)
    output = tmp_path / "replication.json"
    command = ["replicate", str(tmp_path / "runs"), "--published", str(published), "-o", str(output), "-f", "csv"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "-10.0 %" in result.output
    assert json.loads(output.read_text())[0]["runs"][0]["commit"] == "abcdef123"


def test_the_published_numbers_can_be_read() -> None:
    """They name experiments that the project has configs for."""
    published = load_yaml(ROOT / "results" / "published.yaml", Published)
    configs = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    for experiment in published.experiments:
        assert f"name: {experiment.name}\n" in configs
        assert experiment.spread.keys() <= experiment.values.keys()
