"""BERT4Rec against its equations; what the cloze task masks and reads; what a question is answered from."""

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
    linear,
    post_norm_block,
    training_batch,
    weights_of,
)

from recsys.data.batches import TrainBatches, make_catalog
from recsys.data.split import TRAIN, LeaveOneOut, make_split
from recsys.data.synthetic import SyntheticConfig
from recsys.losses import SoftmaxConfig
from recsys.models import BERT4RecConfig, count_parameters
from recsys.types import NO_DOMAIN, PAD_ID

QUERY = pytest.mark.parametrize("target_query", ["none", "domain"])
# The events of the training rows, the last target among them: (item, domain).
ROWS = [
    [*((item, domain) for item, domain, _ in row), (last[-1], last[-1] % 2)]
    for row, last in zip(HISTORIES, TARGETS, strict=True)
]


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, max_len=6, **config):
        size = {"d_model": 4, "d_ff": 3, "num_heads": 2}
        return stir(BERT4RecConfig(**size, **config).build(make_catalog(num_domains, NUM_ITEMS), max_len))

    return make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def states(events, masked, weights):
    """Of all positions; a masked event is known by its place alone, or by the domain asked for where masks tell it."""
    x = []
    for place, ((item, domain), is_masked) in enumerate(zip(events, masked, strict=True)):
        if is_masked:
            masks = weights["masks.weight"]
            vector = masks[domain] if len(masks) > 1 else masks[0]
        else:
            vector = weights["embedding.items.weight"][item] + weights["embedding.domains.weight"][domain]
        x.append(vector + weights["embedding.positions.weight"][place])
    x = np.array(x)
    for layer in range(2):
        x = post_norm_block(x, x, np.ones((len(x), len(x))), gelu, weights, f"blocks.{layer}", num_heads=2)
    return np.concatenate([gelu(linear(x, weights, "projection")), np.ones((len(x), 1))], axis=1)


def loss_of(weights, masks):
    """-log softmax(GELU(h W + b) E^T + b_item) of each masked event."""
    table = np.concatenate([weights["embedding.items.weight"], weights["item_bias.weight"]], axis=1)
    return np.mean(
        [
            cross_entropy(state, table, item)
            for events, masked in zip(ROWS, masks, strict=True)
            for state, (item, _), is_masked in zip(states(events, masked, weights), events, masked, strict=True)
            if is_masked
        ]
    )


def masks_of(objective):
    """Which events of each row were masked, without the padding."""
    return [row[-len(events) :].tolist() for row, events in zip(objective.batch.targets != PAD_ID, ROWS, strict=True)]


@QUERY
def test_answers_are_the_equations(target_query, build, make_batch):
    """At every question: the events up to it, then a mask."""
    model = build(target_query=target_query)
    hidden = model(training_batch(make_batch)).detach().numpy()
    weights = weights_of(model)
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        for t, domain in enumerate(asked):
            events = [*((item, d) for item, d, _ in history[: t + 1]), (None, domain)]
            expected = states(events, [False] * (t + 1) + [True], weights)[-1]
            np.testing.assert_allclose(hidden[row, t - len(history)], expected, rtol=1e-9)


@QUERY
def test_the_cloze_task_is_the_equations(target_query, build, make_batch, make_catalog):
    """States of the masks, the loss and a step of gradient descent."""
    model, batch = build(target_query=target_query, mask_share=0.5), training_batch(make_batch)
    objective = model.objective(batch, generator())
    masks = masks_of(objective)
    assert any(masks[0])
    assert not all(masks[0])
    ((weight, hidden),) = objective.answers
    assert weight == 1
    assert not objective.terms
    for row, (events, masked) in enumerate(zip(ROWS, masks, strict=True)):
        expected = states(events, masked, weights_of(model)) * np.array(masked)[:, None]
        np.testing.assert_allclose(hidden[row, -len(events) :].detach().numpy(), expected, rtol=1e-9)
        assert (hidden[row, : -len(events)] == 0).all()
    loss = SoftmaxConfig().build(make_catalog(2, NUM_ITEMS))
    value = loss(hidden, model.item_embeddings(), objective.batch, None)
    assert_step(model, value, lambda weights: loss_of(weights, masks))


