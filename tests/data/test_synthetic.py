import cProfile
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from recsys.data.sequences import Sequences
from recsys.data.synthetic import Synthetic, SyntheticConfig, Truth, generate
from recsys.loading import ConfigError, parse_config


def config(**changes: object) -> SyntheticConfig:
    return parse_config({"name": "synthetic", "num_users": 1000, "mean_events": 25} | changes, SyntheticConfig, "test")


@dataclass(frozen=True)
class Dial:
    """Data at one dial, and what the oracles say about every user's last three events."""

    synthetic: Synthetic
    positions: np.ndarray
    others: np.ndarray
    """Log-probabilities of all items, with what was taken in the other domains."""
    own: np.ndarray
    """The same without."""

    @classmethod
    def at(cls, transfer: float) -> "Dial":
        synthetic = generate(config(transfer=transfer))
        positions = last_events(synthetic.sequences, 3)
        others, own = (synthetic.truth.log_probs(positions, others=others) for others in (True, False))
        return cls(synthetic, positions, others, own)

    @property
    def targets(self) -> np.ndarray:
        return self.synthetic.sequences.items[self.positions]

    def of_target(self, log_probs: np.ndarray) -> np.ndarray:
        return log_probs[np.arange(len(log_probs)), self.targets]

    def ndcg(self, log_probs: np.ndarray) -> np.ndarray:
        return 1 / np.log2(2 + (log_probs > self.of_target(log_probs)[:, None]).sum(axis=1))


@pytest.fixture(scope="module")
def dials() -> dict[float, Dial]:
    return {transfer: Dial.at(transfer) for transfer in (0.0, 0.3, 1.0)}


def last_events(sequences: Sequences, count: int) -> np.ndarray:
    """The last `count` events of every user."""
    return (sequences.offsets[1:, None] - np.arange(1, count + 1)).ravel()


def domains_per_user(sequences: Sequences) -> np.ndarray:
    active = np.zeros((sequences.num_users, sequences.num_domains), dtype=int)
    active[sequences.event_users(), sequences.domains] = 1
    return active.sum(axis=1)


# The dial


def test_without_transfer_the_other_domains_tell_nothing(dials: dict[float, Dial]) -> None:
    np.testing.assert_allclose(dials[0.0].others, dials[0.0].own, rtol=0, atol=1e-9)


def test_with_transfer_the_other_domains_tell_something_and_more_with_more(dials: dict[float, Dial]) -> None:
    means = []
    for transfer, dial in dials.items():
        gain = dial.of_target(dial.others) - dial.of_target(dial.own)
        ranking = dial.ndcg(dial.others) - dial.ndcg(dial.own)
        means.append((gain.mean(), ranking.mean()))
        if transfer > 0:
            for difference in (gain, ranking):  # paired, over events
                assert difference.mean() > 4 * difference.std() / np.sqrt(len(difference))
    assert means[0][0] == pytest.approx(0, abs=1e-9)
    assert means[1][0] > 0.03
    assert means[2][0] > 1.5 * means[1][0]
    assert means[2][1] > means[1][1] > means[0][1]


def test_users_of_one_domain_gain_nothing_at_any_dial(dials: dict[float, Dial]) -> None:
    dial = dials[1.0]
    alone = np.repeat(domains_per_user(dial.synthetic.sequences) == 1, 3)
    assert alone.sum() == 600
    np.testing.assert_allclose(dial.others[alone], dial.own[alone], rtol=0, atol=1e-9)
    assert (dial.others[~alone] != dial.own[~alone]).any()


def test_the_own_history_tells_much_at_every_dial(dials: dict[float, Dial]) -> None:
    for dial in dials.values():
        popularity = np.log(dial.synthetic.truth.appeal.mean(axis=1)[dial.targets])  # the law of a user's first item
        assert (dial.of_target(dial.own) - popularity).mean() > 0.5
    # and with the whole history the next item is about as hard to tell
    whole = [dial.of_target(dial.others).mean() for dial in dials.values()]
    assert max(whole) - min(whole) < 0.25


