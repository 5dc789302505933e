"""Evidence gathered in pieces equals evidence computed in one, and refuses what it cannot speak of."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from offpolicy_world import RequestScores, TableRewards, make_log, single_domain
from torch import Tensor

from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.offpolicy import evidence as module
from recsys.offpolicy.candidates import Candidate, HistoryScores, ItemScores
from recsys.offpolicy.evidence import Evidence, gather
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.policies import Categorical, EpsilonGreedy, PlackettLuce, sample
from recsys.offpolicy.rewards import ItemMeans
from recsys.types import Batch, Catalog

DOMAINS = torch.tensor([-1, 0, 1, 0, 1, 0, 1, 0])  # items 1 3 5 7, and 2 4 6
CATALOG = Catalog(("a", "b"), DOMAINS, torch.zeros(8, dtype=torch.int64))
N = 9
SCORES = torch.randn((N, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MODEL = torch.rand((N, 2, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CANDIDATE = Candidate("drawn", PlackettLuce(epsilon=0.1), RequestScores(SCORES))
LOGGING = Candidate("logging", PlackettLuce(temperature=2.0), RequestScores(-SCORES))


def two_domains(slots: int) -> LoggedFeedback:
    domain = np.arange(N) % 2
    generator = torch.Generator().manual_seed(3)
    items, propensity = np.zeros((N, slots), dtype=np.int64), np.zeros((N, slots))
    for row in range(N):
        candidates = CATALOG.items_of(int(domain[row]))
        drawn = sample(LOGGING.policy, -SCORES[[row]][:, candidates], slots, generator)
        items[row], propensity[row] = candidates[drawn.slates[0]], drawn.log_probs[0].exp()
    reward = np.random.default_rng(0).random((N, slots))
    return make_log(items, propensity, {"click": reward}, 7, domain_names=("a", "b"), domain=domain)


def gathered(log: LoggedFeedback, **options: object) -> Evidence:
    return gather(log, CANDIDATE, CATALOG, log.rewards["click"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [1, 2])
def test_row_by_row(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = two_domains(slots)
    model = TableRewards(MODEL)
    whole = gathered(log, reward_model=model, logging=LOGGING)
    monkeypatch.setattr(module, "_CELLS", 8)  # two requests of four candidates at a time
    pieces = gathered(log, reward_model=model, logging=LOGGING)
    for name in ("target", "direct", "predicted", "unsupported"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), atol=1e-15)
    assert whole.direct is not None
    assert whole.predicted is not None
    for row in range(N):
        candidates = CATALOG.items_of(int(log.domain[row]))
        shown = [candidates.tolist().index(item) for item in log.items[row]]
        for slot in range(slots):
            above = torch.tensor([shown[:slot]], dtype=torch.int64)
            following = CANDIDATE.policy.next(SCORES[[row]][:, candidates], above)[0]
            values = MODEL[row, slot, candidates]
            assert whole.target[row, slot] == pytest.approx(float(following[shown[slot]]))
            assert whole.direct[row, slot] == pytest.approx(float((following * values).sum()))
            assert whole.predicted[row, slot] == pytest.approx(float(values[shown[slot]]))
    np.testing.assert_array_equal(whole.unsupported, 0)
    assert whole.support_known


def test_the_log_of_its_own_policy_has_weights_of_one() -> None:
    log = two_domains(2)
    evidence = gather(log, LOGGING, CATALOG, log.rewards["click"])
    np.testing.assert_allclose(evidence.cascade_weights, 1)
    np.testing.assert_allclose(evidence.weights, 1)
    np.testing.assert_allclose(evidence.total, log.rewards["click"].sum(1))


def test_what_was_not_asked_for_is_none() -> None:
    evidence = gathered(two_domains(2))
    assert evidence.direct is evidence.predicted is evidence.target_marginal is evidence.group is None
    assert not evidence.support_known
    assert not evidence.smoothed
    one = gathered(two_domains(1))
    np.testing.assert_array_equal(one.target_marginal, one.target)
    np.testing.assert_array_equal(one.marginal, one.propensity)


def test_marginals_are_drawn() -> None:
    log = two_domains(2)
    found = gathered(log, marginal_draws=600, generator=torch.Generator().manual_seed(0)).target_marginal
    assert found is not None
    for row in range(N):
        candidates = CATALOG.items_of(int(log.domain[row]))
        slates = torch.tensor(list(itertools.permutations(range(len(candidates)), 2)))
        joint = CANDIDATE.policy.log_probs(SCORES[[row]][:, candidates].expand(len(slates), -1), slates).sum(1).exp()
        at_second = joint[candidates[slates[:, 1]] == int(log.items[row, 1])].sum()
        assert found[row, 1] == pytest.approx(float(at_second), rel=0.15)


def test_sums_over_all_candidates() -> None:
    log = two_domains(1)
    groups = torch.tensor([9, 0, 0, 0, 1, 1, 0, 1])
    evidence = gathered(log, logging=LOGGING, groups=groups, alphas=(0.7,))
    assert evidence.group is not None
    assert evidence.target_group is not None
    for row in range(N):
        candidates = CATALOG.items_of(int(log.domain[row]))
        nothing = torch.empty((1, 0), dtype=torch.int64)
        target = CANDIDATE.policy.next(SCORES[[row]][:, candidates], nothing)[0]
        logged = LOGGING.policy.next(-SCORES[[row]][:, candidates], nothing)[0]
        same = groups[candidates] == groups[log.items[row, 0]]
        assert evidence.target_group[row] == pytest.approx(float(target[same].sum()))
        assert evidence.group[row] == pytest.approx(float(logged[same].sum()))
        assert evidence.smoothed[0.7].overlap[row] == pytest.approx(float((target * logged**0.3).sum()))
        assert evidence.smoothed[0.7].spread[row] == pytest.approx(float((target * logged**-0.4).sum()))


def test_some_of_the_requests() -> None:
    evidence = gathered(two_domains(1), logging=LOGGING, alphas=(0.7,))
    part = evidence.take(np.array([4, 1]))
    assert part.target.tolist() == evidence.target[[4, 1]].tolist()
    assert part.smoothed[0.7].spread.tolist() == evidence.smoothed[0.7].spread[[4, 1]].tolist()
    assert (part.direct, part.support_known) == (None, True)


def one_domain_log(items: list[int], propensity: float = 0.5) -> LoggedFeedback:
    shown = np.array(items)[:, None]
    return make_log(shown, np.full(shown.shape, propensity), {"click": np.ones(shown.shape)}, 4)


ONE = Catalog(("one",), single_domain(4), torch.zeros(5, dtype=torch.int64))
WEIGHTS = ItemScores(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))


def test_the_gap_in_the_support() -> None:
    log = one_domain_log([1, 2, 2])
    target = Candidate("by weight", Categorical(), WEIGHTS)
    never_shown = gather(log, target, ONE, log.rewards["click"])
    np.testing.assert_allclose(never_shown.unsupported, 0.7)
    assert not never_shown.support_known
    half = Candidate("half", Categorical(), ItemScores(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])))
    known = gather(log, target, ONE, log.rewards["click"], logging=half, alphas=(1.0,))
    np.testing.assert_allclose(known.unsupported, 0.4)
    assert known.support_known
    np.testing.assert_allclose(known.smoothed[1.0].overlap, 0.6)  # what the log cannot show is no overlap
    np.testing.assert_allclose(known.smoothed[1.0].spread, 0.6 * 3)


def test_a_deterministic_target_is_a_policy_too() -> None:
    log = one_domain_log([1, 4, 4])
    evidence = gather(log, Candidate("best", EpsilonGreedy(epsilon=0.0), WEIGHTS), ONE, log.rewards["click"])
    assert evidence.weights.tolist() == [0, 2, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers(bad: float) -> None:
    log = one_domain_log([1, 2])
    scores = torch.tensor([0.0, 1.0, bad, 3.0, 4.0])
    with pytest.raises(DataError, match="broken gives no finite score to 1 items in row 0"):
        gather(log, Candidate("broken", PlackettLuce(), ItemScores(scores)), ONE, log.rewards["click"])


def test_items_of_another_domain() -> None:
    log = two_domains(1)
    other = replace(log, domain=1 - log.domain)
    with pytest.raises(DataError, match=r"9 problems\n  request 0 asks for b and shows item \d, which is not of that"):
        gather(other, CANDIDATE, CATALOG, log.rewards["click"])
    with pytest.raises(DataError, match="take the catalogue that the log was made with"):
        gather(log, CANDIDATE, ONE, log.rewards["click"])


class LastItem:
    """Scores the item after the last one of the history, and shows what it was asked."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        self.batches.append(batch)
        return (items[None] == batch.items[:, -1:] + 1).float()


