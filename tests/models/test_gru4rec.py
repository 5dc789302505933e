"""GRU4Rec against its equations, and what padding and questions may do."""

import dataclasses

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
    linear,
    sigmoid,
    training_batch,
    weights_of,
)

from recsys.losses import SoftmaxConfig
from recsys.models import GRU4RecConfig, count_parameters

QUERY = pytest.mark.parametrize("target_query", ["none", "domain"])


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, max_len=6, **config):
        return stir(GRU4RecConfig(d_model=4, **config).build(make_catalog(num_domains, NUM_ITEMS), max_len))

    return make


def states(history, asked, weights, num_layers=2):
    """The recurrence, event by event, from h = 0."""
    inputs = [
        weights["embedding.items.weight"][item] + weights["embedding.domains.weight"][domain]
        for item, domain, _ in history
    ]
    for layer in range(num_layers):
        (w_r, w_z, w_c), (u_r, u_z, u_c), (b_r, b_z, b_c), (a_r, a_z, a_c) = (
            np.split(weights[f"recurrence.{name}_l{layer}"], 3)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, outputs = np.zeros(4), []
        for x in inputs:
            z = sigmoid(w_z @ x + b_z + u_z @ h + a_z)
            r = sigmoid(w_r @ x + b_r + u_r @ h + a_r)
            c = np.tanh(w_c @ x + b_c + r * (u_c @ h + a_c))
            h = (1 - z) * c + z * h
            outputs.append(h)
        inputs = outputs
    h = np.array(inputs)
    if "question.weight" in weights:
        h = np.tanh(linear(h + weights["question.weight"][asked], weights, "feed_forward"))
    return h


def loss_of(weights):
    return np.mean(
        [
            cross_entropy(state, weights["embedding.items.weight"], target)
            for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True)
            for state, target in zip(states(history, asked, weights), targets, strict=True)
        ]
    )


@QUERY
def test_states_are_the_equations(target_query, build, make_batch):
    model = build(num_layers=2, target_query=target_query)
    hidden = model(training_batch(make_batch)).detach().numpy()
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        expected = states(history, asked, weights_of(model))
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-9)


@QUERY
def test_a_gradient_step_is_the_equations(target_query, build, make_batch, make_catalog):
    model, batch = build(num_layers=2, target_query=target_query), training_batch(make_batch)
    loss = SoftmaxConfig().build(make_catalog(2, NUM_ITEMS))
    assert_step(model, loss(model(batch), model.item_embeddings(), batch, None), loss_of)


@QUERY
def test_padding_does_not_reach_the_recurrence(target_query, build, make_batch):
    """Its biases alone would move the state away from zero at every step of padding."""
    model = build(target_query=target_query)
    batch = training_batch(make_batch)
    noise = dataclasses.replace(
        batch,
        domains=batch.domains.where(batch.mask, 1),
        times=batch.times.where(batch.mask, 7),
        target_domains=batch.target_domains.where(batch.mask, 1),
    )
    assert torch.equal(model(noise), model(batch))
    alone = model(make_batch(HISTORIES[1:], ASKED[1:]))
    torch.testing.assert_close(model(batch)[1, -2:], alone[0], rtol=1e-12, atol=1e-12)


def test_the_question_stays_at_its_position_and_changes_the_order_of_items(build, make_batch):
    model = build(target_query="domain")
    asked = [[0, 1, 1, 0], [1, 0]]
    before = model(make_batch(HISTORIES, asked))
    for t in range(4):
        for question in (1 - asked[0][t], None):
            changed = [[question if s == t else domain for s, domain in enumerate(asked[0])], asked[1]]
            moved = (model(make_batch(HISTORIES, changed)) != before).any(-1)
            assert moved[0].tolist() == [s == t for s in range(4)]
            assert not moved[1].any()

    def scores(domain):
        hidden = model(make_batch(HISTORIES, [[domain] * len(row) for row in HISTORIES]))[:, -1]
        return hidden @ model.item_embeddings().T

    shift = scores(0) - scores(1)
    assert not torch.allclose(shift[0], shift[1])


def test_dropout_is_where_it_was_published(build, make_batch):
    """On the inputs and on what leaves each layer; one layer is no reason for a warning."""
    batch = training_batch(make_batch)
    for layers in (1, 2):
        still = build(num_layers=layers, dropout_embedding=0.0, dropout_hidden=0.0).train()
        assert torch.equal(still(batch), still(batch))
    drops = build(dropout_embedding=0.0, dropout_hidden=0.5).train()
    hidden, dropped = drops.eval()(batch), drops.train()(batch)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * hidden[kept])  # the state that is carried on has lost nothing
    assert 0 < kept[batch.mask].double().mean() < 1
    below = build(num_layers=2, dropout_embedding=0.0, dropout_hidden=0.5).train()
    dropped, hidden = below(batch), below.eval()(batch)
    assert not torch.allclose(dropped[dropped != 0], 2 * hidden[dropped != 0])
    before = build(dropout_embedding=0.9, dropout_hidden=0.0).train()
    assert not torch.equal(before(batch), before(batch))


def test_size_in_closed_form(make_catalog):
    d, layers = 8, 2
    config = GRU4RecConfig(d_model=d, num_layers=layers, target_query="domain")
    counts = count_parameters(config.build(make_catalog(2, num_items=60), 10))
    parts = {
        "item_table": 61 * d,
        "other_embeddings": 4 * d,
        "encoder": layers * (6 * d * d + 6 * d),
        "output": d * d + d,
    }
    assert {name: number for name, number in counts.items() if number} == parts | {"total": sum(parts.values())}


def test_the_start(make_catalog):
    model = GRU4RecConfig(d_model=32, init_std=0.3).build(make_catalog(2), 10, torch.Generator().manual_seed(0))
    again = GRU4RecConfig(d_model=32, init_std=0.3).build(make_catalog(2), 10, torch.Generator().manual_seed(0))
    for (name, parameter), other in zip(
        model.recurrence.named_parameters(), again.recurrence.parameters(), strict=True
    ):
        assert parameter.std().item() == pytest.approx(0.0 if name.startswith("bias") else 0.3, rel=0.05)
        assert torch.equal(parameter, other)
    assert model.item_embeddings()[1:].std().item() == pytest.approx(0.3, rel=0.05)