def test_the_dial_leaves_the_rest_alone() -> None:
    low, high = (generate(config(transfer=transfer, num_users=20_000)) for transfer in (0.0, 1.0))
    for name in ("offsets", "domains", "times", "item_domain"):
        assert np.array_equal(getattr(low.sequences, name), getattr(high.sequences, name))
    assert np.array_equal(low.truth.item_vectors, high.truth.item_vectors)
    assert low.sequences.fingerprint != high.sequences.fingerprint
    for synthetic in (low, high):
        interests = synthetic.truth.interests
        share = np.bincount(interests) / len(interests)
        np.testing.assert_allclose(share, 1 / synthetic.truth.config.num_interests, atol=0.003)


# The oracle is the law of the data


def by_enumeration(truth: Truth, others: bool, position: int) -> np.ndarray:
    """P(item of the event | history) of user 0 by the definition: a sum over all that could have happened.

    Over every initial interest, every change at every event and, without the others, every item taken elsewhere.
    """
    setting, sequences = truth.config, truth.sequences
    size, shared, count = setting.num_interests, setting.shared_interests, setting.items_per_domain
    domains = sequences.domains[: position + 1].tolist()
    own = domains[position]
    known = [others or domain == own for domain in domains[:-1]]
    choices = [
        [int(item)] if known_ else range(1 + domain * count, 1 + (domain + 1) * count)
        for item, domain, known_ in zip(sequences.items[:position], domains, known, strict=False)
    ]
    paths: list[tuple[float, list[int]]] = []  # every interest path with its probability
    for start in product(range(size), repeat=sequences.num_domains):
        partial = [(float(size) ** -sequences.num_domains, list(start), [])]
        for step, domain in enumerate(domains):
            elsewhere = [before for before in domains[:step] if before != domain]
            following = []
            for chance, held, path in partial:
                outcomes = [(setting.drift / size, interest) for interest in range(size)]
                keep = 1 - setting.drift
                if elsewhere and held[domain] < shared and held[elsewhere[-1]] < shared:
                    outcomes.append((keep * setting.transfer, held[elsewhere[-1]]))
                    keep *= 1 - setting.transfer
                outcomes.append((keep, held[domain]))
                for share, interest in outcomes:
                    now = [*held]
                    now[domain] = interest
                    following.append((chance * share, now, [*path, interest]))
            partial = following
        paths += [(chance, path) for chance, _, path in partial]
    merged: dict[tuple[int, ...], float] = {}
    for chance, path in paths:
        merged[tuple(path)] = merged.get(tuple(path), 0.0) + chance

    total = np.zeros(sequences.num_items + 1)
    last = np.flatnonzero(sequences.item_domain == own)
    for past in product(*choices):
        for path, chance in merged.items():
            for step, item in enumerate(past):
                gone = [earlier for earlier in past[:step] if sequences.item_domain[earlier] == domains[step]]
                if item in gone:
                    chance = 0.0
                chance *= truth.appeal[item, path[step]] / (1 - truth.appeal[gone, path[step]].sum())
            gone = [item for item in past if sequences.item_domain[item] == own]
            left = [item for item in last if item not in gone]
            total[left] += chance * truth.appeal[left, path[-1]] / truth.appeal[left, path[-1]].sum()
    return total / total.sum()


@pytest.mark.parametrize(("num_domains", "seed"), [(2, 0), (2, 1), (3, 3)])
@pytest.mark.parametrize("others", [True, False])
def test_oracles_by_enumeration(num_domains: int, seed: int, others: bool) -> None:
    synthetic = generate(
        config(
            num_users=1,
            num_domains=num_domains,
            items_per_domain=5,
            min_events=4,
            mean_events=4,
            max_events=4,
            overlap=1.0,
            shared_interests=2,
            private_interests=1,
            transfer=0.6,
            temperature=1.0,
            seed=seed,
        )
    )
    assert domains_per_user(synthetic.sequences) == num_domains
    for position in (0, 2, 3):
        expected = by_enumeration(synthetic.truth, others, position)
        given = np.exp(synthetic.truth.log_probs(np.array([position]), others=others))[0]
        np.testing.assert_allclose(given, expected, atol=1e-12)


