from pathlib import Path

import pytest
from typer.testing import CliRunner

from recsys.cli import app

ROOT = Path(__file__).parents[2]
SMALL = ["data.source.num_users=200", "trainer.batch_size=32", "eval.protocols=[full, uni_100]"]


def test_it_says_what_a_run_costs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [word for setting in SMALL for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["estimate", "-c", str(ROOT / "configs" / "synthetic.yaml"), *options])
    assert result.exit_code == 0, result.output
    for line in ("parameters", "step", "memory of a step's tensors", "epoch, with its validation", "whole run"):
        assert line in result.output
    assert not list(tmp_path.iterdir())
