"""What the README says of this part: its commands, their configs and their files exist."""

import re
from pathlib import Path

from typer.testing import CliRunner

from recsys.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_commands_exist() -> None:
    commands = re.findall(r"^recsys offpolicy ([a-z]+)", README, flags=re.M)
    assert set(commands) == {"log", "evaluate", "select", "learn"}
    for command in set(commands):
        assert CliRunner().invoke(app, ["offpolicy", command, "--help"]).exit_code == 0, command


def test_objectives_are_those_that_there_are() -> None:
    from typing import get_args

    from recsys.offpolicy.objectives import ObjectiveConfig

    said = README.split("Objectives of `learn`:")[1].split(".\n")[0]
    names = {kind.model_fields["name"].default for kind in get_args(get_args(ObjectiveConfig)[0])}
    assert set(re.findall(r"`([a-z_]+)`", said)) == names
