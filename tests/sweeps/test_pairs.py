"""`recsys match`: a config for each control, and a table that shows how equal they are."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.experiment import Experiment, load_data
from recsys.loading import load_yaml
from recsys.sweeps.pairs import make_pairs, pairs_frame


@pytest.fixture
def treatment(tmp_path, write_sweep) -> Path:
    write_sweep(tmp_path)
    return tmp_path / "base.yaml"


def test_configs_come_out(treatment, tmp_path):
    command = ["match", "-c", str(treatment), "--tolerance", "0.02", "--no-speed", "-o", str(tmp_path / "out")]
    controls = ["wide_ffn", "wider", "self_attention", "shuffled_context"]
    chosen = [word for name in controls for word in ("--control", name)]
    shown = CliRunner().invoke(app, [*command, *chosen, "-f", "csv"])
    assert shown.exit_code == 0, shown.stderr
    rows = [line.split(",") for line in shown.stdout.splitlines()]
    assert rows[1][0] == "treatment"
    written = {path.stem: load_yaml(path, Experiment) for path in (tmp_path / "out").glob("*.yaml")}
    assert set(written) == {row[0] for row in rows[2:] if len(row) > 1}
    assert {"wide_ffn", "self_attention", "shuffled_context"} <= set(written)
    original = load_yaml(treatment, Experiment)
    for name, experiment in written.items():
        assert experiment.name == f"tiny-{name}"
        assert experiment.model_copy(update={"name": "tiny", "model": original.model}) == original
    assert written["wide_ffn"].model.cross is None
    assert written["wide_ffn"].model.d_ff > original.model.d_ff


def test_nothing_is_matched_that_is_not(treatment, tmp_path):
    command = ["match", "-c", str(treatment), "--control", "wide_ffn", "--tolerance", "1e-9", "--no-speed"]
    shown = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert shown.exit_code == 2
    assert shown.stderr.count("is off by") == 2
    assert not (tmp_path / "out").exists()


def test_speed_and_memory_are_measured(treatment):
    experiment = load_yaml(treatment, Experiment)
    data = load_data(experiment.data, None)
    options = {"baseline": None, "basis": "dense", "tolerance": 0.02, "speed": True}
    pairs = make_pairs(experiment, ["shuffled_context"], data, **options)
    row = pairs_frame(pairs).iloc[1]
    assert row["FLOPs"] == "1.000"
    assert float(row["speed"]) > 0
    assert row["peak memory"].endswith("MiB")
    speed = pairs.speed
    assert speed is not None
    # Weights, their gradients and Adam's two moments are there at once, four bytes each.
    assert speed.peak_bytes > 4 * 3 * 4896
    assert speed.seconds_per_epoch > speed.seconds_per_step
