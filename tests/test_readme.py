"""What the README says is so: its tables are those of the committed results, its commands and protocols exist."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.evaluation.protocols import PROTOCOLS
from recsys.loading import load_yaml
from recsys.report.laws import laws_frame
from recsys.report.replication import Published, replicate, replication_frame
from recsys.report.study import means_frame
from recsys.report.tables import render, results_frame, seeds_frame
from recsys.results import find_runs, load
from recsys.scaling.findings import find
from recsys.scaling.records import read_table, studies

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bench import table_of
from runs import table_of as table_of_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STUDY = ROOT / "results" / "amazon_afk"
REPLICATION = [
    "domain",
    "metric",
    "published",
    "here",
    "difference",
    "full",
    "seeds",
    "epochs",
    "time",
    "hardware",
    "commit",
]
INTERVENTIONS = ["arm", "seeds", "cross-entropy (validation)", "NDCG@10 (validation)", "NDCG@10 (test)"]


def table(name: str) -> str:
    """The table that stands between the markers of a name."""
    found = re.search(rf"<!-- results: {name} -->\n(.*?)<!-- end -->", README, flags=re.S)
    assert found, f"the README has no table {name}"
    return found.group(1).strip()


@pytest.mark.parametrize("protocol", ["full", "abxi_999"])
def test_results_are_those_of_the_committed_runs(protocol: str) -> None:
    values = load(find_runs([STUDY]))
    frame = results_frame(values[values["seed"] == 0], ["ndcg@10", "hr@10"], protocol)
    assert table(protocol) == render(frame, "markdown").strip()


def test_means_over_seeds_are_those_of_the_committed_runs() -> None:
    values = load(find_runs([STUDY]))
    several = values.groupby("name")["seed"].nunique().loc[lambda seeds: seeds > 1].index
    frame = seeds_frame(values[values["name"].isin(several)], ["ndcg@10", "hr@10"], "full")
    assert table("seeds") == render(frame, "markdown").strip()


def test_the_replication_is_that_of_the_committed_run() -> None:
    records = json.loads((ROOT / "results" / "replication.json").read_text())
    frame = replication_frame(records)[REPLICATION]
    assert table("replication") == render(frame, "markdown").strip()
    runs = [
        run for run in find_runs([STUDY]) if run.path.name in {r["run"] for record in records for r in record["runs"]}
    ]
    assert replicate(runs, load_yaml(ROOT / "results" / "published.yaml", Published)) == records
    assert all(record["within_band"] for record in records)


def test_laws_are_those_of_the_committed_table() -> None:
    study = studies(read_table(ROOT / "results" / "afk_laws"))
    findings = find(study, "cross_entropy", ["dense parameters"], compare=("wide_ffn", "exchange"))
    assert table("afk_laws") == render(laws_frame(findings), "markdown").strip()
    assert "share no loss" in findings.refusals[0]


def test_every_committed_run_says_where_it_comes_from() -> None:
    runs = find_runs([STUDY])
    assert runs
    values = load(runs)
    assert not values["commit"].isna().any()
    assert not values["commit"].str.endswith("+").any(), "made from code that was not committed"


def test_commands_exist() -> None:
    for line in re.findall(r"^recsys ([a-z]+(?: (?:list|prepare|describe))?)", README, flags=re.M):
        if line == "offpolicy":  # which can be taken away whole; its own tests check its commands
            continue
        assert CliRunner().invoke(app, [*line.split(), "--help"]).exit_code == 0, line
    for config in re.findall(r"--config (\S+\.yaml)", README):
        assert (ROOT / config).exists(), config


def test_every_protocol_is_listed() -> None:
    listed = README.split("## Protocols")[1]
    for name in PROTOCOLS:
        assert f"`{name}`" in listed


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_interventions_are_those_of_the_committed_table() -> None:
    frame = means_frame(read_table(ROOT / "results" / "afk_interventions"))
    assert table("afk_interventions") == render(frame[INTERVENTIONS], "markdown").strip()


def test_speeds_are_those_of_the_committed_measurement() -> None:
    [path] = sorted((ROOT / "benchmarks" / "results").glob("20*-amd-epyc-2.json"))[-1:]
    frame = pd.DataFrame(table_of(json.loads(path.read_text())))
    assert table("speed") == render(frame, "markdown").strip()


def test_what_a_user_waits_for_is_what_was_measured() -> None:
    [path] = sorted((ROOT / "benchmarks" / "results").glob("runs-*-amd-epyc-2.json"))[-1:]
    frame = pd.DataFrame(table_of_runs(json.loads(path.read_text())))
    assert table("runs") == render(frame, "markdown").strip()
