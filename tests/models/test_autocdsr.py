"""AutoCDSR against its equations: the states, the attention that crosses domains, and what an exchange may know."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy_equations import assert_step, gelu, layer_norm, linear, post_norm_block, pre_norm_block, weights_of

from recsys.losses import SoftmaxConfig
from recsys.models import AutoCDSRConfig, SASRecConfig, count_parameters
from recsys.models.attention import CrossConfig

SIZE = {"d_model": 4, "d_ff": 3, "num_layers": 2, "num_heads": 2, "dropout": 0.0}
# Even items are of domain 0, odd ones of domain 1. The last user knows one domain.
HISTORIES = [[(2, 0, 1), (1, 1, 2), (4, 0, 3), (3, 1, 4)], [(6, 0, 1), (9, 1, 2)], [(8, 0, 3)]]
TARGETS = [[1, 4, 3, 5], [9, 8], [2]]
ASKED = [[item % 2 for item in row] for row in TARGETS]


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, **config):
        return stir(AutoCDSRConfig(**SIZE | config).build(make_catalog(num_domains, 11), 6))

    return make


@pytest.fixture
def batch(make_batch):
    made = make_batch(HISTORIES, ASKED, pad=1)
    targets = torch.zeros_like(made.targets)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(made, targets=targets)


# The paper's equations in NumPy, user by user


def encode(items, weights, norm_first):
    """The final states, and per event the attention to the other domain, summed over blocks and heads."""
    x = weights["embedding.items.weight"][items] + weights["embedding.positions.weight"][: len(items)]
    allowed = np.tril(np.ones((len(items), len(items))))
    other = np.array([[i % 2 != j % 2 for j in items] for i in items])
    across = np.zeros(len(items))
    for layer in (0, 1):
        name = f"blocks.{layer}"
        asking = layer_norm(x, weights, f"{name}.attention_norm") if norm_first else x
        q = linear(asking, weights, f"{name}.attention.query")
        k = linear(asking, weights, f"{name}.attention.key_value")[:, :4]
        for head in (slice(0, 2), slice(2, 4)):
            share = np.exp(q[:, head] @ k[:, head].T / np.sqrt(2)) * allowed
            across += (share / share.sum(1, keepdims=True) * other).sum(1)
        block = pre_norm_block if norm_first else post_norm_block
        x = block(x, x, allowed, gelu, weights, name, 2)
    return layer_norm(x, weights, "norm"), across


def losses(weights, norm_first=True):
    """The run's loss and l_cd."""
    table = weights["embedding.items.weight"]
    each, across = [], []
    for history, targets in zip(HISTORIES, TARGETS, strict=True):
        states, shares = encode([item for item, _, _ in history], weights, norm_first)
        across.extend(shares / 4)
        for state, target in zip(states, targets, strict=True):
            scores = table[[item for item in range(1, 12) if item % 2 == target % 2]] @ state
            each.append(np.log(np.exp(scores).sum()) - table[target] @ state)
    return np.mean(each), np.mean(across)


@pytest.mark.parametrize("norm_first", [True, False])
def test_states_and_cross_domain_attention(norm_first, build, batch):
    model = build(norm_first=norm_first)
    hidden = model(batch).detach().numpy()
    for row, history in enumerate(HISTORIES):
        expected, _ = encode([item for item, _, _ in history], weights_of(model), norm_first)
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-10, atol=1e-12)
    objective = model.objective(batch, torch.Generator())
    assert objective.batch is batch
    [(weight, state)] = objective.answers
    assert weight == 1
    assert torch.equal(state, model(batch))
    assert objective.terms["cross_attention"].item() == pytest.approx(losses(weights_of(model), norm_first)[1])


def test_a_step(build, batch, make_catalog):
    model = build(attention_weight=2.0)
    criterion = SoftmaxConfig().build(make_catalog(2, 11))
    objective = model.objective(batch, torch.Generator())
    value = criterion(objective.answers[0][1], model.item_embeddings(), batch, None)
    assert_step(model, value + objective.terms["cross_attention"], lambda weights: np.dot(losses(weights), [1, 2]))


