"""HSTU against its equations, its biases of time and place, and its gate."""

import numpy as np
import pytest
import torch
from numpy_equations import (
    ASKED,
    HISTORIES,
    NUM_ITEMS,
    TARGETS,
    assert_step,
    cross_entropy,
    layer_norm,
    linear,
    sigmoid,
    training_batch,
    weights_of,
)

from recsys.losses import SoftmaxConfig
from recsys.models import HSTUConfig, count_parameters

MAX_LEN = 6
GATE = pytest.mark.parametrize("gate", [True, False])


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, **config):
        return stir(HSTUConfig(d_model=4, num_heads=2, **config).build(make_catalog(num_domains, NUM_ITEMS), MAX_LEN))

    return make


def silu(x):
    return x * sigmoid(x)


def block(query, context, times, weights, name):
    asking, asked = (layer_norm(part, weights, f"{name}.norm") for part in (query, context))
    q = silu(linear(asking, weights, f"{name}.query"))
    k, v = np.split(silu(linear(asked, weights, f"{name}.key_value")), 2, axis=1)
    read = np.zeros_like(q)
    for head in (slice(0, 2), slice(2, 4)):
        for t in range(len(times)):
            for s in range(t + 1):
                bucket = int(np.log2(max(1, times[t] - times[s])))
                bias = (
                    weights[f"{name}.distance_bias.weight"][t - s, 0] + weights[f"{name}.time_bias.weight"][bucket, 0]
                )
                read[t, head] += silu(q[t, head] @ k[s, head] + bias) / MAX_LEN * v[s, head]
    read = layer_norm(read, weights, f"{name}.attended_norm")
    if f"{name}.gate.weight" in weights:
        read = silu(linear(asking, weights, f"{name}.gate")) * read
    return query + linear(read, weights, f"{name}.output")


def states(history, asked, weights):
    items, domains, times = (list(part) for part in zip(*history, strict=True))
    x = weights["embedding.items.weight"][items] + weights["embedding.domains.weight"][domains]
    x = block(x, x, times, weights, "blocks.0")
    x = block(x + weights["question.weight"][asked], x, times, weights, "blocks.1")
    return layer_norm(x, weights, "norm")


def loss_of(weights):
    return np.mean(
        [
            cross_entropy(state, weights["embedding.items.weight"], target)
            for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True)
            for state, target in zip(states(history, asked, weights), targets, strict=True)
        ]
    )


@GATE
def test_states_are_the_equations(gate, build, make_batch):
    model = build(gate=gate, target_query="domain")
    hidden = model(training_batch(make_batch)).detach().numpy()
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        expected = states(history, asked, weights_of(model))
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-8)


@GATE
def test_a_gradient_step_is_the_equations(gate, build, make_batch, make_catalog):
    model, batch = build(gate=gate, target_query="domain"), training_batch(make_batch)
    loss = SoftmaxConfig().build(make_catalog(2, NUM_ITEMS))
    assert_step(model, loss(model(batch), model.item_embeddings(), batch, None), loss_of)


@pytest.mark.parametrize(
    ("difference", "bucket"),
    [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (86_400, 16), (2**40, 40), (2**62 - 1, 61), (2**62, 62)],
)
def test_a_difference_of_times_falls_into_its_bucket(difference, bucket, build, make_batch):
    """Moving that bucket's number, and no other, moves the state; bucket 0 is always read, by the event at t itself."""
    model = build(num_layers=1)
    batch = make_batch([[(1, 1, 0), (2, 0, difference)]], [[0, 1]])
    before = model(batch)
    for other in range(63):
        with torch.no_grad():
            model.blocks[0].time_bias.weight[other] += 1
        after = model(batch)
        with torch.no_grad():
            model.blocks[0].time_bias.weight[other] -= 1
        assert torch.allclose(after[0, 1], before[0, 1], rtol=1e-12, atol=1e-12) == (other not in (0, bucket)), other


def test_times_count_only_as_differences_and_future_times_not_at_all(build, make_batch):
    model = build()
    before = model(make_batch(HISTORIES, ASKED))
    shifted = [[(item, domain, time + 10**9) for item, domain, time in row] for row in HISTORIES]
    assert torch.equal(model(make_batch(shifted, ASKED)), before)
    later = [[*HISTORIES[0][:3], (5, 1, 10**6)], HISTORIES[1]]
    after = model(make_batch(later, ASKED))
    torch.testing.assert_close(after[0, :3], before[0, :3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[0, 3], before[0, 3])


def test_data_with_an_order_only(build, make_batch):
    """Where times are ranks, their differences are distances."""
    model = build(target_query="domain")
    ranked = [[(item, domain, rank) for rank, (item, domain, _) in enumerate(row)] for row in HISTORIES]
    hidden = model(make_batch(ranked, ASKED)).detach().numpy()
    np.testing.assert_allclose(hidden[0], states(ranked[0], ASKED[0], weights_of(model)), rtol=1e-8)


def test_without_a_gate_there_are_no_weights_for_it(make_catalog):
    d, layers, length = 8, 2, 10
    for gate in (True, False):
        config = HSTUConfig(d_model=d, num_layers=layers, num_heads=2, gate=gate, target_query="domain")
        counts = count_parameters(config.build(make_catalog(2, num_items=60), length))
        maps = 5 if gate else 4
        parts = {
            "item_table": 61 * d,
            "other_embeddings": (2 + 2) * d,
            "encoder": layers * (maps * (d * d + d) + 4 * d + length + 63),
            "output": 2 * d,
        }
        assert {name: number for name, number in counts.items() if number} == parts | {"total": sum(parts.values())}


def test_a_closed_gate_stops_the_attention(build, make_batch):
    """SiLU(0) = 0: with U = 0 a block adds its bias and nothing else; without the gate it still reads."""
    for gate in (True, False):
        model = build(gate=gate)
        for block_ in model.blocks:
            if block_.gate is not None:
                torch.nn.init.zeros_(block_.gate.weight)
                torch.nn.init.zeros_(block_.gate.bias)
        before = model(make_batch(HISTORIES, ASKED))
        other_start = [[(7, 1, 90), *HISTORIES[0][1:]], HISTORIES[1]]
        after = model(make_batch(other_start, ASKED))
        assert torch.allclose(after[0, 1:], before[0, 1:], rtol=1e-12, atol=1e-12) == gate


def test_the_question_reaches_its_own_position_only(build, make_batch):
    model = build(target_query="domain")
    asked = [[0, 1, 1, 0], [1, 0]]
    before = model(make_batch(HISTORIES, asked))
    for t in range(4):
        changed = [[1 - d if s == t else d for s, d in enumerate(asked[0])], asked[1]]
        moved = (model(make_batch(HISTORIES, changed)) != before).any(-1)
        assert moved[0].tolist() == [s == t for s in range(4)]
        assert not moved[1].any()
