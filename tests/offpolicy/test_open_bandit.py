"""Open Bandit: a small folder of its format, and the real one where it is."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recsys.data.schema import DataError
from recsys.offpolicy.candidates import Candidate, ItemScores
from recsys.offpolicy.estimators import (
    IPS,
    SNDR,
    SNIPS,
    ClippedIPS,
    DirectMethod,
    DoublyRobust,
    ExponentialSmoothing,
    ImplicitExploration,
    LogSmoothing,
    MarginalizedIPS,
    ShrunkDR,
    SubGaussian,
    SwitchDR,
)
from recsys.offpolicy.evaluate import EvaluateConfig, evaluate
from recsys.offpolicy.evidence import gather
from recsys.offpolicy.feedback import FeedbackSource, LoggedFeedback
from recsys.offpolicy.open_bandit import read_open_bandit
from recsys.offpolicy.policies import Categorical, PlackettLuce

ESTIMATORS = {
    "ips": IPS(),
    "snips": SNIPS(),
    "dm": DirectMethod(),
    "dr": DoublyRobust(),
    "sndr": SNDR(),
    "switch": SwitchDR(threshold=5.0),
    "shrunk": ShrunkDR(shrinkage=5.0),
    "sub_gaussian": SubGaussian(shrinkage=0.1),
    "clipped": ClippedIPS(cap=5.0),
}

# π(a) ∝ exp(-a/20), q̂(a) = (a mod 7 + 1)/1000, items from 0; computed by Open Bandit Pipeline 0.5.7.
GOLDEN = {
    ("random", "all"): [
        0.0038509732269794,
        0.003800645048155239,
        0.0037948786758206445,
        0.0038575140726027825,
        0.0038566954936970943,
        0.0038575140726027825,
        0.00373501428172387,
        0.0035093697863821994,
        0.0038509732269794,
    ],
    ("bts", "all"): [
        0.0014279002148777223,
        0.0013628083959483608,
        0.0037948786758206445,
        0.0012012634546878047,
        0.001319495198466113,
        0.004155845565389743,
        0.003934114835105071,
        0.001330375218830982,
        0.0014279002148777223,
    ],
    ("bts", "men"): [
        0.0030960198096033707,
        0.003271451668185248,
        0.0037655367298512444,
        0.003247004183470578,
        0.0032176222240707744,
        0.0049193869475656115,
        0.004215625224692289,
        0.002837943324288263,
        0.0030960198096033707,
    ],
    ("bts", "women"): [
        0.005482618420144837,
        0.0017893065518520682,
        0.003766791951852993,
        -0.007077840831285357,
        0.00022753917073630987,
        0.003859541450865397,
        0.003804794211107767,
        0.002949188071434995,
        0.0027243531884304714,
    ],
}


class Sevenths:
    """q̂(a) = (a mod 7 + 1) / 1000, for items a + 1."""

    def predict(self, requests: torch.Tensor, slot: int, items: torch.Tensor) -> torch.Tensor:
        return (((items - 1) % 7 + 1).double() * 1e-3).expand(len(requests), -1)


def falling(num_items: int, name: str = "falling") -> Candidate:
    return Candidate(name, PlackettLuce(), ItemScores(-(torch.arange(num_items + 1).double() - 1) / 20))


def real(policy: str, campaign: str) -> FeedbackSource:
    root = os.environ.get("RECSYS_DATA")
    if root is None:
        pytest.skip("RECSYS_DATA is not set")
    folder = Path(root) / "open_bandit" / policy / campaign
    if not folder.is_dir():
        pytest.skip(f"Open Bandit is not below RECSYS_DATA ({root})")
    return read_open_bandit(folder)


@pytest.mark.real
@pytest.mark.parametrize(("policy", "campaign"), GOLDEN)
def test_golden_values(policy: str, campaign: str) -> None:
    source = real(policy, campaign)
    reward = source.log.reward({"click": 1.0})
    candidate = falling(source.log.num_items)
    evidence = gather(source.log, candidate, source.catalog, reward, reward_model=Sevenths())
    found = [estimator.terms(evidence).value for estimator in ESTIMATORS.values()]
    assert found == pytest.approx(GOLDEN[policy, campaign], abs=1e-12)


@pytest.mark.real
def test_golden_values_of_those_that_need_more() -> None:
    source = real("random", "all")
    uniform = Candidate("uniform", PlackettLuce(), ItemScores(torch.zeros(81)))
    groups = (torch.arange(81) - 1) % 5
    reward = source.log.reward({"click": 1.0})
    evidence = gather(source.log, falling(80), source.catalog, reward, logging=uniform, groups=groups)
    found = [
        estimator.terms(evidence).value
        for estimator in (
            MarginalizedIPS(),
            ImplicitExploration(gamma=0.01),
            LogSmoothing(smoothing=0.1),
            ExponentialSmoothing(alpha=0.8),
        )
    ]
    golden = [0.0037541696906318164, 0.002139429570544111, 0.0035071949106704543, 0.001603070055870221]
    assert found == pytest.approx(golden, abs=1e-12)


@pytest.mark.real
def test_a_log_of_another_taste_is_refused() -> None:
    source = real("bts", "all")
    config = EvaluateConfig(estimators=(IPS(), SNIPS(), DirectMethod()))
    report = evaluate(source.log, falling(80), source.catalog, config, reward_model=Sevenths())
    for estimate in report.estimates:
        assert estimate.value is None
        assert estimate.interval is None
        assert estimate.reason is not None
        assert estimate.reason.startswith(
            "do not use: 165 effective of 10,000 requests; one request weighs 433.0, 4.3%"
        )
    assert report.estimates[0].diagnostics.ess == pytest.approx(164.717, abs=1e-3)
    assert report.table()["value"].isna().all()


@pytest.mark.real
def test_a_uniform_log_can_be_used() -> None:
    source = real("random", "men")
    report = evaluate(source.log, falling(34), source.catalog, EvaluateConfig())
    assert [estimate.diagnostics.verdict for estimate in report.estimates] == ["trust", "trust"]
    ips = report.estimates[0]
    assert ips.value == pytest.approx(0.00433461457979163, abs=1e-12)
    assert ips.interval is not None
    assert ips.interval.low < report.logged_value < ips.interval.high
    assert report.quality.saco == 1.0
    assert source.log.marginal is not None


@pytest.mark.real
@pytest.mark.parametrize("campaign", ["all", "men", "women"])
def test_the_random_logs_are_uniform(campaign: str) -> None:
    source = real("random", campaign)
    np.testing.assert_allclose(source.log.propensity, 1 / source.log.num_items)
    uniform = Candidate("uniform", Categorical(), ItemScores(torch.ones(source.log.num_items + 1)))
    (ips, _) = evaluate(source.log, uniform, source.catalog, EvaluateConfig()).estimates
    assert ips.value == pytest.approx(source.log.rewards["click"].mean())
    assert ips.diagnostics.ess == pytest.approx(10_000)


def write(folder: Path, **changes: list[object]) -> Path:
    folder = folder / "bts" / "men"
    folder.mkdir(parents=True)
    columns: dict[str, list[object]] = {
        "timestamp": ["2019-11-24 00:00:34.762830+00:00", "2019-11-24 00:00:35+00:00"],
        "item_id": [0, 2],
        "position": [3, 1],
        "click": [0, 1],
        "propensity_score": [0.25, 0.5],
        "user_feature_0": ["x", "y"],
    }
    pd.DataFrame(columns | changes).to_csv(folder / "men.csv")
    pd.DataFrame({"item_id": [0, 1, 2]}).to_csv(folder / "item_context.csv")
    return folder


def test_the_reader(tmp_path: Path) -> None:
    source = read_open_bandit(write(tmp_path))
    log = source.log
    assert log.items.tolist() == [[1], [3]]
    assert log.positions.tolist() == [[2], [0]]
    assert log.rewards["click"].tolist() == [[0], [1]]
    assert log.propensity.tolist() == [[0.25], [0.5]]
    assert log.time.tolist() == [1574553634, 1574553635]
    assert (log.num_items, log.domain_names, source.catalog.num_items) == (3, ("men",), 3)
    assert source.raw_items == ("0", "1", "2")
    assert isinstance(log, LoggedFeedback)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensity_score": [0.25, None]}, "request 1, position 0: no propensity"),
        ({"propensity_score": [0.25, 1.5]}, r"the propensity 1\.5 is no probability"),
        ({"item_id": [0, 3]}, r"item 4 is outside the catalogue 1\.\.3"),
        ({"click": [None, 1]}, "reward 'click' nan is missing"),
        ({"position": [0, 1]}, r"request 0 has the positions \[-1\]"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, list[object]], message: str) -> None:
    folder = write(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_open_bandit(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder of Open Bandit is <policy>/<campaign>"):
        read_open_bandit(tmp_path)
    folder = write(tmp_path)
    (folder / "men.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a file of Open Bandit"):
        read_open_bandit(folder)