@pytest.mark.parametrize("num_domains", [1, 2, 3])
def test_interests_change_as_they_should(num_domains: int) -> None:
    setting = config(
        num_domains=num_domains, num_users=2000, drift=0.2, transfer=0.4, shared_interests=4, private_interests=2
    )
    synthetic = generate(setting)
    outcomes: dict[str, list[bool]] = {"adopts": [], "keeps": [], "keeps for itself": []}
    for user in range(setting.num_users):
        held: dict[int, int] = {}
        for position in range(*synthetic.sequences.offsets[user : user + 2]):
            domain, interest = int(synthetic.sequences.domains[position]), int(synthetic.truth.interests[position])
            elsewhere = next((other for other in reversed(held) if other != domain), None)  # the last one shown
            own, other = held.pop(domain, None), None if elsewhere is None else held[elsewhere]
            held[domain] = interest  # at the end of the order
            if own is None:
                continue
            if other is None or max(own, other) >= 4:
                outcomes["keeps for itself"].append(interest == own)
            elif own != other:
                outcomes["adopts"].append(interest == other)
                outcomes["keeps"].append(interest == own)
    fresh = 0.2 / 6
    expected = {"adopts": fresh + 0.8 * 0.4, "keeps": fresh + 0.8 * 0.6, "keeps for itself": fresh + 0.8}
    for name, happened in outcomes.items():
        if num_domains > 1 or name == "keeps for itself":
            assert len(happened) > 2000
            assert np.mean(happened) == pytest.approx(expected[name], abs=0.03)


@pytest.mark.parametrize("num_domains", [1, 2, 3])
@pytest.mark.parametrize("others", [True, False])
def test_data_follow_the_oracles(num_domains: int, others: bool) -> None:
    """Log-likelihoods vary around their own expectations: no predictor but the true one does that everywhere."""
    changes = {"num_domains": num_domains, "shared_interests": 6, "private_interests": 2, "items_per_domain": 150}
    synthetic = generate(config(**changes, transfer=0.8, overlap=1.0, seed=4))
    positions = last_events(synthetic.sequences, 3)
    scores = synthetic.truth.log_probs(positions, others=others)
    probs = np.exp(scores)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-9)
    assert (synthetic.sequences.item_domain[probs.argmax(axis=1)] == synthetic.sequences.domains[positions]).all()
    finite = np.where(probs > 0, scores, 0)
    taken = scores[np.arange(len(positions)), synthetic.sequences.items[positions]]
    surprise = taken - (probs * finite).sum(axis=1)
    assert abs(surprise.mean()) < 4 * surprise.std() / np.sqrt(len(surprise))


def test_positions_may_repeat_and_come_in_any_order(dials: dict[float, Dial]) -> None:
    truth = dials[1.0].synthetic.truth
    positions = np.array([700, 3, 3, 2000, 0])
    for others in (True, False):
        alone = [truth.log_probs(positions[[row]], others=others)[0] for row in range(len(positions))]
        np.testing.assert_allclose(truth.log_probs(positions, others=others), alone, rtol=1e-12)


def test_a_joint_law_too_large_to_hold_is_refused() -> None:
    synthetic = generate(config(num_users=40, num_domains=8, overlap=1.0))
    with pytest.raises(ValueError, match="joint states"):
        synthetic.truth.log_probs(synthetic.sequences.offsets[1:] - 1, others=True)


# The data


def test_the_seed_decides_everything() -> None:
    first, again, other = (generate(config(seed=seed, num_users=50)) for seed in (1, 1, 2))
    assert first.sequences.fingerprint == again.sequences.fingerprint
    assert np.array_equal(first.truth.interests, again.truth.interests)
    assert first.sequences.fingerprint != other.sequences.fingerprint
    assert config(seed=1, num_users=50).sequences(None).fingerprint == first.sequences.fingerprint