def test_one_domain_pays_no_attention_to_others(build, make_batch):
    model = build()
    one = make_batch([[(2, 0, 1), (4, 0, 2), (6, 0, 3)]], [[0, 0, 0]])
    assert model.objective(one, torch.Generator()).terms["cross_attention"].item() == pytest.approx(0)
    nothing = make_batch([[]], [[]], pad=2)
    assert model.objective(nothing, torch.Generator()).terms["cross_attention"] == 0


def test_even_attention_by_hand(build, make_batch):
    """With queries of zero each event looks at all so far alike: 0, 1/2, 2/3 and 2/4 of it across three domains."""
    model = build(num_domains=3)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.query.weight)
        torch.nn.init.zeros_(block.attention.query.bias)
    batch = make_batch([[(1, 0, 1), (2, 1, 2), (3, 2, 3), (4, 1, 4)]], [[0, 0, 0, 0]], pad=2)
    term = model.objective(batch, torch.Generator()).terms["cross_attention"]
    assert term.item() == pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 4) / 4)


def test_the_encoder_is_that_of_sasrec(build, make_catalog, make_batch):
    ours = build()
    theirs = SASRecConfig(**SIZE, domain_embedding=False).build(make_catalog(2, 11), 6).double().eval()
    theirs.load_state_dict(ours.state_dict())
    batch = make_batch(HISTORIES, ASKED)
    assert torch.equal(ours(batch), theirs(batch))


def test_an_exchange_moves_what_has_seen_another_domain(build, make_batch):
    """Without it the state of a user's first domain would be the same; ties in time settle what a unit may read."""
    null, early = build(), build(cross=CrossConfig())
    early.load_state_dict(null.state_dict(), strict=False)
    batch = make_batch(HISTORIES, ASKED)
    moved = (null(batch) != early(batch)).any(-1)
    assert moved.tolist() == [[False, True, True, True], [False, False, False, True], [False] * 4]


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_a_unit_reads_other_domains_alone(placement, build, make_batch):
    model = build(num_domains=3, cross=CrossConfig(placement=placement))
    seen = {}
    [units] = model.early if placement == "early" else model.stack
    for domain, unit in enumerate(units):
        unit.register_forward_hook(lambda _, given, result, domain=domain: seen.update({domain: given}))
    history = [(1, 0, 1), (2, 1, 2), (3, 2, 2), (4, 1, 4)]
    model(make_batch([history], [[0, 0, 0, 0]]))
    for domain, (query, context, mask) in seen.items():
        own = [t for t, event in enumerate(history) if event[1] == domain]
        torch.testing.assert_close(query[0], context[0, own])
        for line, t in enumerate(own):
            assert mask[0, line].tolist() == [s <= t and history[s][1] != domain for s in range(4)]


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(), CrossConfig(placement="stack", num_units=2)])
def test_a_step_changes_every_part(num_domains, cross, make_batch, make_catalog):
    config = AutoCDSRConfig(**SIZE | {"dropout": 0.1}, cross=cross)
    model = config.build(make_catalog(num_domains, 30), 8, torch.Generator().manual_seed(0)).train()
    items = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [9, 12]]
    batch = make_batch(
        [[(item, item % num_domains, t) for t, item in enumerate(row)] for row in items],
        [[(item + 1) % num_domains for item in row] for row in items],
    )
    objective = model.objective(batch, torch.Generator())
    value = objective.answers[0][1][..., 0].square().sum() + objective.terms["cross_attention"]
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_the_shared_parts_start_alike_with_and_without(make_catalog):
    def start(cross):
        generator = torch.Generator().manual_seed(3)
        return AutoCDSRConfig(**SIZE, cross=cross).build(make_catalog(3), 12, generator).state_dict()

    null = start(None)
    for placement in ("early", "stack"):
        treated = start(CrossConfig(placement=placement))
        assert null.keys() < treated.keys()
        assert all(torch.equal(null[name], treated[name]) for name in null)


def test_parameters_in_closed_form(make_catalog):
    n, d, ff, layers, length = 60, 8, 12, 2, 10
    with torch.device("meta"):
        model = AutoCDSRConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2).build(make_catalog(3, n), length)
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    counts = count_parameters(model)
    assert counts == {
        "item_table": (n + 1) * d,
        "other_embeddings": length * d,
        "encoder": layers * block,
        "cross_attention": 0,
        "gate": 0,
        "output": 2 * d,
        "total": counts["total"],
    }
