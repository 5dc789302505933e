"""The worked example of data/README.md does what it says."""

import re
from pathlib import Path

from recsys.data.cards import shipped_cards
from recsys.data.prepare import prepare

README = shipped_cards().parent / "README.md"


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return found


def test_the_example_card_prepares_the_example_file(tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards/corner-shop.yaml").write_text(block("yaml"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export/events.csv").write_text(block("csv"))
    meta = prepare("corner-shop", tmp_path, raw=tmp_path / "export").meta
    assert meta["counts"]["domains"] == {
        "grocery": {"users": 2, "items": 2, "events": 4},
        "kitchen": {"users": 2, "items": 2, "events": 2},
    }
    assert meta["days"] == ["2024-03-01", "2024-03-05"]
    assert meta["splits"]["leave_one_out"]["test"] == {"grocery": 1, "kitchen": 1}


def test_every_card_is_listed() -> None:
    text = README.read_text()
    for path in shipped_cards().glob("*.yaml"):
        assert f"| `{path.stem}` |" in text
