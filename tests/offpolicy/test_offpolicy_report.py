"""Reports: values, intervals and refusals of all estimators on one log."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from offpolicy_world import make_log, single_domain

from recsys.data.schema import DataError
from recsys.loading import ConfigError, parse_config
from recsys.offpolicy.candidates import Candidate, ItemScores
from recsys.offpolicy.estimators import IPS, SNIPS, DirectMethod, DoublyRobust, ExponentialSmoothing, MarginalizedIPS
from recsys.offpolicy.evaluate import EvaluateConfig, Report, evaluate
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.intervals import Bootstrap
from recsys.offpolicy.policies import EpsilonGreedy, PlackettLuce, sample
from recsys.offpolicy.rewards import ItemMeans
from recsys.offpolicy.slates import CascadeDR, IndependentIPS, RewardInteractionIPS
from recsys.types import Catalog

ITEMS = 6
CATALOG = Catalog(("one",), single_domain(ITEMS), torch.zeros(ITEMS + 1, dtype=torch.int64))
EARNS = torch.linspace(0.1, 0.7, ITEMS + 1, dtype=torch.float64)
LOGGING = Candidate("logging", PlackettLuce(temperature=2.0), ItemScores(torch.arange(ITEMS + 1).double() % 3))
TARGET = Candidate("target", PlackettLuce(), ItemScores(torch.arange(ITEMS + 1).double() / 5))


def logged(n: int, slots: int = 1, seed: int = 0, policy: Candidate = LOGGING) -> LoggedFeedback:
    """Clicks by item, whatever the position."""
    generator = torch.Generator().manual_seed(seed)
    items = CATALOG.items_of(0)
    drawn = sample(policy.policy, policy.scores(torch.arange(n), items), slots, generator)
    chance = EARNS[items[drawn.slates]]
    clicks = (torch.rand(chance.shape, generator=generator) < chance).double().numpy()
    return make_log(items[drawn.slates].numpy(), drawn.log_probs.exp().numpy(), {"click": clicks}, ITEMS)


def report(log: LoggedFeedback, *estimators: object, **options: object) -> Report:
    known = {key: options.pop(key) for key in ("logging", "groups") if key in options}
    config = EvaluateConfig(estimators=estimators, **options)  # type: ignore[arg-type]
    return evaluate(log, TARGET, CATALOG, config, **known)  # type: ignore[arg-type]


def value_of(candidate: Candidate) -> float:
    items = CATALOG.items_of(0)
    nothing = torch.empty((1, 0), dtype=torch.int64)
    return float(
        (candidate.policy.next(candidate.scores(torch.zeros(1).long(), items), nothing)[0] * EARNS[items]).sum()
    )


def test_the_truth_lies_in_the_intervals() -> None:
    found = report(logged(4000), IPS(), SNIPS(), DoublyRobust(), reward_model=ItemMeans())
    for estimate in found.estimates:
        assert estimate.diagnostics.verdict == "trust"
        assert estimate.interval is not None
        assert estimate.interval.low < value_of(TARGET) < estimate.interval.high
        assert estimate.interval.method == "delta"
    assert found.logged_value == pytest.approx(value_of(LOGGING), abs=0.03)
    assert (found.requests, found.users, found.propensities) == (4000, 4000, "logged")


def test_a_biased_estimator_has_a_value_and_no_interval() -> None:
    (estimate,) = report(logged(2000), DirectMethod(), reward_model=ItemMeans()).estimates
    assert estimate.value is not None
    assert estimate.interval is None
    assert estimate.reason is not None
    assert estimate.reason.startswith("biased: its error is the reward model's")


def test_the_known_logging_policy_brings_more() -> None:
    log = logged(2000)
    groups = torch.arange(ITEMS + 1) % 2
    found = report(log, ExponentialSmoothing(alpha=0.9), MarginalizedIPS(), logging=LOGGING, groups=groups)
    smoothed, grouped = found.estimates
    assert smoothed.interval is not None
    assert smoothed.interval.method == "pac_bayes"
    assert smoothed.interval.low < value_of(TARGET) < smoothed.interval.high
    assert grouped.value == pytest.approx(value_of(TARGET), abs=0.1)
    assert grouped.assumes == "an item earns what its group earns"
    assert grouped.diagnostics.ess > report(log, IPS()).estimates[0].diagnostics.ess
    (unknown,) = report(log, ExponentialSmoothing(alpha=0.9)).estimates
    assert unknown.interval is None
    assert unknown.reason is not None
    assert unknown.reason.startswith("biased: propensities are raised to 0.9")
    with pytest.raises(DataError, match="needs the logging policy and the groups"):
        report(log, MarginalizedIPS(), groups=groups)


def test_slates() -> None:
    log = logged(20_000, slots=2)
    estimators = (IPS(), SNIPS(), RewardInteractionIPS(), RewardInteractionIPS(self_normalized=True), CascadeDR())
    found = report(log, *estimators, reward_model=ItemMeans(), interval=Bootstrap(samples=200))
    items = CATALOG.items_of(0)
    drawn = sample(
        TARGET.policy, TARGET.scores(torch.zeros(200_000).long(), items), 2, torch.Generator().manual_seed(9)
    )
    truth = float(EARNS[items[drawn.slates]].sum(1).mean())
    for estimate in found.estimates:
        assert estimate.interval is not None
        assert estimate.interval.low < truth < estimate.interval.high
    names = [estimate.estimator for estimate in found.estimates]
    assert names == ["ips", "snips", "rips", "rips[self_normalized=1]", "cascade_dr"]
    width = {e.estimator: e.interval.high - e.interval.low for e in found.estimates if e.interval}
    assert width["rips"] < width["ips"]
    assert width["cascade_dr"] < width["rips"]


def test_independent_with_drawn_marginals() -> None:
    log = logged(3000, slots=2)
    with pytest.raises(DataError, match="the log has no marginals"):
        report(log, IndependentIPS(), marginal_draws=20)
    # The log's marginals, exact: the second position is a sum over what may stand above.
    items = CATALOG.items_of(0)
    scores = LOGGING.scores(torch.zeros(1).long(), items)
    slates = torch.cartesian_prod(torch.arange(ITEMS), torch.arange(ITEMS))
    slates = slates[slates[:, 0] != slates[:, 1]]
    joint = LOGGING.policy.log_probs(scores.expand(len(slates), -1), slates).sum(1).exp()
    place = torch.stack([torch.zeros(ITEMS).double().index_add(0, slates[:, slot], joint) for slot in (0, 1)])
    marginal = place.numpy()[np.arange(2)[None], log.items - 1]
    found = report(replace(log, marginal=marginal), IndependentIPS(), RewardInteractionIPS(), marginal_draws=20)
    independent, rips = found.estimates
    assert independent.value == pytest.approx(rips.value, abs=0.05)
    assert independent.assumes == "the reward at a position depends on the item there alone"


def test_a_fitted_propensity_gets_no_interval() -> None:
    (estimate,) = report(replace(logged(1000), propensities="item_frequency"), SNIPS()).estimates
    assert estimate.interval is None
    assert estimate.reason is not None
    assert "fitted model (item_frequency)" in estimate.reason


def test_what_the_log_cannot_show_is_refused() -> None:
    barred = torch.arange(ITEMS + 1).double()
    barred[6] = -torch.inf
    never = Candidate("never six", PlackettLuce(temperature=3.0), ItemScores(barred))
    log = logged(3000, policy=never)
    for options in ({}, {"logging": never}):
        (estimate,) = report(log, IPS(), **options).estimates
        assert estimate.value is None
        assert estimate.interval is None
        assert estimate.reason is not None
        assert estimate.reason.startswith("do not use: ")
        assert "of the target policy is on items the log" in estimate.reason


def test_a_log_of_a_deterministic_policy_is_refused() -> None:
    with pytest.raises(DataError, match="deterministic policy"):
        logged(10, policy=Candidate("best", EpsilonGreedy(epsilon=0.0), TARGET.scores))


def test_domains_are_reported_apart() -> None:
    catalog = Catalog(("a", "b"), torch.tensor([-1, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.int64))
    items = np.array([[1], [2], [3], [4]] * 100)
    log = make_log(
        items,
        np.full((400, 1), 0.5),
        {"click": (items == 1).astype(float)},
        4,
        domain_names=("a", "b"),
        domain=np.array([0, 0, 1, 1] * 100),
    )
    uniform = Candidate("uniform", PlackettLuce(), ItemScores(torch.zeros(5)))
    found = evaluate(log, uniform, catalog, EvaluateConfig(estimators=(IPS(),)))
    assert [(estimate.domain, estimate.value) for estimate in found.estimates] == [(None, 0.25), ("a", 0.5), ("b", 0.0)]
    assert found.table()["domain"].tolist() == ["all", "a", "b"]


def test_as_a_table_and_as_json() -> None:
    found = report(logged(500), IPS(), DirectMethod(), reward_model=ItemMeans())
    table = found.table()
    assert table["estimator"].tolist() == ["ips", "dm"]
    assert np.isnan(table["low"][1])
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["estimates"][0]["interval"]["level"] == 0.95
    assert values["estimates"][0]["diagnostics"]["quantiles"].keys() == {"0.5", "0.9", "0.99", "0.999"}
    assert values["estimates"][1]["interval"] is None


def test_the_same_seed_gives_the_same_report() -> None:
    log = logged(300)
    first = report(log, DoublyRobust(), reward_model=ItemMeans(), interval=Bootstrap())
    assert first == report(log, DoublyRobust(), reward_model=ItemMeans(), interval=Bootstrap())
    other = report(log, DoublyRobust(), reward_model=ItemMeans(), interval=Bootstrap(), seed=1)
    assert first.estimates[0].value != other.estimates[0].value


def test_config() -> None:
    values = {
        "estimators": [{"name": "rips", "self_normalized": True}, {"name": "clipped", "cap": 5}],
        "interval": {"name": "empirical_bernstein", "range": 20},
        "reward": {"click": 1, "like": 3},
        "reward_model": {"name": "item_means"},
    }
    config = parse_config(values, EvaluateConfig, "evaluate.yaml")
    assert config.estimators[0] == RewardInteractionIPS(self_normalized=True)
    assert config.reward_model == ItemMeans()
    with pytest.raises(ConfigError, match="did you mean clipped"):
        parse_config({"estimators": [{"name": "cliped"}]}, EvaluateConfig, "evaluate.yaml")
