"""C2DSR against its equations, its graph against one made by hand, and what its parts may know."""

import dataclasses
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy_equations import assert_step, layer_norm, pre_norm_block, weights_of

from recsys.data.batches import training_events
from recsys.data.split import TRAIN
from recsys.data.synthetic import SyntheticConfig
from recsys.experiment import DataConfig, load_data
from recsys.losses import SoftmaxConfig
from recsys.models import C2DSRConfig, count_parameters
from recsys.models.attention import CrossConfig
from recsys.types import TrainingEvents

SIZE = {"d_model": 4, "d_ff": 2, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
# Even items are of domain 0, odd ones of domain 1. The second user has no event of domain 0 when it is asked.
HISTORIES = [[(2, 0, 1), (1, 1, 2), (4, 0, 3), (3, 1, 4), (5, 1, 5)], [(7, 1, 1), (5, 1, 2)], [(6, 0, 1), (9, 1, 2)]]
TARGETS = [[1, 4, 3, 5, 6], [5, 4], [9, 8]]
ASKED = [[1, 0, 1, 1, 0], [1, 0], [1, 0]]
EVENTS = [[2, 1, 4, 3, 5, 6], [7, 5, 4], [6, 9, 8], [2, 1, 6], [4, 2, 4, 2]]


def events_of(histories):
    lengths = torch.tensor([len(history) for history in histories])
    items = torch.tensor([item for history in histories for item in history])
    return TrainingEvents(
        items, torch.zeros_like(items), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    )


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, fitted=True, **config):
        model = stir(C2DSRConfig(**SIZE | config).build(make_catalog(num_domains, 11), 6))
        if fitted:
            model.fit(events_of(EVENTS))
        return model

    return make


@pytest.fixture
def batch(make_batch):
    made = make_batch(HISTORIES, ASKED)
    targets = torch.zeros_like(made.targets)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(made, targets=targets)


# The paper's equations in NumPy, user by user, event by event


@cache
def graph(within_domains):
    """Norm(A) as a matrix."""
    matrix = np.zeros((12, 12))
    for history in EVENTS:
        parts = [[item for item in history if item % 2 == k] for k in (0, 1)] if within_domains else [history]
        for part in parts:
            for item, following in pairwise(part):
                matrix[item, following] = 1
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def refined(table, within_domains, steps):
    norm, layer = graph(within_domains), table
    total = table.copy()
    for _ in range(steps):
        layer = norm @ layer
        total = total + layer
    return total / (steps + 1)


def encoder(x, weights, block, norm):
    allowed = np.tril(np.ones((len(x), len(x))))
    x = pre_norm_block(x, x, allowed, lambda inner: np.maximum(inner, 0), weights, block, 1)
    return layer_norm(x, weights, norm)


def mixed_states(items, weights, steps):
    table = refined(weights["embedding.items.weight"], False, steps)
    return encoder(table[items] + weights["positions.weight"][: len(items)], weights, "blocks.0", "norm")


def own_states(items, domain, weights, steps):
    """States at the domain's events, in order."""
    if not items:
        return np.zeros((0, 4))
    table = refined(weights["own_embedding.items.weight"], True, steps)
    positions = weights[f"own_positions.{domain}.weight"][1 : len(items) + 1]
    return encoder(table[items] + positions, weights, f"own_layers.0.{domain}", f"own_norms.{domain}")


def answers(weights, steps, row):
    """h + h^k and h at every event of a user, and the domains' own states."""
    items = [item for item, _, _ in HISTORIES[row]]
    mixed = mixed_states(items, weights, steps)
    own = [own_states([item for item in items if item % 2 == k], k, weights, steps) for k in (0, 1)]
    full = mixed.copy()
    for t, domain in enumerate(ASKED[row]):
        count = sum(item % 2 == domain for item in items[: t + 1])
        if count:
            full[t] += own[domain][count - 1]
    return full, mixed, own


