"""Every committed experiment can be read, builds its model, and says what it is for."""

import re
from pathlib import Path

import pytest
import torch

from recsys.experiment import Experiment
from recsys.loading import load_yaml
from recsys.models import count_parameters
from recsys.sweeps.plan import load_sweep
from recsys.sweeps.tune import load_space, with_values
from recsys.types import NO_DOMAIN, Catalog

ROOT = Path(__file__).parents[1]
SPACES = sorted((ROOT / "configs" / "tune").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
OFFPOLICY = sorted((ROOT / "configs" / "offpolicy").glob("*.yaml"))  # no experiments, and tested beside their part
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(SPACES) - set(SWEEPS) - set(OFFPOLICY))


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "synthetic.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config(path: Path) -> None:
    experiment = load_yaml(path, Experiment)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for key in ("Purpose:", "Command:", "Expect:", "Time:"):
        assert any(line.startswith(f"# {key}") for line in header), f"the header lacks `# {key} …`"
    command = next(line for line in header if line.startswith("# Command:"))
    assert re.search(rf"--config {path.relative_to(ROOT)}\b", command) or path.name == "synthetic.yaml"
    catalog = Catalog(("a", "b"), torch.tensor([NO_DOMAIN, 0, 0, 1]), torch.tensor([0, 1, 1, 1]))
    counts = count_parameters(experiment.model.build(catalog, experiment.data.max_len))
    assert counts["total"] == sum(count for group, count in counts.items() if group != "total")


def test_baseline_and_treatment_differ_in_one_key() -> None:
    """`cross: null` against `cross: {...}` is all that separates them, but for the name."""
    folder = ROOT / "configs" / "amazon_afk"
    baseline, treatment = (
        load_yaml(folder / f"{name}.yaml", Experiment).model_dump() for name in ("cross_domain_null", "cross_domain")
    )
    assert baseline["model"].pop("cross") is None
    assert treatment["model"].pop("cross") is not None
    assert baseline.pop("name") != treatment.pop("name")
    assert baseline == treatment


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_search_space(path: Path) -> None:
    """Its keys are those of the config of its name, and each of its ends makes an experiment."""
    name = path.stem
    experiment = load_yaml(ROOT / "configs" / "amazon_afk" / f"{name}.yaml", Experiment)
    header = path.read_text().splitlines()[:2]
    assert header[0].startswith(f"# Purpose: what to search for {name}")
    assert f"--config configs/amazon_afk/{name}.yaml --space configs/tune/{name}.yaml" in header[1]
    for key, dimension in load_space(path, experiment).items():
        for value in dimension.choices or (dimension.low, dimension.high):
            with_values(experiment, {key: value})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep(path: Path) -> None:
    """It says what it is for, and its arms and sizes set keys that there are."""
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for key in ("Purpose:", "Command:", "Expect:", "Time:"):
        assert any(line.startswith(f"# {key}") for line in header), f"the header lacks `# {key} …`"
    assert f"recsys sweep {path.relative_to(ROOT)}" in "".join(header)
    config, base = load_sweep(path, [])
    for size in config.sizes.values():
        for arm in config.arms.values():
            with_values(base, arm.set | size)


def test_baseline_and_treatment_have_one_search_space() -> None:
    folder = ROOT / "configs" / "amazon_afk"
    baseline, treatment = (
        load_yaml(folder / f"{name}.yaml", Experiment) for name in ("cross_domain_null", "cross_domain")
    )
    space = ROOT / "configs" / "tune" / "cross_domain.yaml"
    assert load_space(space, baseline) == load_space(space, treatment)