def test_questions_are_the_masked_events(build, make_batch):
    model = build(mask_share=0.5)
    for seed in range(20):
        asked = model.objective(training_batch(make_batch), generator(seed)).batch
        for row, events in enumerate(ROWS):
            pairs = zip(asked.items[row].tolist(), asked.targets[row].tolist(), strict=True)
            assert [seen or target for seen, target in pairs][-len(events) :] == [item for item, _ in events]
            assert ((asked.items[row] == PAD_ID) | (asked.targets[row] == PAD_ID)).all()
            for place, (_, domain) in enumerate(events, start=asked.items.shape[1] - len(events)):
                masked = asked.targets[row, place] != PAD_ID
                assert asked.target_domains[row, place] == (domain if masked else NO_DOMAIN)
                assert asked.domains[row, place] == (NO_DOMAIN if masked else domain)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.01, (1, 1)), (0.2, (1, 1)), (0.5, (2, 2)), (0.7, (4, 2)), (0.99, (5, 3))]
)
def test_how_many_are_masked(share, counts, build, make_batch):
    """The share of the five and three events, rounded (half to even), and at least one; any event in time."""
    model = build(mask_share=share, last_share=0.0)
    ever = [np.zeros(5, bool), np.zeros(3, bool)]
    for seed in range(60):
        masks = masks_of(model.objective(training_batch(make_batch), generator(seed)))
        assert [sum(masked) for masked in masks] == list(counts)
        ever = [before | np.array(masked) for before, masked in zip(ever, masks, strict=True)]
    assert all(seen.all() for seen in ever)


def test_rows_that_mask_their_last_event_alone(build, make_batch):
    batch = training_batch(make_batch)
    masks = masks_of(build(mask_share=0.7, last_share=1.0).objective(batch, generator()))
    assert masks == [[False] * 4 + [True], [False] * 2 + [True]]
    model = build(mask_share=0.7, last_share=0.25)
    alone = [sum(masked) == 1 for seed in range(200) for masked in masks_of(model.objective(batch, generator(seed)))]
    assert np.mean(alone) == pytest.approx(0.25, abs=0.06)


def test_masks_come_from_the_generator(build, make_batch):
    model, batch = build(mask_share=0.5, last_share=0.5), training_batch(make_batch)
    drawn = [masks_of(model.objective(batch, generator(seed))) for seed in (*range(9), *range(9))]
    assert drawn[:9] == drawn[9:]
    assert any(masks != drawn[0] for masks in drawn)


@QUERY
def test_a_masked_event_cannot_be_read(target_query, build, make_batch):
    """Another item in its place changes no state, nor does its domain where masks do not tell it; an event that is
    seen changes the states of all masks of its row, on both sides of it."""
    model, batch = build(target_query=target_query, mask_share=0.4, last_share=0.0), training_batch(make_batch)
    seed = next(
        s for s in range(99) if masks_of(model.objective(batch, generator(s)))[0] == [False, True, False, False, True]
    )

    def answers(changed):
        return model.objective(changed, generator(seed)).answers[0][1][0]

    before = answers(batch)
    first = batch.items.shape[1] - 4

    def with_event(place, item, domain):
        """The row with another event at `place`, as an item of the history and as a target."""
        fields = {name: getattr(batch, name).clone() for name in ("items", "domains", "targets", "target_domains")}
        if place < 4:
            fields["items"][0, first + place], fields["domains"][0, first + place] = item, domain
        if place > 0:
            fields["targets"][0, first + place - 1] = item
            fields["target_domains"][0, first + place - 1] = domain
        return dataclasses.replace(batch, **fields)

    for place, (_, domain) in enumerate(ROWS[0]):
        masked = place in (1, 4)
        moved = (answers(with_event(place, 11, domain)) != before).any(-1)[-5:].tolist()
        assert moved == [not masked and s in (1, 4) for s in range(5)], place
        moved = (answers(with_event(place, 11, 1 - domain)) != before).any(-1)[-5:].tolist()
        assert moved == [(not masked or target_query == "domain") and s in (1, 4) for s in range(5)], place


