"""Every committed config of this part can be read, and says what it is for."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from recsys.loading import load_yaml
from recsys.offpolicy.learn import LearnConfig
from recsys.offpolicy.sources import LogConfig
from recsys.offpolicy.study import StudyConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "offpolicy").glob("*.yaml"))


def kind(path: Path) -> tuple[str, type[BaseModel]]:
    """The command that reads it."""
    if path.stem.endswith("_log"):
        return "log", LogConfig
    return ("learn", LearnConfig) if path.stem.endswith("_learn") else ("evaluate", StudyConfig)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path) -> None:
    command, model = kind(path)
    load_yaml(path, model)
    header = path.read_text()
    for line in ("# Purpose: ", f"# Command: recsys offpolicy {command} --config configs/offpolicy/{path.name} "):
        assert line in header
    assert "# Expect: " in header
    assert "# Time: " in header


def test_there_are_configs() -> None:
    assert {kind(path)[0] for path in CONFIGS} == {"log", "evaluate", "learn"}