def loss(weights, steps, corrupted):
    rows = [answers(weights, steps, row) for row in range(len(HISTORIES))]
    total = 0
    for answer in (0, 1):
        each = []
        for row, targets in enumerate(TARGETS):
            for state, target in zip(rows[row][answer], targets, strict=True):
                scores = weights["heads.weight"][[item for item in range(1, 12) if item % 2 == target % 2]] @ state
                each.append(np.log(np.exp(scores).sum()) - weights["heads.weight"][target] @ state)
        total += 0.7 * np.mean(each)
    for domain in (0, 1):
        users = []
        for row, history in enumerate(HISTORIES):
            items = [item for item, _, _ in history]
            own = rows[row][2][domain]
            elsewhere = [t for t, item in enumerate(items) if item % 2 != domain]
            if not len(own) or not elsewhere:
                continue
            z = own.mean(0) @ weights[f"discriminators.{domain}.weight"]
            true = z @ rows[row][1][elsewhere].mean(0)
            false = z @ mixed_states(corrupted[domain][row], weights, steps)[elsewhere].mean(0)
            users.append(np.log(1 + np.exp(-true)) + np.log(1 + np.exp(false)))
        total += 0.3 * np.mean(users)
    return total


def drawn(model, batch):
    """The corrupted histories that the model draws from seed 5, per domain kept and row."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for domain in (0, 1):
        rows = {}
        users = [row for row, history in enumerate(HISTORIES) if len({item % 2 for item, _, _ in history}) == 2]
        replaced = (batch.mask & (batch.domains != domain))[users]
        items = model._corrupt(batch.items[users], replaced, generator)
        for row, line in zip(users, items, strict=True):
            rows[row] = line[line > 0].tolist()
        found.append(rows)
    return found


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_states(steps, build, batch):
    model = build(graph_layers=steps)
    hidden = model(batch).detach().numpy()
    for row, history in enumerate(HISTORIES):
        expected = answers(weights_of(model), steps, row)[0]
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-10, atol=1e-12)


def test_objective_and_a_step(build, batch, make_catalog):
    model = build()
    corrupted = drawn(model, batch)
    criterion = SoftmaxConfig().build(make_catalog(2, 11))
    objective = model.objective(batch, torch.Generator().manual_seed(5))
    assert objective.batch is batch
    value = sum(
        weight * criterion(hidden, model.item_embeddings(), batch, None) for weight, hidden in objective.answers
    )
    torch.testing.assert_close(objective.answers[0][1], model(batch))
    assert_step(model, value + objective.terms["infomax"], lambda weights: loss(weights, 1, corrupted))


def test_the_graph_by_hand(build):
    model = build()
    for embedding, within in ((model.embedding, False), (model.own_embedding, True)):
        found = {
            item: embedding.successors[embedding.offsets[item] : embedding.offsets[item + 1]].tolist()
            for item in range(12)
        }
        expected = {item: np.nonzero(row)[0].tolist() for item, row in enumerate(graph(within))}
        assert found == expected
    own = model.own_embedding
    assert own.successors[own.offsets[4] : own.offsets[5]].tolist() == [2, 6]  # once each, however often they follow


def test_the_graph_holds_training_events_only():
    source = SyntheticConfig(num_users=30, items_per_domain=40, mean_events=12, max_events=20)
    data = load_data(DataConfig(source=source), None)
    model = C2DSRConfig(**SIZE).build(data.catalog, 50)
    model.fit(training_events(data.sequences, data.split))
    sequences, role = data.sequences, data.split.role
    allowed, all_pairs = set(), set()
    for user in range(sequences.num_users):
        events = slice(sequences.offsets[user], sequences.offsets[user + 1])
        items, kept = sequences.items[events].tolist(), (role[events] == TRAIN).tolist()
        training = [item for item, keep in zip(items, kept, strict=True) if keep]
        allowed |= set(pairwise(training))
        all_pairs |= set(pairwise(items))
    item = torch.repeat_interleave(model.embedding.offsets.diff())
    found = set(zip(item.tolist(), model.embedding.successors.tolist(), strict=True))
    assert found == allowed
    assert all_pairs - allowed
    names = sequences.item_domain
    item = torch.repeat_interleave(model.own_embedding.offsets.diff())
    assert (names[item] == names[model.own_embedding.successors]).all()


def test_the_graph_is_made_anew_and_not_saved(build):
    model, other = build(), build(fitted=False)
    assert not any("successors" in name or "pool" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model.embedding(), other.embedding())
    other.fit(events_of(EVENTS))
    assert torch.equal(model.embedding(), other.embedding())


def test_corruption_keeps_domains_and_repeats(build, batch):
    model = build()
    replaced = batch.mask & (batch.domains == 1)
    seen = set()
    for seed in range(60):
        items = model._corrupt(batch.items, replaced, torch.Generator().manual_seed(seed))
        assert torch.equal(items[~replaced], batch.items[~replaced])
        assert (items[replaced] % 2 == 1).all()
        seen |= set(items[replaced].tolist())
    assert seen == {1, 3, 5, 7, 9, 11}
    again = model._corrupt(batch.items, replaced, torch.Generator().manual_seed(59))
    assert torch.equal(items, again)


def test_no_single_domain_state_holds_another_domain_or_the_target(build, make_batch):
    """The gradient of the domains' own states reaches their own events alone, and never the last target."""
    model = build(graph_layers=0)
    batch = make_batch(HISTORIES, ASKED)
    _, own = model._own(batch)
    for domain, states in enumerate(own):
        (slope,) = torch.autograd.grad(
            (states[..., 0] + 0.3 * states[..., 1]).sum(), model.own_embedding.items.weight, retain_graph=True
        )
        touched = set(torch.nonzero(slope.any(1)).flatten().tolist())
        assert touched == {item for history in HISTORIES for item, k, _ in history if k == domain}
    assert model.embedding.items.weight.grad is None


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(num_heads=1), CrossConfig(num_heads=1, placement="stack")])
def test_a_step_changes_every_part(num_domains, cross, make_batch, make_catalog):
    config = C2DSRConfig(**SIZE | {"dropout": 0.1}, cross=cross)
    model = config.build(make_catalog(num_domains, 30), 8, torch.Generator().manual_seed(0)).train()
    model.fit(events_of([list(range(1, 30))]))
    items = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [9, 12]]
    batch = make_batch(
        [[(item, item % num_domains, t) for t, item in enumerate(row)] for row in items],
        [[(item + 1) % num_domains for item in row] for row in items],
    )
    objective = model.objective(batch, torch.Generator().manual_seed(1))
    value = sum(weight * hidden.square().sum() for weight, hidden in objective.answers)
    value = value + objective.terms["infomax"] + model.item_embeddings().square().sum()
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_targets_are_not_read(build, batch):
    model = build()
    scrambled = dataclasses.replace(batch, targets=batch.targets * 0 + 11)
    first, second = (model.objective(b, torch.Generator().manual_seed(2)) for b in (batch, scrambled))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first.answers, second.answers, strict=True))
    assert first.terms["infomax"] == second.terms["infomax"]


