"""The planted answer: the instrument on data whose dial of cross-domain information is known.

At dial 0 the other domain tells nothing about the next item, at dial 1 an interest follows it wherever it goes.
"""

import io
from typing import Any

import pytest
from rich.console import Console

from recsys.experiment import Experiment, load_data
from recsys.loading import parse_config
from recsys.probes import ProbeConfig
from recsys.probes.intervene import INTERVENTIONS
from recsys.training.instruments import intervene_run, probe_run
from recsys.training.run import train

SOURCE = {
    "name": "synthetic",
    "num_users": 800,
    "items_per_domain": 80,
    "mean_events": 24,
    "max_events": 50,
    "overlap": 1.0,
    "shared_interests": 6,
    "private_interests": 0,
    "drift": 0.3,
    "temperature": 0.15,
}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[float, tuple[dict[str, list[Any]], dict[str, Any]]]:
    """Per dial: the measures of both units by name, and the macro change by intervention."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for dial in (0.0, 1.0):
        values = {
            "name": "planted",
            "data": {"source": SOURCE | {"transfer": dial}, "max_len": 30},
            "model": {
                "name": "cross_domain",
                "d_model": 24,
                "d_ff": 48,
                "num_layers": 1,
                "num_heads": 2,
                "dropout": 0.1,
                "cross": {"num_heads": 2, "dropout": 0.1},
            },
            "loss": {"name": "softmax"},
            "optim": {"lr": 5e-3, "schedule": {"name": "cosine", "warmup_steps": 20}},
            "trainer": {"epochs": 8, "batch_size": 32, "patience": None, "device": "cpu"},
            "eval": {"bootstrap_samples": 300, "permutations": 300},
        }
        experiment = parse_config(values, Experiment, "test")
        run = train(experiment, load_data(experiment.data, None), folder, QUIET)
        _, probes = probe_run(run.path, None, ProbeConfig(samples=1000))
        measures: dict[str, list[Any]] = {}
        for row in probes.to_pylist():
            if (row["label"], row["head"], row["query"]) in (("best", "all", None), ("best", "all", "stream")):
                measures.setdefault(f"{row['site']} {row['measure']}", []).append(row)
        chosen = {name: INTERVENTIONS[name] for name in ("nothing", "another user's context", "orthogonal part")}
        _, interventions = intervene_run(run.path, None, QUIET, draws=1, interventions=chosen)
        rows = interventions.to_pylist()
        found[dial] = measures, {row["intervention"]: row for row in rows if "/macro/" in row["key"]}
    return found


@pytest.mark.slow  # two small models are trained
def test_without_information_nothing_is_found(planted: Any) -> None:
    measures, changes = planted[0.0]
    for name in ("novelty_beyond_control", "cross_domain_share_beyond_control"):
        for row in measures[f"output {name}"]:
            assert row["low"] < 0 < row["high"], name
    assert changes["nothing"]["low"] < 0 < changes["nothing"]["high"]


@pytest.mark.slow
def test_with_information_it_is_found(planted: Any) -> None:
    """Both units of the model that can gain add more energy than their stream has, and the ranking needs it."""
    measures, changes = planted[1.0]
    for row in measures["output cross_domain_share_beyond_control"]:
        assert row["high"] < 0  # query and context are one user's: what they say overlaps
    for name in ("nothing", "another user's context"):
        assert changes[name]["high"] < -0.01, name
    assert changes["another user's context"]["difference"] < changes["nothing"]["difference"]
    for row in measures["output alignment_ratio"]:
        assert row["low"] > 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["novel_energy", "cross_domain_energy"])
def test_what_is_added_rises_with_the_dial(planted: Any, name: str) -> None:
    low, high = (planted[dial][0][f"update {name}"] for dial in (0.0, 1.0))
    assert len(low) == len(high) == 2
    for one, other in zip(low, high, strict=True):
        assert one["value"] < 0.15
        assert one["high"] < other["low"]
        assert other["value"] > 0.3
