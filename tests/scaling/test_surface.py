"""Laws in parameters and data, from tables of sweeps whose law is known."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.scaling.isoflop import Optimum
from recsys.scaling.records import from_runs, studies
from recsys.scaling.surface import fit_surfaces, parabolas


def table(epochs=(1,), sizes=(1e3, 4e3, 1.6e4, 6.4e4, 2.56e5), life=5.0) -> pd.DataFrame:
    """L = 2 + 30 N^-0.4 + 60 D'^-0.3 without noise; D' discounts what repeats as Muennighoff et al. (2023)."""
    rows = []
    for share in (0.1, 0.2, 0.5, 1.0):
        for times in epochs:
            for dense in sizes:
                unique = 1e5 * share
                worth = unique * (1 + life * (1 - np.exp(-(times - 1) / life)))
                loss = 2 + 30 * dense**-0.4 + 60 * worth**-0.3
                row = {"study": f"{share}-{times}", "arm": "none", "size": f"{dense:.0f}", "seed": 0, "state": "done"}
                row |= {"dense": dense, "total": 2 * dense, "targets": unique, "epochs": times, "cross_entropy": loss}
                rows.append(row | {"training_flops": 6 * dense * unique * times, "run": "x", "tuned": "fixed"})
    return from_runs(rows)


def test_a_law_in_parameters_and_data_is_recovered():
    found, refusals = fit_surfaces(studies(table()), "cross_entropy", ["dense parameters"], "size_and_data")
    assert not refusals
    [surface] = found
    expected = {"E": 2, "A": 30, "B": 60, "a": 0.4, "b": 0.3}
    assert surface.law.parameters == pytest.approx(expected, rel=1e-6)
    assert len(surface.y) == 20
    noisy = table()
    noisy["cross_entropy"] += np.random.default_rng(0).normal(0, 0.003, len(noisy))
    [surface], _ = fit_surfaces(studies(noisy), "cross_entropy", ["dense parameters"], "size_and_data")
    assert surface.confidence is not None
    low, high = surface.confidence.parameter("b")
    assert 0.2 < low < 0.3 < high < 0.4


def test_what_repetition_is_worth_is_recovered():
    """All sizes are below what suits the data, so that no parameter is one too many."""
    suited = Optimum(balance=(0.4 * 30 / (0.3 * 60)) ** (1 / 0.7), a=0.4, b=0.3)
    runs = table(epochs=(1, 4, 16, 64), sizes=(20.0, 50.0, 120.0, 300.0))
    assert suited.parameters(1e4) > 300
    [surface], refusals = fit_surfaces(studies(runs), "cross_entropy", ["dense parameters"], "repeated_data")
    assert not refusals
    expected = {"E": 2, "A": 30, "B": 60, "a": 0.4, "b": 0.3, "R_D": 5}
    assert {name: surface.law.parameters[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert surface.x[:4, 3] == pytest.approx(suited.parameters(1e4), rel=1e-4)


def test_what_a_grid_lacks_is_said():
    once = table()
    axes = ["dense parameters", "training FLOPs"]
    lone = once[once["study"].isin(["0.1-1", "1.0-1"])]
    for rows, form, words in (
        (lone, "size_and_data", "data.train_users"),
        (once, "repeated_data", "trainer.epochs"),
        (table(epochs=(1, 4)), "size_and_data", "--form repeated_data"),
        (once.assign(targets=pd.NA), "size_and_data", "recsys sweep"),
    ):
        found, refusals = fit_surfaces(studies(rows), "cross_entropy", axes, form)
        assert not found
        assert len(refusals) == 1  # none on FLOPs, which are made of both
        assert words in refusals[0]


def test_parabolas_over_runs_of_one_budget():
    budgets = table().assign(study="", training_flops=1e9).query("targets == 1e5").reset_index(drop=True)
    budgets["cross_entropy"] = 3 + (np.log10(budgets["dense"].astype(float)) - 4) ** 2
    one, two = budgets, budgets.assign(training_flops=2e9, cross_entropy=budgets["cross_entropy"] - 0.5)
    found = parabolas(studies(pd.concat([one, two])), "none", "dense parameters", "cross_entropy")
    assert [parabola.size for parabola in found] == pytest.approx([1e4, 1e4])
    assert [parabola.loss for parabola in found] == pytest.approx([3, 2.5])
    assert parabolas(studies(table()), "none", "dense parameters", "cross_entropy") == []


def test_the_command(tmp_path):
    table().to_csv(tmp_path / "table.csv", index=False)
    words = ["laws", str(tmp_path), "--form", "size_and_data", "--axis", "dense", "--format", "markdown"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "E + A N^-a + B D^-b" in result.output
    assert (tmp_path / "out" / "surface-none-dense_parameters.png").stat().st_size > 5000
    refused = CliRunner().invoke(app, [*words, "--compare", "none", "none"])
    assert refused.exit_code == 2
