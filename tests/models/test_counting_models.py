"""Popularity, Markov and item-kNN: scores by hand, degenerate histories, loading."""

import math

import pytest
import torch

from recsys.models import ItemKNNConfig, MarkovConfig, PopularityConfig
from recsys.types import Catalog, TrainingEvents

# Items 1, 2, 3 in domain 0; 4, 5, 6 in domain 1. Item 6 is never seen in training.
CATALOG = Catalog(("a", "b"), torch.tensor([-1, 0, 0, 0, 1, 1, 1]), torch.zeros(7, dtype=torch.int64))
STREAMS = [[1, 4, 2, 5], [1, 4, 3], [4], [2, 5, 2, 5]]
ITEMS = torch.tensor([item for stream in STREAMS for item in stream])
OFFSETS = torch.tensor([0, 4, 7, 8, 12])
EVERY = torch.arange(1, 7)
COUNTS = [2, 3, 1, 3, 3, 0]
CONFIGS = [PopularityConfig(), MarkovConfig(), ItemKNNConfig()]


def fitted(config):
    model = config.build(CATALOG, 10)
    model.fit(TrainingEvents(ITEMS, torch.arange(len(ITEMS)), OFFSETS))
    return model


@pytest.fixture
def ask(make_batch):
    """One row per (history of items, domain asked for at its end)."""

    def make(*rows, pad=0):
        histories = [[(item, int(item > 3), t) for t, item in enumerate(items)] for items, _ in rows]
        return make_batch(histories, [[None] * (len(items) - 1) + [k] * bool(items) for items, k in rows], pad=pad)

    return make


def test_popularity(ask):
    scores = fitted(PopularityConfig()).scores(ask(([1], 0), ([4, 5], 1)), EVERY)
    assert scores.tolist() == [COUNTS, COUNTS]


def markov(smoothing, merged, within):
    """Scores by hand, from the successors seen of the last item and of the last one of the domain asked for."""
    popularity = [count / 12 for count in COUNTS]
    total = [0.0] * 6
    for seen in (merged, within):
        number = sum(seen.values())
        for j in range(6):
            total[j] += (seen.get(j + 1, 0) + smoothing * popularity[j]) / (number + smoothing)
    return total


@pytest.mark.parametrize("smoothing", [1.0, 0.25])
def test_markov(smoothing, ask):
    # Merged: 1>4 4>2 2>5 | 1>4 4>3 | 2>5 5>2 2>5. Within a: 1>2 | 1>3 | 2>2. Within b: 4>5 | 5>5.
    model = fitted(MarkovConfig(smoothing=smoothing))
    batch = ask(([1, 4], 0), ([1, 4], 1), ([5, 2], 0), ([3], 1), ([4, 1], 1), pad=1)
    expected = [
        markov(smoothing, {2: 1, 3: 1}, {2: 1, 3: 1}),  # last 4; last of a: 1
        markov(smoothing, {2: 1, 3: 1}, {5: 1}),  # last 4; last of b: 4
        markov(smoothing, {5: 3}, {2: 1}),  # last 2; last of a: 2
        markov(smoothing, {}, {}),  # 3 has no successor, and b no event
        markov(smoothing, {4: 2}, {5: 1}),  # last 1; last of b: 4
    ]
    torch.testing.assert_close(model.scores(batch, EVERY), torch.tensor(expected))


def knn(history, neighbors, decay):
    """Scores by hand from the sets of users."""
    users = {item: {u for u, stream in enumerate(STREAMS) if item in stream} for item in range(1, 7)}

    def similar(i, j):
        return len(users[i] & users[j]) / math.sqrt(len(users[i]) * len(users[j]) or 1)

    scores = [1e-4 * count / max(COUNTS) for count in COUNTS]
    for age, i in enumerate(reversed(history)):
        order = sorted((j for j in range(1, 7) if j != i), key=lambda j: (-similar(i, j), j))
        for j in order[:neighbors]:
            scores[j - 1] += decay**age * similar(i, j)
    return scores


@pytest.mark.parametrize(("neighbors", "decay"), [(100, 1.0), (100, 0.5), (2, 0.9), (1, 0.5)])
def test_item_knn(neighbors, decay, ask):
    model = fitted(ItemKNNConfig(neighbors=neighbors, decay=decay))
    histories = [[1], [4, 2], [2, 4, 2], [6], [3, 5, 4, 1]]
    expected = torch.tensor([knn(history, neighbors, decay) for history in histories])
    torch.testing.assert_close(model.scores(ask(*((history, 0) for history in histories)), EVERY), expected)


def test_item_knn_in_numbers(ask):
    """Items 2 and 5 share both of their users, 1 and 4 two of two and three."""
    scores = fitted(ItemKNNConfig(decay=1.0)).scores(ask(([2], 1), ([1], 1)), EVERY)
    assert scores[0, 4] == pytest.approx(1 + 1e-4)
    assert scores[1, 3] == pytest.approx(2 / math.sqrt(6) + 1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_item_knn_in_blocks(blocks, ask, monkeypatch):
    batch = ask(([4, 2], 0))
    whole = fitted(ItemKNNConfig(neighbors=2)).scores(batch, EVERY)
    monkeypatch.setattr("recsys.models.item_knn._BLOCK", blocks)
    assert torch.equal(fitted(ItemKNNConfig(neighbors=2)).scores(batch, EVERY), whole)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_an_empty_history_falls_back_to_popularity(config, ask):
    scores = fitted(config).scores(ask(([], 0), ([1, 2], 0)), EVERY)
    assert scores.dtype == torch.float32
    assert scores[0].argsort(stable=True).tolist() == torch.tensor(COUNTS).argsort(stable=True).tolist()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_scores_do_not_depend_on_padding_neighbours_or_the_list_asked(config, ask):
    model = fitted(config)
    rows = [([1, 4], 0), ([2, 5, 4], 1)]
    whole = model.scores(ask(*rows, pad=2), EVERY)
    for row, one in enumerate(rows):
        assert torch.equal(model.scores(ask(one), EVERY)[0], whole[row])
    some = torch.tensor([5, 2, 5])
    assert torch.equal(model.scores(ask(*rows), some), whole[:, some - 1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_targets_are_not_read(config, ask):
    model = fitted(config)
    batch, other = ask(([1, 4], 0)), ask(([1, 4], 0))
    other.targets[:] = 3
    assert torch.equal(model.scores(batch, EVERY), model.scores(other, EVERY))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_fitted_model_comes_back_from_a_file(config, ask, tmp_path):
    model = fitted(config)
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    loaded = config.build(CATALOG, 10)
    loaded.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True))
    batch = ask(([1, 4], 0), ([2], 1))
    assert torch.equal(loaded.scores(batch, EVERY), model.scores(batch, EVERY))


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda config: config.name)
def test_an_unfitted_model_says_so(config, ask):
    with pytest.raises(AssertionError, match="fill the matrix"):
        config.build(CATALOG, 10).scores(ask(([1], 0)), EVERY)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_streams_without_neighbours(config, ask):
    """Users of one event and users of none: nothing follows anything, popularity remains."""
    model = config.build(CATALOG, 10)
    model.fit(TrainingEvents(torch.tensor([2, 5, 5]), torch.zeros(3).long(), torch.tensor([0, 1, 1, 2, 3])))
    scores = model.scores(ask(([1, 5], 0)), EVERY)
    assert scores.isfinite().all()
    assert scores[0, 4] > scores[0, 1] > scores[0, 0]
