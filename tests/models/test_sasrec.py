"""SASRec against its equations with either place of the norms; the question of the target domain; bad configs."""

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
    gelu,
    layer_norm,
    post_norm_block,
    pre_norm_block,
    sigmoid,
    training_batch,
    weights_of,
)
from pydantic import ValidationError

from recsys.losses import BCEConfig, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig
from recsys.models import SASRecConfig
from recsys.negatives import UniformConfig
from recsys.types import Draw

NEGATIVES = [1, 4, 7]
NORMS = pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])


@pytest.fixture
def small(norm_first, make_catalog, stir):
    config = SASRecConfig(
        d_model=4,
        d_ff=3,
        num_layers=2,
        num_heads=2,
        norm_first=norm_first,
        target_query="domain",
        domain_embedding=True,
    )
    return stir(config.build(make_catalog(2, NUM_ITEMS), 5))


def relu(x):
    return np.maximum(x, 0)


def states(history, asked, weights, norm_first, activation=gelu):
    items, domains, _ = (list(part) for part in zip(*history, strict=True))
    x = (
        weights["embedding.items.weight"][items]
        + weights["embedding.positions.weight"][: len(items)]
        + weights["embedding.domains.weight"][domains]
    )
    allowed = np.tri(len(items), dtype=bool)
    block = pre_norm_block if norm_first else post_norm_block
    x = block(x, x, allowed, activation, weights, "blocks.0", num_heads=2)
    x = block(x + weights["question.weight"][asked], x, allowed, activation, weights, "blocks.1", num_heads=2)
    return layer_norm(x, weights, "norm")


def softmax_loss(weights, norm_first):
    table = weights["embedding.items.weight"]
    return np.mean(
        [
            cross_entropy(state, table, target)
            for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True)
            for state, target in zip(states(history, asked, weights, norm_first), targets, strict=True)
        ]
    )


def binary_loss(weights, norm_first):
    """-[log s(r+) + sum log(1 - s(r-))], over the number of terms, the target left out of the negatives."""
    table = weights["embedding.items.weight"]
    losses = []
    for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True):
        for state, target in zip(states(history, asked, weights, norm_first), targets, strict=True):
            yes = np.log(sigmoid(table[target] @ state))
            no = [np.log(1 - sigmoid(table[item] @ state)) for item in NEGATIVES if item != target]
            losses.append(-(yes + sum(no)) / (1 + len(no)))
    return np.mean(losses)


class Fixed:
    """The same negatives for every position."""

    generator = torch.Generator()

    def draw(self, targets):
        items = torch.tensor(NEGATIVES).expand(len(targets), -1)
        return Draw(items, torch.zeros(items.shape), torch.zeros(len(targets)))


@NORMS
def test_states_are_the_equations(norm_first, small, make_batch):
    hidden = small(training_batch(make_batch)).detach().numpy()
    weights = weights_of(small)
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        expected = states(history, asked, weights, norm_first)
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-9)


def test_relu_and_no_domains_as_published(make_batch, make_catalog, stir):
    config = SASRecConfig(d_model=4, d_ff=4, num_heads=2, activation="relu", domain_embedding=False)
    model = stir(config.build(make_catalog(2, NUM_ITEMS), 5))
    hidden = model(training_batch(make_batch)).detach().numpy()
    weights = weights_of(model)
    weights |= {"embedding.domains.weight": np.zeros((2, 4)), "question.weight": np.zeros((2, 4))}
    expected = states(HISTORIES[0], ASKED[0], weights, True, relu)
    np.testing.assert_allclose(hidden[0, -4:], expected, rtol=1e-9)


@NORMS
@pytest.mark.parametrize(
    ("config", "equation"), [(SoftmaxConfig(), softmax_loss), (BCEConfig(), binary_loss)], ids=["ce", "bce"]
)
def test_a_gradient_step_is_the_equations(config, equation, norm_first, small, make_batch, make_catalog):
    batch = training_batch(make_batch)
    loss = config.build(make_catalog(2, NUM_ITEMS))
    value = loss(small(batch), small.item_embeddings(), batch, Fixed())
    assert_step(small, value, lambda weights: equation(weights, norm_first))