def test_no_user_in_two_domains_leaves_no_term(build, make_batch):
    model = build()
    batch = make_batch([[(2, 0, 1), (4, 0, 2)], [(1, 1, 1)]], [[0, 0], [1]])
    assert model.objective(batch, torch.Generator()).terms["infomax"] == 0


def test_the_shared_parts_start_alike_with_and_without(make_catalog):
    def start(cross):
        generator = torch.Generator().manual_seed(3)
        return C2DSRConfig(**SIZE, cross=cross).build(make_catalog(3), 12, generator).state_dict()

    null = start(None)
    for placement in ("early", "stack"):
        treated = start(CrossConfig(num_heads=1, placement=placement))
        assert null.keys() < treated.keys()
        assert all(torch.equal(null[name], treated[name]) for name in null)


def test_parameters_in_closed_form(make_catalog):
    n, d, ff, layers, length, domains = 60, 8, 12, 2, 10, 3
    config = C2DSRConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2)
    with torch.device("meta"):
        counts = count_parameters(config.build(make_catalog(domains, n), length))
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    assert counts == {
        "item_table": 3 * (n + 1) * d,
        "other_embeddings": (length + domains * (length + 1)) * d,
        "encoder": (1 + domains) * layers * block,
        "cross_attention": 0,
        "gate": 0,
        "output": (1 + domains) * 2 * d + domains * d * d,
        "total": counts["total"],
    }


def test_one_domain_is_refused(make_catalog):
    with pytest.raises(ValueError, match="c2dsr contrasts domains and the data has one"):
        C2DSRConfig(**SIZE).build(make_catalog(1), 6)
