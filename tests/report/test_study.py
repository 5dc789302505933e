"""The report of a scaling study: what is in it, and that it opens anywhere."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.report.laws import figures, ladder_frame, laws_frame, ratio_frame, records
from recsys.report.study import matching_frame, means_frame
from recsys.scaling.findings import find
from recsys.scaling.records import TRIAL_COLUMNS, studies

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "hr", "link"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_up) -> Path:
    """A sweep's folder of which only the tables are left, reported on."""
    path = tmp_path_factory.mktemp("sweep")
    table = made_up()
    table.loc[len(table) - 1, ["state", "cross_entropy"]] = ["failed", float("nan")]
    table.to_csv(path / "table.csv", index=False)
    bowl = [("", arm, "d8", rate, abs(rate - 0.002)) for arm in ("none", "exchange") for rate in (0.001, 0.002, 0.004)]
    pd.DataFrame(bowl, columns=list(TRIAL_COLUMNS)).to_csv(path / "trials.csv", index=False)
    (path / "sweep.yaml").write_text("name: <made & up>\n")
    shown = CliRunner().invoke(app, ["report", str(path), "--compare", "none", "exchange"])
    assert shown.exit_code == 0, shown.stderr
    return path / "report"


class Tags(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_beside_itself(folder):
    page = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    text = " ".join(tags.text)
    for title in ("What it says", "Results", "Laws", "Matching", "Learning rates", "Left out", "Where it comes from"):
        assert title in text
    assert "exchange needs fewer than none" in text
    assert "exchange d96, seed 1: failed" in text
    assert "<made & up>" in text, "a config is shown as it is, and is no markup"


def test_the_other_forms_say_the_same(folder):
    markdown = (folder / "report.md").read_text()
    assert "exchange needs fewer than none" in markdown
    for name in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (folder / name).stat().st_size > 1000
    assert (folder / "tables" / "laws.tex").read_text().startswith(r"\begin{tabular}")
    assert (folder / "laws.json").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_opens_it(folder, tmp_path):
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,2000"]
    command += [f"--user-data-dir={tmp_path}", f"--screenshot={tmp_path / 'page.png'}", "--virtual-time-budget=5000"]
    subprocess.run([*command, (folder / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_a_study_of_one_arm_and_two_sizes_says_so(tmp_path, made_up):
    made_up(widths=(8, 16)).to_csv(tmp_path / "table.csv", index=False)
    shown = CliRunner().invoke(app, ["laws", str(tmp_path), "--compare", "none", "exchange", "--axis", "dense"])
    assert shown.exit_code == 0
    assert "not said: dense parameters: none has 2 sizes" in shown.stdout
    shown = CliRunner().invoke(app, ["laws", str(tmp_path), "--compare", "none", "nil"])
    assert shown.exit_code == 2
    assert "there are: none, exchange" in shown.stderr


def test_tables_of_findings(made_up):
    table = made_up()
    findings = find(studies(table), "cross_entropy", ["dense parameters"], compare=("none", "exchange"))
    assert laws_frame(findings)["arm"].tolist() == ["none", "exchange"]
    assert ladder_frame(findings)["parameters"].tolist() == ["3", "4", "5", "6"]
    assert ratio_frame(findings)["rho [95 %]"].iloc[0].startswith("1.")
    assert {name.split("-")[0] for name, _ in figures(findings)} == {"laws", "rho"}
    kept = records(findings)
    assert kept["comparisons"][0]["rho"]["low"] < 1.5 < kept["comparisons"][0]["rho"]["high"]
    assert len(means_frame(table)) == 10
    assert "±" in means_frame(table)["NDCG@10 (validation)"].iloc[0]
    assert matching_frame(table)["training FLOPs"].iloc[0].endswith("(1.00×)")
