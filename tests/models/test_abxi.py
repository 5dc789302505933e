"""ABXI against its equations, its published size, and what its streams may know."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from recsys.losses import InfoNCEConfig
from recsys.models import ABXIConfig, abxi, count_parameters
from recsys.models.attention import CrossConfig
from recsys.types import NO_DOMAIN, Batch, Catalog, Draw

SIZE = {"d_model": 4, "d_ff": 3, "num_heads": 2, "domain_rank": 2, "invariant_rank": 1}
# Merged history, and what is asked at each of its events. The second user has no event of domain 1 when it is asked.
HISTORIES = [[(1, 0, 1), (2, 1, 2), (3, 0, 3), (4, 1, 4), (5, 1, 5)], [(6, 0, 1), (7, 0, 2), (8, 1, 3)]]
TARGETS = [[2, 3, 4, 5, 9], [7, 8, 10]]
ASKED = [[1, 0, 1, 1, 0], [0, 1, 0]]
NEGATIVES = [11, 12, 13, 4, 9]


class Fixed:
    """The same negatives for every position."""

    generator = torch.Generator()

    def draw(self, targets):
        items = torch.tensor(NEGATIVES).expand(len(targets), -1)
        return Draw(items, torch.zeros(items.shape), torch.zeros(len(targets)))


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, max_len=6, **config):
        return stir(ABXIConfig(**SIZE | config).build(make_catalog(num_domains, 20), max_len))

    return make


# The paper's equations in NumPy, user by user, event by event


def layer_norm(x, weights, name):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def swiglu(h, weights, name):
    w2, w1 = np.split(weights[f"{name}.gate_and_value.weight"], 2)
    gate = w2 @ h
    return weights[f"{name}.output.weight"] @ (gate / (1 + np.exp(-gate)) * (w1 @ h))


def lora(h, weights, name):
    return weights[f"{name}.a"] @ weights[f"{name}.b"] @ h


def linear(h, weights, name):
    return weights[f"{name}.weight"] @ h + weights[f"{name}.bias"]


def attend(embedded, t, weights, heads=2):
    """What the event at t of a stream reads from those up to t."""
    query = linear(embedded[t], weights, "attention.query")
    pairs = [np.split(linear(e, weights, "attention.key_value"), 2) for e in embedded[: t + 1]]
    width = len(query) // heads
    read = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = np.array([query[part] @ key[part] for key, _ in pairs]) / np.sqrt(width)
        share = np.exp(logits - logits.max())
        read.append(sum(s * value[part] for s, (_, value) in zip(share / share.sum(), pairs, strict=True)))
    return linear(np.concatenate(read), weights, "attention.output")


def encode(items, places, stream, weights):
    """H_s of the events of one stream."""
    table, positions = weights["embedding.items.weight"], weights["embedding.positions.weight"]
    embedded = [table[item] + positions[place] for item, place in zip(items, places, strict=True)]
    states = []
    for t, e in enumerate(embedded):
        h = layer_norm(e + attend(embedded, t, weights), weights, "attention_norm")
        low_rank = lora(h, weights, f"stream_maps.{stream}")
        states.append(layer_norm(h + swiglu(h, weights, "feed_forward") + low_rank, weights, f"stream_norms.{stream}"))
    return states


def answers(history, asked, weights):
    """The states of one user, with the paper's task-guided alignment spelled out: the stream of domain k is made of
    the event of k before each target of k, and its positions count from the last of those."""
    merged = encode([item for item, _, _ in history], range(len(history), 0, -1), 0, weights)
    own = {}
    for k in (0, 1):
        stream, at = [], []
        for t, domain in enumerate(asked):
            before = [item for item, d, _ in history[: t + 1] if d == k]
            if domain == k and before:
                stream.append(before[-1])
                at.append(t)
        states = encode(stream, range(len(stream), 0, -1), 1 + k, weights)
        own |= {(k, t): state for t, state in zip(at, states, strict=True)}
    hidden = []
    for t, k in enumerate(asked):
        x, h = merged[t], own.get((k, t), np.zeros(SIZE["d_model"]))
        invariant = x + swiglu(x, weights, "invariant") + lora(x, weights, f"invariant_maps.{k}")
        private = h + swiglu(h, weights, f"own.{k}")
        hidden.append(
            layer_norm(invariant, weights, f"invariant_norms.{k}") + layer_norm(private, weights, f"own_norms.{k}")
        )
    return hidden


def info_nce(weights, temperature=0.75):
    """Per user and domain the mean over positions, then the mean over users, then the sum over domains."""
    table = weights["embedding.items.weight"]
    totals = {0: [], 1: []}
    for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True):
        found = {0: [], 1: []}
        for state, domain, target in zip(answers(history, asked, weights), asked, targets, strict=True):
            others = [item for item in NEGATIVES if item != target]
            logits = np.array([state @ table[item] for item in [target, *others]]) / temperature
            found[domain].append(np.log(np.exp(logits - logits[0]).sum()))
        for domain, losses in found.items():
            totals[domain].append(np.mean(losses))
    return sum(np.mean(losses) for losses in totals.values())


def weights_of(model):
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


@pytest.fixture
def batch(make_batch):
    made = make_batch(HISTORIES, ASKED, pad=1)
    targets = torch.zeros_like(made.items)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(made, targets=targets)


def test_states_are_the_equations(build, batch):
    model = build()
    hidden = model(batch).detach().numpy()
    weights = weights_of(model)
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        np.testing.assert_allclose(hidden[row, -len(history) :], answers(history, asked, weights), rtol=1e-9)


def test_loss_and_one_gradient_step_are_the_equations(build, batch, make_catalog):
    """Every weight after a step of plain gradient descent, against central differences of the NumPy loss."""
    model = build()
    loss = InfoNCEConfig().build(make_catalog(2, 20))
    value = loss(model(batch), model.item_embeddings(), batch, Fixed())
    weights = weights_of(model)
    assert value.item() == pytest.approx(info_nce(weights), rel=1e-9)
    before = {name: array.copy() for name, array in weights.items()}
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    value.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, after in weights_of(model).items():
        array = weights[name].reshape(-1)
        for place in range(0, array.size, 3):
            if name == "embedding.items.weight" and place < SIZE["d_model"]:
                continue  # padding stays zero
            middle = array[place]
            array[place] = middle + 1e-5
            high = info_nce(weights)
            array[place] = middle - 1e-5
            low = info_nce(weights)
            array[place] = middle
            expected = before[name].reshape(-1)[place] - 0.1 * (high - low) / 2e-5
            assert after.reshape(-1)[place] == pytest.approx(expected, abs=2e-8), name


@pytest.mark.parametrize(
    ("food", "kitchen", "ranks", "published"),
    [
        (11_837, 16_258, (16, 64), 9_651_200),
        (10_379, 14_188, (64, 64), 8_821_760),
        (35_712, 90_958, (4, 4), 34_806_528),
    ],
)
def test_size_is_the_published_one(food, kitchen, ranks, published):
    """9.651, 8.822 and 34.81 million (README of the authors); also from the closed formula."""
    domain = torch.tensor([-1] + [0] * food + [1] * kitchen)
    with torch.device("meta"):
        model = ABXIConfig(domain_rank=ranks[0], invariant_rank=ranks[1]).build(
            Catalog(("a", "b"), domain, torch.zeros_like(domain)), 47
        )
    d, f, (rd, ri) = 256, 680, ranks
    formula = (food + kitchen + 1) * d + 48 * d + 4 * d * d + 4 * d + 2 * d + 12 * d * f + 6 * d * rd + 4 * d * ri
    assert count_parameters(model)["total"] == formula + 14 * d == published


def test_positions_from_the_end_tell_how_many_events_follow(build, make_batch):
    """As published; nothing of what they are. Counted from the start, a state knows not even that."""
    shorter = [HISTORIES[0][:3]], [ASKED[0][:3]]
    whole = [HISTORIES[0]], [ASKED[0]]
    published, causal = build(), build(positions="from_start")
    assert not torch.allclose(published(make_batch(*shorter))[0], published(make_batch(*whole))[0, :3])
    torch.testing.assert_close(causal(make_batch(*shorter))[0], causal(make_batch(*whole))[0, :3])

    renamed = [[*HISTORIES[0][:3], (14, 1, 4), (15, 1, 5)]], [ASKED[0]]
    before, after = published(make_batch(*whole)), published(make_batch(*renamed))
    torch.testing.assert_close(after[0, :3], before[0, :3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[0, 3:], before[0, 3:])


def test_the_newest_event_has_position_one_in_evaluation(build, make_batch):
    """Rows 3 and up of the positions are those of older events: with two events of each stream they are not read."""
    model = build()
    batch = make_batch([[(1, 0, 1), (3, 0, 3)]], [[None, 0]])
    before = model(batch)
    with torch.no_grad():
        model.embedding.positions.weight[3:] += 1
        model.embedding.positions.weight[0] += 1
    assert torch.equal(model(batch), before)
    with torch.no_grad():
        model.embedding.positions.weight[1] += 1
    assert not torch.allclose(model(batch), before)


def test_questions_of_evaluation_and_of_training_agree(build, make_batch):
    """Leaving out what no question reads changes nothing: the last state is the same, whatever else is asked."""
    model = build()
    asked = [[None] * 4 + [0]]
    every = model(make_batch([HISTORIES[0]], [[1, 0, 1, 1, 0]]))[0, -1]
    torch.testing.assert_close(model(make_batch([HISTORIES[0]], asked))[0, -1], every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(placement="early"), CrossConfig(placement="stack")])
@pytest.mark.parametrize("positions", ["from_end", "from_start"])
@pytest.mark.parametrize("before", [0, 2])  # positions that are padding in every row
def test_last_states_of_many_users_are_those_of_a_pass_over_all(cross, num_domains, positions, before, make_catalog):
    config = ABXIConfig(**SIZE, cross=cross, positions=positions)
    generator = torch.Generator().manual_seed(0)
    model = config.build(make_catalog(num_domains, 20), 6, generator).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    rows, length = 24, 6
    real = torch.arange(length) >= length - torch.randint(1, length + 1 - before, (rows, 1), generator=generator)
    items = torch.randint(1, 21, (rows, length), generator=generator) * real
    domains = make_catalog(num_domains, 20).item_domain[items]
    asked = torch.randint(0, num_domains, (rows, length), generator=generator).where(real, NO_DOMAIN)
    times = torch.arange(length).expand(rows, length) * real
    every = Batch(torch.arange(rows), items, domains, times, torch.zeros_like(items), asked)
    last = asked.clone()
    last[:, :-1] = NO_DOMAIN
    with torch.no_grad():
        expected, found = model(every)[:, -1], model(dataclasses.replace(every, target_domains=last))
    assert (domains != asked[:, -1:]).all(1).any(), "somebody is asked for a domain without events"
    torch.testing.assert_close(found[:, -1], expected, rtol=1e-10, atol=1e-10)
    assert not found[:, :-1].any()


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(placement="early"), CrossConfig(placement="stack")])
def test_states_and_gradients_do_not_depend_on_how_events_are_laid_out(cross, num_domains, make_catalog, monkeypatch):
    """Lines sorted by length, as on a CPU, against one block for each stream, as where lengths are not known."""
    generator = torch.Generator().manual_seed(1)
    model = ABXIConfig(**SIZE, cross=cross).build(make_catalog(num_domains, 20), 9, generator).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    rows, length = 40, 9
    real = torch.arange(length) >= length - torch.randint(0, length + 1, (rows, 1), generator=generator)
    items = torch.randint(1, 21, (rows, length), generator=generator) * real
    asked = torch.randint(-1, num_domains, (rows, length), generator=generator).where(real, NO_DOMAIN)
    domains, times = make_catalog(num_domains, 20).item_domain[items], torch.arange(length).expand(rows, length) * real
    batch = Batch(torch.arange(rows), items, domains, times, torch.zeros_like(items), asked)
    assert not real.any(1).all(), "somebody has no event"
    found = []
    for by_length in (True, False):
        with monkeypatch.context() as patch:
            if not by_length:
                patch.setattr(abxi, "line_lengths", lambda *_: None)
            states = model(batch)
            found.append(
                [states, *torch.autograd.grad(states.sin().sum(), list(model.parameters()), allow_unused=True)]
            )
    for sorted_, padded in zip(*found, strict=True):
        torch.testing.assert_close(sorted_, padded, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(placement="early"), CrossConfig(placement="stack")])
def test_trains_a_step(cross, num_domains, make_catalog, batch):
    model = ABXIConfig(**SIZE, cross=cross).build(make_catalog(num_domains, 20), 6).train()
    loss = InfoNCEConfig().build(make_catalog(num_domains, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        value = loss(model(batch), model.item_embeddings(), batch, Fixed())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_the_exchange_leaves_the_other_weights_as_they_start(placement, make_catalog):
    def start(cross):
        model = ABXIConfig(**SIZE, cross=cross).build(make_catalog(2), 6, torch.Generator().manual_seed(3))
        return model.state_dict()

    baseline, treatment = start(None), start(CrossConfig(placement=placement))
    assert all(torch.equal(treatment[name], value) for name, value in baseline.items())
    assert {name.split(".")[0] for name in treatment.keys() - baseline.keys()} == {placement}


def test_without_exchange_the_domain_stream_holds_its_own_events_only(build, make_batch):
    """What an answer knows of the other domain comes through the merged stream: cut that off and nothing is left."""
    model = build()
    with torch.no_grad():
        for k in range(2):
            model.invariant_norms[k].weight.zero_()
    asked = [[None] * 4 + [0]]
    before = model(make_batch([HISTORIES[0]], asked))
    others = [[(item + 10 if domain else item, domain, time) for item, domain, time in HISTORIES[0]]]
    assert torch.equal(model(make_batch(others, asked)), before)
    own = [[(item if domain else item + 10, domain, time) for item, domain, time in HISTORIES[0]]]
    assert not torch.allclose(model(make_batch(own, asked)), before)


def test_more_units_than_blocks_are_refused():
    with pytest.raises(ValidationError, match="num_units"):
        ABXIConfig(cross=CrossConfig(placement="stack", num_units=2))


def test_one_domain_has_no_exchange(make_catalog):
    with pytest.raises(ValueError, match="at least two domains"):
        ABXIConfig(**SIZE, cross=CrossConfig()).build(make_catalog(1), 6)