@NORMS
@pytest.mark.parametrize(
    ("config", "num_negatives"),
    [(SoftmaxConfig(), None), (BCEConfig(), 1), (GBCEConfig(t=0.75), 3), (SampledSoftmaxConfig(), 3)],
    ids=["ce", "bce", "gbce", "sampled softmax"],
)
def test_every_loss_trains_it(config, num_negatives, norm_first, make_batch, make_catalog):
    """A hundred steps put each target before the other items of its domain."""
    catalog, batch = make_catalog(2, NUM_ITEMS), training_batch(make_batch)
    size = {"d_model": 16, "d_ff": 16, "num_heads": 2, "dropout": 0.0}
    model = SASRecConfig(**size, norm_first=norm_first).build(catalog, 5, torch.Generator().manual_seed(0))
    loss, negatives = config.build(catalog), None
    if num_negatives is not None:
        negatives = UniformConfig(num_negatives=num_negatives).build(catalog, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(batch), model.item_embeddings(), batch, negatives).backward()
        optimizer.step()
    asked = batch.targets != 0
    scores = model(batch)[asked] @ model.item_embeddings().T
    rivals = scores.masked_fill(catalog.item_domain != batch.target_domains[asked][:, None], -torch.inf)
    assert torch.equal(rivals.argmax(dim=1), batch.targets[asked])


# The question of the target domain

HISTORY = [(1, 0, 1), (2, 1, 2), (3, 0, 3), (4, 1, 4)]


def build(make_catalog, stir, **options):
    return stir(SASRecConfig(d_model=8, d_ff=8, num_heads=2, **options).build(make_catalog(3), 6))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_question_reaches_its_own_position_only(num_layers, make_batch, make_catalog, stir):
    model = build(make_catalog, stir, target_query="domain", num_layers=num_layers)
    asked = [0, 1, 1, 0]
    before = model(make_batch([HISTORY], [asked]))
    for t in range(4):
        for question in (2, None):
            changed = [question if s == t else domain for s, domain in enumerate(asked)]
            after = model(make_batch([HISTORY], [changed]))
            moved = (after != before).any(-1)[0]
            assert moved.tolist() == [s == t for s in range(4)]


def test_the_question_changes_the_order_of_items_and_not_only_a_bias(make_batch, make_catalog, stir):
    model = build(make_catalog, stir, target_query="domain")
    histories = [HISTORY, [(5, 0, 1), (6, 1, 2)]]

    def scores(domain):
        hidden = model(make_batch(histories, [[domain] * len(row) for row in histories]))[:, -1]
        return hidden @ model.item_embeddings().T

    shift = scores(0) - scores(1)
    assert not torch.allclose(shift[0], shift[1])


def test_without_it_no_question_is_read(make_batch, make_catalog, stir):
    model = build(make_catalog, stir)
    batch = make_batch([HISTORY], [[0, 1, 1, 0]])
    other = dataclasses.replace(batch, target_domains=batch.target_domains * 0 + 2)
    assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize("domain_embedding", [True, False])
def test_the_domain_of_an_event_is_read_if_embedded(domain_embedding, make_batch, make_catalog, stir):
    model = build(make_catalog, stir, domain_embedding=domain_embedding)
    batch = make_batch([HISTORY], [[0, 1, 1, 0]])
    other = dataclasses.replace(batch, domains=1 - batch.domains)
    assert torch.equal(model(batch), model(other)) != domain_embedding


def test_config_refuses():
    with pytest.raises(ValidationError, match="num_heads = 3 does not divide d_model = 8; 2 does"):
        SASRecConfig(d_model=8, num_heads=3)
    with pytest.raises(ValidationError):
        SASRecConfig(num_layers=0)
