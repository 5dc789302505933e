"""The table of a study, and what is found in it."""

from pathlib import Path

import numpy as np
import pytest

from recsys.scaling.compare import VarianceRatio
from recsys.scaling.findings import find
from recsys.scaling.records import StudyError, exclusions, read_studies, read_table, studies

WIDTHS = (8, 16, 32, 64, 96)


def test_a_table_is_read_as_it_was_written(tmp_path: Path, made_up):
    table = made_up()
    table.to_csv(tmp_path / "table.csv", index=False)
    read = read_table(tmp_path)
    assert read["cross_entropy"].tolist() == table["cross_entropy"].tolist()
    assert read["study"].tolist() == [""] * 20
    assert read["size"].tolist() == table["size"].tolist()
    assert read_table(tmp_path / "table.csv").equals(read)


def test_what_is_no_table(tmp_path: Path, made_up):
    with pytest.raises(StudyError, match="recsys sweep"):
        read_table(tmp_path)
    (tmp_path / "table.csv").write_text("arm,size\na,1\n")
    with pytest.raises(StudyError, match="lacks study"):
        read_table(tmp_path)
    with pytest.raises(StudyError, match="no run of this sweep is finished"):
        studies(made_up().assign(state="failed"))


def test_an_arm_on_an_axis(made_up):
    [study] = studies(made_up(noise=0.0))
    assert study.arms == ["none", "exchange"]
    arm = study.arm("none", "total parameters", "cross_entropy")
    assert arm.means[0].tolist() == [24 * width**2 + 2000 * width for width in WIDTHS]
    assert arm.means[1] == pytest.approx(4 + 20 * (24.0 * np.array(WIDTHS) ** 2) ** -0.25)
    score = study.arm("none", "dense parameters", "ndcg@10")
    assert score.means[1] == pytest.approx(1 - (0.2 - 0.02 * arm.means[1]))
    with pytest.raises(StudyError, match="none, exchange"):
        study.arm("nil", "dense parameters", "cross_entropy")


def test_seeds_that_stopped_early_are_of_one_size(made_up):
    table = made_up()
    table.loc[0, "training_flops"] *= 2
    [study] = studies(table)
    sizes = study.arm("none", "training FLOPs", "cross_entropy").means[0]
    assert len(sizes) == 5
    assert sizes[0] == 1.5 * 6e5 * 24 * 64


def test_what_is_left_out_is_said(made_up):
    table = made_up()
    table.loc[:1, "state"] = ["failed", "edge"]
    lines = exclusions(table)
    assert len(lines) == 2
    assert lines[0].startswith("none d8, seed 0: failed")
    assert "tuning.trials" in lines[1]
    assert exclusions(made_up()) == []


def test_findings_of_a_known_ratio(made_up):
    findings = find(studies(made_up()), "cross_entropy", compare=("none", "exchange"))
    assert not findings.refusals
    assert len(findings.laws) == 2 * 3
    dense = findings.comparisons["", "dense parameters"]
    assert dense.rho.low < 1.5 < dense.rho.high
    assert abs(dense.rho.value - 1.5) < 0.05
    assert findings.comparisons["", "total parameters"].rho.high < 1.5, "the table is as large for both"
    assert findings.sentences()[-1].startswith("exchange needs fewer than none counted in dense parameters")
    assert abs(findings.laws[0].hold_out.error) < 0.01


def test_no_verdict_where_there_is_too_little(made_up):
    few = find(studies(made_up(widths=WIDTHS[:3])), "cross_entropy", compare=("none", "exchange"))
    assert not few.laws
    assert not few.comparisons
    assert any("needs at least 4" in line for line in few.refusals)
    narrow = find(studies(made_up(widths=(16, 18, 20, 22))), "cross_entropy", compare=("none", "exchange"))
    assert narrow.laws
    assert not narrow.comparisons
    assert all("decades" in line for line in narrow.refusals)


def test_seeds_that_do_not_differ():
    assert VarianceRatio(seeds=0.0, sizes=1.0).ratio == float("inf")


def test_an_arm_that_does_not_gain_with_size_shares_no_loss_with_one_that_does(made_up):
    table = made_up()
    table.loc[table["arm"] == "none", "cross_entropy"] = 9.0
    findings = find(studies(table), "cross_entropy", ["dense parameters"], compare=("none", "exchange"))
    assert not findings.comparisons
    assert "share no loss" in findings.refusals[0]
    assert findings.laws[0].law.search.at_bounds, "a law that is flat has nothing to say of its exponent"


def test_several_sweeps_are_pooled(tmp_path: Path, made_up):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        made_up(seed=seed).to_csv(tmp_path / name / "table.csv", index=False)
    table, found = read_studies([tmp_path / "one", tmp_path / "two"])
    assert [study.name for study in found] == ["one", "two"]
    assert len(table) == 40
    findings = find(found, "cross_entropy", ["dense parameters"], compare=("none", "exchange"))
    pooled = findings.pooled["dense parameters"].ratio
    assert pooled.low < 1.5 < pooled.high
    assert findings.sentences()[0].startswith("one: Counted in dense parameters")