def test_a_history_ends_before_the_request() -> None:
    sequences = Sequences.pack(
        items=[1, 2, 3, 4, 2], domains=[0, 1, 0, 1, 1], times=[10, 20, 30, 1000, 5], offsets=[0, 4, 5],
        domain_names=("a", "b"), item_domain=[-1, 0, 1, 0, 1],
    )  # fmt: skip
    log = make_log(
        np.array([[2], [4], [3]]), np.full((3, 1), 0.5), {"click": np.ones((3, 1))}, 4,
        domain_names=("a", "b"), domain=np.array([1, 1, 0]), user=np.array([0, 0, 1]),
    )  # fmt: skip  # times 1000, 1001, 1002
    scorer = LastItem()
    scores = HistoryScores(scorer, sequences, log, max_len=3)
    found = scores(torch.tensor([0, 1]), torch.tensor([2, 4]))
    assert found.tolist() == [[0, 1], [0, 0]]  # the event at 1000 is not yet known at 1000
    (batch,) = scorer.batches
    assert batch.items.tolist() == [[1, 2, 3], [2, 3, 4]]
    assert batch.target_domains.tolist() == [[-1, -1, 1], [-1, -1, 1]]
    assert batch.user.tolist() == [0, 0]
    scores(torch.tensor([2, 0]), torch.tensor([1, 3]))
    padded = scorer.batches[1]
    assert padded.items.tolist() == [[1, 2, 3], [0, 0, 2]]
    assert padded.domains.tolist() == [[0, 1, 0], [-1, -1, 1]]
    assert padded.times.tolist() == [[10, 20, 30], [0, 0, 5]]
    assert padded.targets.tolist() == [[0, 0, 0], [0, 0, 0]]
    repeated = scores(torch.tensor([1, 0, 1]), torch.tensor([2, 4]))
    assert repeated.tolist() == [found[1].tolist(), found[0].tolist(), found[1].tolist()]
    assert len(scorer.batches[2].user) == 2, "a history is scored once"
    with pytest.raises(DataError, match=r"3 requests come before their user's first event"):
        HistoryScores(scorer, sequences, replace(log, time=np.zeros(3, dtype=np.int64)), max_len=3)
    with pytest.raises(DataError, match=r"users outside 0\.\.1"):
        HistoryScores(scorer, sequences, replace(log, user=np.array([0, 1, 2])), max_len=3)


