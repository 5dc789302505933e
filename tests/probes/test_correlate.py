"""Correlations across runs: what a width does to both must not pass for a link between them."""

import math

import numpy as np
import pandas as pd
import pytest

from recsys.probes.correlate import TooFewRuns, centre_in_cells, correlate, mixed_model


def study(slope: float, seed: int = 0, datasets: int = 4) -> pd.DataFrame:
    """Four data sets, five sizes, five seeds: larger models are less aligned and rank better; `slope` is the link
    within a cell, in units of the spread of both.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for dataset in range(datasets):
        base = generator.normal(0, 2)
        for size in range(5):
            for run in range(5):
                ratio = generator.normal()
                value = slope * ratio + 0.5 * generator.normal()
                rows.append(
                    {
                        "run": f"{dataset}{size}{run}",
                        "dataset": f"data {dataset}",
                        "cell": f"{dataset}/{size}",
                        "seed": run,
                        "log_ratio": 0.1 * (ratio - 1.2 * size) - 0.05 * base,
                        "value": 0.01 * (value + 0.8 * size + base),
                        "log_parameters": float(size),
                    }
                )
    return pd.DataFrame(rows)


def pick(table: pd.DataFrame, statistic: str, scope: str, dataset: str = "all") -> pd.Series:
    chosen = table["dataset"].eq(dataset) & table["statistic"].eq(statistic) & table["scope"].eq(scope)
    return table[chosen].iloc[0]


def test_no_link_shows_as_none_within_cells_and_as_a_strong_one_pooled():
    points = study(0.0)
    table = correlate(points, samples=200)
    assert pick(table, "spearman", "pooled")["value"] < -0.5
    within = pick(table, "spearman", "within")
    assert abs(within["value"]) < 0.2
    assert within["low"] < 0 < within["high"]
    assert within["p"] > 0.05
    assert abs(pick(table, "kendall", "within")["value"]) < 0.15
    assert abs(pick(table, "spearman given log parameters", "pooled")["value"]) < 0.25
    model = mixed_model(points)
    assert abs(model["slope"]) < 2.5 * model["error"]


def test_a_link_is_found_with_its_slope():
    points = study(-1.0)
    table = correlate(points, samples=200)
    assert pick(table, "spearman", "pooled")["value"] < -0.5
    within = pick(table, "spearman", "within")
    assert within["value"] < -0.8
    assert within["high"] < -0.6
    assert within["p"] == pytest.approx(1 / 201)
    model = mixed_model(points)
    # In units of the spread within cells: -1 / sqrt(1 + 0.25).
    assert model["slope"] == pytest.approx(-1 / math.sqrt(1.25), abs=0.12)
    assert model["p"] < 1e-6


def test_a_reversal_is_visible():
    """Simpson's: positive inside every cell, negative over all."""
    table = correlate(study(0.6, seed=1), samples=50)
    assert pick(table, "spearman", "pooled")["value"] < 0
    assert pick(table, "spearman", "within")["value"] > 0.4


def test_holm_is_over_the_primary_family():
    table = correlate(study(0.0), samples=50)
    adjusted = table[table["p_holm"].notna()]
    assert adjusted["statistic"].eq("spearman").all()
    assert adjusted["scope"].eq("within").all()
    assert sorted(adjusted["dataset"]) == [f"data {i}" for i in range(4)]
    assert (adjusted["p_holm"] >= adjusted["p"]).all()
    alone = correlate(study(0.0, datasets=1), samples=50)
    assert alone[alone["p_holm"].notna()]["dataset"].tolist() == ["data 0"]


def test_by_hand():
    """Two cells, each with values in reverse order of the ratio; the cells' means rise together."""
    points = pd.DataFrame(
        {
            "run": list("abcd"),
            "dataset": "one",
            "cell": ["x", "x", "y", "y"],
            "seed": [0, 1, 0, 1],
            "log_ratio": [0.0, 1.0, 10.0, 12.0],
            "value": [2.0, 1.0, 8.0, 7.0],
            "log_parameters": [1.0, 1.0, 2.0, 2.0],
        }
    )
    centred = centre_in_cells(points)
    assert centred["log_ratio_within"].tolist() == [-0.5, 0.5, -1, 1]
    assert centred["value_within"].tolist() == [0.5, -0.5, 0.5, -0.5]
    table = correlate(points, samples=20)
    assert pick(table, "spearman", "pooled", "one")["value"] == pytest.approx(0.6)
    assert pick(table, "kendall", "pooled", "one")["value"] == pytest.approx(1 / 3)
    # Ranks 2 3 1 4 against 3.5 1.5 3.5 1.5: sum of products of deviations -4, over sqrt(5 * 4).
    assert pick(table, "spearman", "within", "one")["value"] == pytest.approx(-4 / math.sqrt(20))


def test_cells_of_one_say_nothing_within():
    points = study(0.0, datasets=1)
    lone = points.iloc[[0]].assign(cell="alone", log_ratio=9.0, value=9.0)
    more = pd.concat([points, lone], ignore_index=True)
    assert pick(correlate(points, samples=5), "spearman", "within", "data 0")["value"] == pytest.approx(
        pick(correlate(more, samples=5), "spearman", "within", "data 0")["value"]
    )
    with pytest.raises(TooFewRuns, match="differ only in their seed"):
        correlate(points.assign(cell=points["run"]))
    with pytest.raises(TooFewRuns, match="two or more"):
        mixed_model(points)
