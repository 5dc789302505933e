"""The import rule of the project: an import goes down a layer, or stays inside its own part."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "recsys"
LAYERS = [
    {"errors", "memory", "precision", "products", "sizes", "fused"},
    {"types", "loading"},
    {"data", "models", "losses", "negatives", "evaluation", "optim", "balance", "results"},
    {"probes", "scaling"},
    {"experiment"},
    {"training"},
    {"sweeps", "report", "offpolicy"},
    {"cli", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imported_parts(source: str) -> set[str]:
    """Parts of recsys that a module imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update([node.module] if node.module != "recsys" else [f"recsys.{a.name}" for a in node.names])
    return {name.split(".")[1] for name in names if name and name.startswith("recsys.")} & set(LEVEL)


def allowed(part: str, other: str) -> bool:
    return part == other or LEVEL[other] < LEVEL[part]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if path.name == "cli.py":  # the commands of a part that can be taken away whole lie in it
        part = "cli"
    if part == "__init__":
        assert not imported_parts(path.read_text())
        return
    assert part in LEVEL, f"{part} has no layer yet: give it one here and in the design"
    wrong = {other for other in imported_parts(path.read_text()) if not allowed(part, other)}
    assert not wrong, f"recsys.{part} must not import {sorted(wrong)}"


def test_the_rule_can_fail() -> None:
    assert imported_parts("def f():\n    from recsys.training.run import run") == {"training"}
    assert imported_parts("from recsys import losses") == {"losses"}
    assert not allowed("models", "losses")
    assert not allowed("data", "training")
    assert allowed("training", "data")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import recsys", {"torch", "pandas", "pytorch_lightning", "matplotlib"}),
        ("import recsys.cli", {"torch", "pandas", "pytorch_lightning", "matplotlib"}),
        ("import recsys.experiment", {"pytorch_lightning", "matplotlib"}),
    ],
)
def test_imports_stay_cheap(code: str, absent: set[str]) -> None:
    program = f"import sys; {code}; print(' '.join(sorted(set(sys.modules) & {absent!r})))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded
