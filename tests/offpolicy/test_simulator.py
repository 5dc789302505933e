"""Simulated users: click models against enumeration, the parts of attraction, logs whose truth is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.data.batches import make_catalog
from recsys.data.schema import DataError
from recsys.data.split import TEST, VALID, LeaveOneOut, make_split
from recsys.data.synthetic import SyntheticConfig, generate
from recsys.offpolicy.candidates import Candidate, ItemScores, Requests
from recsys.offpolicy.estimators import IPS, SNIPS
from recsys.offpolicy.evaluate import EvaluateConfig, evaluate
from recsys.offpolicy.policies import PlackettLuce, sample
from recsys.offpolicy.simulator import (
    Cascade,
    PositionBased,
    SimulatorConfig,
    UserSimulator,
    item_vectors,
    make_requests,
    offer,
    simulate,
    true_value,
)
from recsys.offpolicy.slates import IndependentIPS, RewardInteractionIPS

SEQUENCES = generate(SyntheticConfig(num_users=200, items_per_domain=60, mean_events=15, max_events=30)).sequences
SPLIT = make_split(SEQUENCES, LeaveOneOut())
CATALOG = offer(make_catalog(SEQUENCES, SPLIT), 8)
REQUESTS, FOLLOWING = make_requests(SEQUENCES, SPLIT, 2000, np.random.default_rng(0))
UNIFORM = Candidate("uniform", PlackettLuce(), ItemScores(torch.zeros(SEQUENCES.num_items + 1)))
SKEWED = Candidate("skewed", PlackettLuce(), ItemScores(torch.arange(SEQUENCES.num_items + 1).double() % 5 / 3))


def users(**options: object) -> UserSimulator:
    config = SimulatorConfig(dimensions=8, most=0.9, **options)  # type: ignore[arg-type]
    return UserSimulator(config, SEQUENCES, CATALOG, REQUESTS, FOLLOWING)


def some(domain: int, count: int = 50) -> tuple[Tensor, Tensor]:
    """Rows that ask for a domain, and the items on offer."""
    rows = torch.from_numpy(np.flatnonzero(REQUESTS.domain == domain)[:count])
    return rows, CATALOG.items_of(domain)


def test_expected_clicks_are_those_of_every_way_to_read_a_slate() -> None:
    a = [0.5, 0.2, 0.8]
    model = Cascade(persistence=0.9, appetite=0.25)
    found = [0.0] * 3
    for clicks, stays in itertools.product(itertools.product((0, 1), repeat=3), itertools.product((0, 1), repeat=3)):
        chance, reading = 1.0, True
        for slot in range(3):
            chance *= a[slot] if clicks[slot] else 1 - a[slot]
            on = 0.25 if clicks[slot] else 0.9
            chance *= on if stays[slot] else 1 - on
        for slot in range(3):
            if reading and clicks[slot]:
                found[slot] += chance
            reading = reading and bool(stays[slot])
    assert model.expected(torch.tensor([a], dtype=torch.float64))[0].tolist() == pytest.approx(found)
    by_place = PositionBased(decay=1.0).expected(torch.tensor([a], dtype=torch.float64))
    assert by_place[0].tolist() == pytest.approx([0.5, 0.1, 0.8 / 3])


@pytest.mark.parametrize("model", [Cascade(), Cascade(appetite=0.0), PositionBased(decay=0.5)])
def test_drawn_clicks_have_their_expectation(model: Cascade | PositionBased) -> None:
    attraction = torch.tensor([[0.3, 0.6, 0.5]], dtype=torch.float64).expand(10_000, -1)
    clicks = model.draw(attraction, torch.Generator().manual_seed(0))
    assert set(clicks.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(clicks.mean(0), model.expected(attraction)[0], atol=0.025, rtol=0)


def test_a_user_likes_what_comes_next() -> None:
    simulator = users(memory=0.0)
    rows, _ = some(0)
    following = torch.from_numpy(SEQUENCES.items[FOLLOWING[rows.numpy()]].astype(np.int64))
    found = simulator.attraction(rows, following).diagonal()
    torch.testing.assert_close(found, torch.full_like(found, 0.9))


def test_requests_stand_before_held_out_events_in_the_order_of_time() -> None:
    assert ((SPLIT.role[FOLLOWING] == TEST) | (SPLIT.role[FOLLOWING] == VALID)).all()
    assert (np.diff(REQUESTS.time) >= 0).all()
    assert (SEQUENCES.times[FOLLOWING] == REQUESTS.time).all()
    assert (SEQUENCES.domains[FOLLOWING] == REQUESTS.domain).all()


def test_switching_costs_its_share() -> None:
    rows, items = some(0, 500)
    free, dear = users().attraction(rows, items), users(switch_cost=0.25).attraction(rows, items)
    switched = torch.from_numpy(SEQUENCES.domains[FOLLOWING[rows.numpy()] - 1] != 0)
    assert switched.any()
    assert not switched.all()
    torch.testing.assert_close(dear[switched], free[switched] * 0.75)
    torch.testing.assert_close(dear[~switched], free[~switched])


def test_fatigue_is_of_what_resembles_an_item_above() -> None:
    rows, items = some(1)
    slates = items[:4].expand(len(rows), -1)
    fresh = users(click=PositionBased(decay=0.0)).expected(rows, slates)
    tired = users(click=PositionBased(decay=0.0), fatigue=0.5).expected(rows, slates)
    torch.testing.assert_close(tired[:, 0], fresh[:, 0])
    vectors = users().vectors[items[:4]]
    alike = (vectors[2] @ vectors[:2].T).clamp(min=0).max()
    torch.testing.assert_close(tired[:, 2], fresh[:, 2] * (1 - 0.5 * alike))


def test_drift_leaves_the_first_request_and_changes_the_last() -> None:
    still, moving = users(), users(drift=0.5)
    for row, changes in ((0, False), (len(REQUESTS.user) - 1, True)):
        rows, items = torch.tensor([row]), CATALOG.items_of(int(REQUESTS.domain[row]))
        ratio = moving.attraction(rows, items) / still.attraction(rows, items)
        assert bool((ratio != 1).any()) is changes


def test_what_is_on_offer_is_what_was_seen_most() -> None:
    whole = make_catalog(SEQUENCES, SPLIT)
    for domain in (0, 1):
        kept, items = CATALOG.items_of(domain), whole.items_of(domain)
        assert len(kept) == 8
        left_out = items[~torch.isin(items, kept)]
        assert whole.train_counts[kept].min() >= whole.train_counts[left_out].max()
    assert offer(whole, None) is whole


def test_item_vectors_are_unit_and_do_not_know_popularity_alone() -> None:
    vectors = item_vectors(SEQUENCES, 8)
    taken = np.bincount(SEQUENCES.items, minlength=SEQUENCES.num_items + 1) > 0
    assert np.linalg.norm(vectors[taken], axis=1) == pytest.approx(np.ones(taken.sum()))
    assert (vectors[~taken] == 0).all()
    assert abs((vectors[taken] @ vectors[taken].T).mean()) < 0.1
    with pytest.raises(DataError, match=r"lower simulator\.dimensions"):
        item_vectors(SEQUENCES, 500)


def test_the_truth_of_one_slot_is_what_many_draws_give() -> None:
    simulator = users(click=PositionBased())
    exact = true_value(simulator, SKEWED, 1, 2, torch.Generator())
    assert exact.error == 0
    generator = torch.Generator().manual_seed(1)
    drawn = np.mean([simulate(simulator, SKEWED, 1, generator).rewards["click"].mean() for _ in range(10)])
    assert drawn == pytest.approx(exact.value, abs=4 * np.sqrt(exact.value / 20_000))


@pytest.mark.parametrize("slots", [1, 3])
def test_estimates_on_a_simulated_log_hold_the_truth(slots: int) -> None:
    simulator = users(click=Cascade(), fatigue=0.3, drift=0.1, switch_cost=0.1)
    log = simulate(simulator, UNIFORM, slots, torch.Generator().manual_seed(2))
    config = EvaluateConfig(estimators=(IPS(), SNIPS(), RewardInteractionIPS()))
    report = evaluate(log, SKEWED, CATALOG, config, logging=UNIFORM)
    truth = true_value(simulator, SKEWED, slots, 8, torch.Generator().manual_seed(3))
    for estimate in report.estimates:
        if estimate.domain is None:
            assert estimate.interval is not None
            assert estimate.interval.low < truth.value < estimate.interval.high


def test_logged_marginals_serve_the_independent_estimator() -> None:
    simulator = users(click=PositionBased())
    log = simulate(simulator, SKEWED, 2, torch.Generator().manual_seed(4), marginal_draws=10)
    assert log.marginal is not None
    np.testing.assert_allclose(log.marginal[:, 0], log.propensity[:, 0])
    config = EvaluateConfig(estimators=(IndependentIPS(),), marginal_draws=5)
    (estimate, *_) = evaluate(log, UNIFORM, CATALOG, config).estimates
    truth = true_value(simulator, UNIFORM, 2, 10, torch.Generator().manual_seed(5))
    assert estimate.value == pytest.approx(truth.value, abs=0.05)
    assert simulate(simulator, SKEWED, 2, torch.Generator()).marginal is None


def test_the_error_of_the_truth_is_that_of_its_draws() -> None:
    simulator = users()
    found = [true_value(simulator, SKEWED, 2, 2, torch.Generator().manual_seed(seed)) for seed in range(12)]
    spread = np.std([truth.value for truth in found], ddof=1)
    assert np.mean([truth.error for truth in found]) == pytest.approx(spread, rel=0.6)


def test_too_few_items_for_a_slate_are_refused() -> None:
    with pytest.raises(DataError, match="offers 8 items, which fill no slate of 9"):
        simulate(users(), UNIFORM, 9, torch.Generator())


def test_the_same_seed_makes_the_same_log() -> None:
    first, again = (simulate(users(), UNIFORM, 2, torch.Generator().manual_seed(7)) for _ in range(2))
    assert (first.items == again.items).all()
    assert (first.rewards["click"] == again.rewards["click"]).all()


def test_fatigue_enters_through_what_was_drawn() -> None:
    """The propensities of a log do not depend on the users, only on the policy."""
    log = simulate(users(fatigue=0.9), SKEWED, 2, torch.Generator().manual_seed(8))
    rows = torch.from_numpy(np.flatnonzero(REQUESTS.domain == 0))
    items = CATALOG.items_of(0)
    slates = CATALOG.local_index[torch.from_numpy(log.items)[rows]]
    expected = SKEWED.policy.log_probs(SKEWED.scores(rows, items), slates).exp()
    np.testing.assert_allclose(log.propensity[rows.numpy()], expected.numpy())
    assert sample(SKEWED.policy, SKEWED.scores(rows, items), 2, torch.Generator()).slates.shape == slates.shape


def test_a_request_needs_a_past() -> None:
    first = SEQUENCES.offsets[:-1]
    times = SEQUENCES.times.copy()
    times[:] = 5
    with pytest.raises(DataError, match="no event with a history"):
        make_requests(replace(SEQUENCES, times=times), SPLIT, 10, np.random.default_rng(0))
    assert not np.isin(FOLLOWING, first).any()
    assert isinstance(REQUESTS, Requests)