def test_item_means_predict_a_user_from_the_others() -> None:
    reward = np.array([[1.0], [0.0], [1.0], [0.0]])
    log = make_log(
        np.array([[1], [1], [2], [2]]), np.full((4, 1), 0.5), {"click": reward}, 3, user=np.array([0, 0, 1, 1])
    )
    fitted = ItemMeans(smoothing=2.0, folds=2).fit(log, reward, np.random.default_rng(0))
    changed = reward.copy()
    changed[:2] = 7.0  # rewards of user 0 do not reach user 0's predictions
    other = ItemMeans(smoothing=2.0, folds=2).fit(log, changed, np.random.default_rng(0))
    requests, items = torch.tensor([0, 1]), torch.tensor([1, 2, 3])
    assert torch.equal(fitted.predict(requests, 0, items), other.predict(requests, 0, items))
    assert not torch.equal(fitted.predict(torch.tensor([2]), 0, items), other.predict(torch.tensor([2]), 0, items))
    np.testing.assert_allclose(fitted.predict(requests, 0, items), 0.5)  # the position's mean, of user 1


def test_item_means_by_hand() -> None:
    reward = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    items = np.array([[1, 2], [2, 1], [1, 2], [1, 2]])
    log = make_log(items, np.full((4, 2), 0.5), {"click": reward}, 2, user=np.array([0, 1, 1, 1]))
    fitted = ItemMeans(smoothing=1.0, folds=2).fit(log, reward, np.random.default_rng(0))
    # Request 0 from user 1: positions earn 2/3 and 1/3; item 1 is 1/3, 1/3 and 2/3 above that, item 2 as far below.
    np.testing.assert_allclose(
        fitted.predict(torch.tensor([0]), 1, torch.tensor([1, 2])), [[1 / 3 + 1 / 3, 0]], atol=1e-15
    )
    np.testing.assert_allclose(fitted.predict(torch.tensor([0]), 0, torch.tensor([1])), [[2 / 3 + 1 / 3 + 1 / 3]])