@pytest.mark.parametrize("zipf", [0.0, 0.8, 1.2])
def test_popularity_follows_zipf(zipf: float) -> None:
    few = {"num_users": 10_000, "min_events": 2, "mean_events": 3, "max_events": 5}  # so that taken items matter little
    synthetic = generate(config(zipf=zipf, **few))
    appeal, sequences = synthetic.truth.appeal, synthetic.sequences
    expected = np.arange(1, 501) ** -zipf
    expected /= expected.sum()
    for domain in range(2):
        items = np.flatnonzero(sequences.item_domain == domain)
        law = appeal[items].mean(axis=1)
        np.testing.assert_allclose(appeal[items].sum(axis=0), 1)
        np.testing.assert_allclose(np.sort(law)[::-1], expected, rtol=1e-6)
        counts = np.bincount(sequences.items, minlength=1001)[items[np.argsort(-law)]]
        slope = np.polyfit(np.log(np.arange(1, 51)), np.log(counts[:50]), 1)[0]
        assert slope == pytest.approx(-zipf, abs=0.15)


@pytest.mark.parametrize(("num_domains", "overlap"), [(1, 0.7), (2, 0.0), (2, 0.35), (2, 1.0), (4, 0.5)])
def test_the_overlap_is_exact(num_domains: int, overlap: float) -> None:
    sequences = generate(config(num_domains=num_domains, overlap=overlap, num_users=200)).sequences
    active = domains_per_user(sequences)
    expected = overlap if num_domains > 1 else 0
    assert (active > 1).mean() == pytest.approx(expected)
    if num_domains == 4:
        assert set(active.tolist()) == {1, 2, 3, 4}
    assert set(sequences.domains.tolist()) == set(range(num_domains))
    assert sequences.num_domains == num_domains


def test_numbers_of_events() -> None:
    length = np.diff(generate(config(num_users=4000, min_events=5, mean_events=20, max_events=90)).sequences.offsets)
    assert length.min() >= 5
    assert length.max() <= 90
    assert length.mean() == pytest.approx(20, rel=0.05)
    assert length.std() > 5
    for fewest, mean, most in ((7, 7, 7), (7, 7, 9), (7, 9, 9)):
        length = np.diff(
            generate(config(num_users=9, min_events=fewest, mean_events=mean, max_events=most)).sequences.offsets
        )
        assert length.tolist() == [mean] * 9


@pytest.mark.parametrize("tied", [0.0, 0.3, 1.0])
def test_times_ascend_from_2014_on(tied: float) -> None:
    sequences = generate(config(tied=tied)).sequences
    first = np.zeros(len(sequences.times), dtype=bool)
    first[sequences.offsets[:-1]] = True
    gap = np.diff(sequences.times)[~first[1:]]
    assert (gap >= 0).all()
    assert (gap == 0).mean() == pytest.approx(tied, abs=0.02)
    if tied == 0:
        assert gap.min() >= 1
    assert sequences.time_unit == "seconds"
    assert sequences.times.min() >= 1_388_534_400
    assert sequences.times.max() < 1_704_067_200  # 2024


def test_nobody_takes_an_item_twice_and_items_are_grouped_by_domain() -> None:
    crowded = {"items_per_domain": 21, "min_events": 10, "mean_events": 20, "max_events": 20, "zipf": 1.5}
    sequences = generate(config(**crowded, temperature=0.1, drift=0.0)).sequences
    pairs = sequences.event_users() * (sequences.num_items + 1) + sequences.items
    assert len(np.unique(pairs)) == len(pairs)
    assert sequences.num_items == 42
    assert sequences.item_domain.tolist() == [-1] + [0] * 21 + [1] * 21


def test_a_hundred_thousand_events_are_drawn_without_python_per_event() -> None:
    calls = cProfile.Profile()
    sequences = calls.runcall(generate, config(num_users=4000, items_per_domain=1000)).sequences
    assert len(sequences.items) > 95_000
    assert sum(entry.callcount for entry in calls.getstats()) < 20_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": 1.5}, "transfer: input should be less than or equal to 1"),
        ({"min_events": 30, "mean_events": 20}, "put them in ascending order"),
        ({"items_per_domain": 100}, "raise items_per_domain above max_events"),
        ({"min_events": 1}, "raise it to 2"),
        ({"overlapp": 0.5}, "did you mean overlap?"),
    ],
)
def test_bad_configs_say_what_would_do(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
