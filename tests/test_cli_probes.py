"""`recsys probe`, `intervene` and `correlate` on small runs: tables, files and figures, and what is refused."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from recsys.cli import app
from recsys.experiment import Experiment, load_data
from recsys.loading import parse_config
from recsys.probes import intervene
from recsys.training.run import train

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 60, "mean_events": 14, "max_events": 30},
        "max_len": 20,
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
    "trainer": {"epochs": 1, "batch_size": 16, "patience": None, "device": "cpu"},
    "eval": {"bootstrap_samples": 20, "permutations": 20},
}


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = parse_config(SMALL, Experiment, "test")
    quiet = Console(file=io.StringIO())
    return train(config, load_data(config.data, None), tmp_path_factory.mktemp("runs"), quiet).path


@pytest.fixture(scope="module")
def probed(run: Path) -> str:
    return call("probe", run, "--set", "samples=100", "--format", "markdown")


def test_probe_shows_chance_beside_every_value(probed: str, run: Path) -> None:
    header, _, first, *_ = probed.splitlines()
    assert header.startswith(
        "| unit | direction | tokens | alignment ratio [95 %] | isotropic | covariance | at start |"
    )
    assert first.startswith("| early.0.0 | domain_2->domain_1 |")
    assert "| energy [95 %] |" in probed
    table = pq.read_table(run / "probes.parquet")
    assert pc.unique(table["label"]).to_pylist() == ["initial", "best"]
    for name in ("cosines", "energy", "alignment"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_intervene_shows_energy_beside_every_change(run: Path) -> None:
    output = call("intervene", run, "--draws", 1, "--by-unit", "--format", "markdown")
    assert output.startswith(
        "| added instead | unit | macro ndcg@10 | change [95 %] | p (Holm) | energy | per energy |"
    )
    rows = pq.read_table(run / "interventions.parquet").to_pylist()
    assert {row["unit"] for row in rows} == {"all", "early.0.0", "early.0.1"}
    assert {row["intervention"] for row in rows} == set(intervene.INTERVENTIONS)
    for row in rows:
        assert row["low"] <= row["difference"] <= row["high"]
        if row["intervention"] == "nothing":
            assert row["energy"] == pytest.approx(1)
            assert row["difference_per_energy"] == pytest.approx(row["difference"])
    final = json.loads((run / "final.json").read_text())
    assert rows[0]["trained"] == pytest.approx(final["metrics"][rows[0]["key"]]["value"])
    assert (run / "interventions.png").exists()


def test_correlate_puts_pooled_and_within_side_by_side(probed: str, run: Path, tmp_path: Path) -> None:
    """Four copies, the alignment ratio falling as the metric rises."""
    for seed in range(4):
        copy = shutil.copytree(run, tmp_path / f"run{seed}")
        final = json.loads((copy / "final.json").read_text()) | {"seed": seed}
        final["metrics"]["test/macro/ndcg@10"]["value"] = 0.1 * seed
        (copy / "final.json").write_text(json.dumps(final))
        table = pq.read_table(copy / "probes.parquet")
        ratio = pc.if_else(pc.equal(table["measure"], "alignment_ratio"), pa.scalar(2.0 - 0.1 * seed), table["value"])
        pq.write_table(table.set_column(table.schema.get_field_index("value"), "value", ratio), copy / "probes.parquet")
    figure = tmp_path / "points.pdf"
    points = tmp_path / "points.csv"
    output = call(
        "correlate", tmp_path, "--samples", 20, "--figure", figure, "--points", points, "--format", "markdown"
    )
    assert len(points.read_text().splitlines()) == 5
    assert "| synthetic | spearman | 4 | 1 | -1.000" in output
    assert "pooled [95 %] | within cells [95 %]" in output
    assert figure.read_bytes().startswith(b"%PDF")
    config = tmp_path / "run3" / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay:", "weight_decay: 7.0 #"))  # of another arm
    assert "| synthetic | spearman | 4 | 2 |" in call("correlate", tmp_path, "--samples", 20, "--format", "markdown")
    shutil.rmtree(tmp_path / "run3")
    result = CliRunner().invoke(app, ["correlate", str(tmp_path)])
    assert result.exit_code == 2
    assert "needs four runs or more" in result.output


def test_what_is_asked_wrongly_is_named(run: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["probe", run, "--set", "folsd=3"], "did you mean folds"),
        (["probe", tmp_path], "is not a run directory"),
        (["intervene", run, "--protocol", "some"], "there is no protocol 'some'"),
        (["correlate", run, "--metric", "test/macro/ndcg@11"], "has no metric"),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, arguments
        assert words in result.output