def test_the_cloze_task_holds_training_events_only():
    """Its rows are the users' training events, the last one included, and nothing of validation or test."""
    source = SyntheticConfig(num_users=40, items_per_domain=30, min_events=5, mean_events=9, max_events=20)
    sequences = source.sequences(None)
    split = make_split(sequences, LeaveOneOut())
    model = BERT4RecConfig(d_model=4, num_heads=1).build(make_catalog(sequences, split), 8)
    batches = TrainBatches(sequences, split, max_len=8, batch_size=16, seed=0, device="cpu")
    rows = 0
    for batch in batches:
        cloze = model.objective(batch, generator()).batch
        for user, events in zip(batch.user.tolist(), cloze.items + cloze.targets, strict=True):
            own = slice(int(sequences.offsets[user]), int(sequences.offsets[user + 1]))
            training = sequences.items[own][split.role[own] == TRAIN]
            assert events[events != PAD_ID].tolist() == training[-9:].tolist()
            rows += 1
    assert rows > 30


def test_an_answer_holds_no_mask_of_another_question(build, make_batch):
    """Zeros where nothing is asked, so that no state can be taken for the answer to a question that was not put."""
    model = build()
    hidden = model(make_batch(HISTORIES, [[None, 1, None, 0], [None, None]]))
    assert (hidden != 0).any(-1).tolist() == [[False, True, False, True], [False] * 4]
    assert (hidden[..., -1] == (hidden != 0).any(-1)).all()


def test_what_the_mask_tells(build, make_batch):
    batch = make_batch(HISTORIES, ASKED)
    other = make_batch(HISTORIES, [[1 - domain for domain in row] for row in ASKED])
    blind, told = build(), build(target_query="domain")
    assert torch.equal(blind(batch), blind(other))
    shift = (told(batch) - told(other))[[0, 1], -1] @ told.item_embeddings().T
    assert not torch.allclose(shift[0], -shift[1])
    assert not torch.allclose(shift[0], shift[1])


def test_a_history_of_max_len_has_room_for_its_mask(build, make_batch):
    model = build(max_len=4)
    batch = training_batch(make_batch)
    tight = batch.map(lambda tensor: tensor[..., 1:] if tensor.ndim == 2 else tensor)
    with torch.no_grad():
        model.embedding.positions.weight[4] += 1
    before = model(tight)[0, -1]
    with torch.no_grad():
        model.embedding.positions.weight[4] -= 1
    assert not torch.allclose(model(tight)[0, -1], before)
    assert model.objective(tight, generator()).batch.items.shape == (2, 5)
    with pytest.raises(ValueError, match="max_len = 4"):
        model.objective(batch, generator())


@pytest.mark.parametrize(("last_share", "masked"), [(0.0, 2), (1.0, 1)])
def test_a_row_without_a_last_target_and_a_row_of_padding(last_share, masked, build, make_batch):
    """Neither occurs in training; both have states, finite gradients, and nothing asked that is not there."""
    model = build(mask_share=0.5, last_share=last_share)
    batch = make_batch([HISTORIES[0], []], [[None] * 4, []])
    objective = model.objective(batch, generator())
    states = objective.answers[0][1]
    assert (states[:, -1] == 0).all()
    assert (objective.batch.targets[0] != PAD_ID).sum() == (states[0] != 0).any(-1).sum() == masked
    assert (states[1] == 0).all()
    assert (objective.batch.targets[1] == PAD_ID).all()
    states.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_size_in_closed_form(make_catalog):
    d, ff, layers, length = 8, 12, 3, 10
    config = BERT4RecConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2, target_query="domain")
    counts = count_parameters(config.build(make_catalog(2, num_items=60), length))
    parts = {
        "item_table": 61 * (d + 1),
        "other_embeddings": (length + 1 + 2 + 2) * d,
        "encoder": layers * (4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d),
        "output": d * d + d,
    }
    assert {name: number for name, number in counts.items() if number} == parts | {"total": sum(parts.values())}


def test_the_start(make_catalog):
    """No item is ahead of another by its bias, and padding has none of anything."""
    model = BERT4RecConfig(d_model=32, init_std=0.3).build(make_catalog(2), 10, torch.Generator().manual_seed(0))
    table = model.item_embeddings()
    assert table[1:, :-1].std().item() == pytest.approx(0.3, rel=0.05)
    assert (table[:, -1] == 0).all()
    assert (table[PAD_ID] == 0).all()
