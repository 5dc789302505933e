"""AutoCDSR+ against its equations: what the tokens carry, the attention they are paid, and where they must not leak."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy_equations import assert_step, gelu, layer_norm, linear, pre_norm_block, weights_of
from pydantic import ValidationError

from recsys.losses import SoftmaxConfig
from recsys.models import AutoCDSRPlusConfig, count_parameters
from recsys.models.attention import CrossConfig

SIZE = {"d_model": 4, "d_ff": 2, "num_layers": 2, "num_heads": 2, "num_bottlenecks": 2, "dropout": 0.0}
# Even items are of domain 0, odd ones of domain 1. The last question is of a domain that the user has not shown.
HISTORIES = [[(2, 0, 1), (1, 1, 2), (4, 0, 3)], [(9, 1, 1)]]
TARGETS = [[3, 4, 5], [8]]
ASKED = [[item % 2 for item in row] for row in TARGETS]


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, **config):
        return stir(AutoCDSRPlusConfig(**SIZE | config).build(make_catalog(num_domains, 11), 6))

    return make


@pytest.fixture
def batch(make_batch):
    made = make_batch(HISTORIES, ASKED, pad=1)
    targets = torch.zeros_like(made.targets)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(made, targets=targets)


# The equations in NumPy, user by user, position by position


def to_tokens(state, context, weights, name):
    """Attention of one state to the first two of its context, summed over heads."""
    asking, asked = (layer_norm(part, weights, f"{name}.attention_norm") for part in (state, context))
    q = linear(asking, weights, f"{name}.attention.query")[0]
    k = linear(asked, weights, f"{name}.attention.key_value")[:, :4]
    total = 0
    for head in (slice(0, 2), slice(2, 4)):
        share = np.exp(k[:, head] @ q[head] / np.sqrt(2))
        total += share[:2].sum() / share.sum()
    return total


def encode(history, asked, weights):
    """The answers, and the attention of every event to the tokens, over the blocks."""
    items = [item for item, _, _ in history]
    slots = {0: {}, 1: {}}
    for t, (_, domain, _) in enumerate(history):
        for k in {domain, asked[t]}:
            own = [item for item in items[: t + 1] if item % 2 == k]
            vector = weights["embedding.items.weight"][own[-1] if own else 0]
            slots[k][t] = vector + weights["embedding.positions.weight"][len(own)]
    tokens = [weights["bottlenecks.weight"] for _ in items]
    shares = []
    for layer in (0, 1):
        after, reads = {0: {}, 1: {}}, [[] for _ in items]
        for k in (0, 1):
            name = f"layers.{layer}.{k}"
            for t in range(len(items)):
                events = [slots[k][s] for s in range(t + 1) if items[s] % 2 == k]
                context = np.stack([*tokens[t], *events])
                everything = np.ones((1, len(context)))
                if t in slots[k]:
                    state = slots[k][t][None]
                    after[k][t] = pre_norm_block(state, context, everything, gelu, weights, name, 2)[0]
                    if items[t] % 2 == k:
                        shares.append(to_tokens(state, context, weights, name) / 2)
                if events:
                    both = np.repeat(everything, 2, axis=0)
                    reads[t].append(pre_norm_block(tokens[t], context, both, gelu, weights, name, 2))
        slots, tokens = after, [np.mean(read, axis=0) for read in reads]
    return np.stack([layer_norm(slots[k][t], weights, f"norms.{k}") for t, k in enumerate(asked)]), shares


def losses(weights, histories=HISTORIES, all_targets=TARGETS):
    """The run's loss and l_cd."""
    table = weights["embedding.items.weight"]
    each, across = [], []
    for history, targets in zip(histories, all_targets, strict=True):
        states, shares = encode(history, [target % 2 for target in targets], weights)
        across.extend(shares)
        for state, target in zip(states, targets, strict=True):
            scores = table[[item for item in range(1, 12) if item % 2 == target % 2]] @ state
            each.append(np.log(np.exp(scores).sum()) - table[target] @ state)
    return np.mean(each), np.mean(across)


def test_states_and_attention_to_tokens(build, batch):
    model = build()
    hidden = model(batch).detach().numpy()
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        expected, _ = encode(history, asked, weights_of(model))
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-10, atol=1e-12)
    objective = model.objective(batch, torch.Generator())
    assert torch.equal(objective.answers[0][1], model(batch))
    assert objective.terms["cross_attention"].item() == pytest.approx(losses(weights_of(model))[1])


def test_a_step(build, batch, make_catalog):
    """On the first user's first two events: the weights are many, and each is moved twice."""
    model = build(attention_weight=2.0)
    criterion = SoftmaxConfig().build(make_catalog(2, 11))
    short = batch.map(lambda column: column[:1, :3] if column.ndim == 2 else column[:1])
    objective = model.objective(short, torch.Generator())
    value = criterion(objective.answers[0][1], model.item_embeddings(), short, None)

    def loss(weights):
        weights = weights | {"embedding.items.weight": without_padding(weights)}
        return np.dot(losses(weights, [HISTORIES[0][:2]], [TARGETS[0][:2]]), [1, 2])

    assert_step(model, value + objective.terms["cross_attention"], loss)


def without_padding(weights):
    table = weights["embedding.items.weight"].copy()
    table[0] = 0
    return table


def test_tokens_are_the_only_way_across(build, make_batch):
    """Where no state looks at a token, other domains' items change nothing; otherwise they do."""
    model = build(num_domains=3)
    history = [(1, 0, 1), (2, 1, 2), (3, 2, 3), (4, 1, 4), (6, 0, 5)]
    others = [(1, 0, 1), (5, 1, 2), (9, 2, 3), (8, 1, 4), (6, 0, 5)]
    asked = [[0] * 5]
    first, second = (model(make_batch([events], asked))[0] for events in (history, others))
    assert torch.equal(first[0], second[0])
    assert (first[1:] != second[1:]).any(-1).all()
    mask = model._mask

    def without_tokens(batch, streams, domain):
        allowed = mask(batch, streams, domain)
        width = 2 * batch.items.shape[1]
        allowed[:, width:, :width] = False
        return allowed

    model._mask = without_tokens
    first, second = (model(make_batch([events], asked))[0] for events in (history, others))
    assert torch.equal(first, second)


def test_attention_without_users_or_events(build, make_batch):
    nothing = make_batch([[]], [[]], pad=2)
    assert build().objective(nothing, torch.Generator()).terms["cross_attention"] == 0


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(), CrossConfig(placement="stack", num_units=2)])
def test_a_step_changes_every_part(num_domains, cross, make_batch, make_catalog):
    config = AutoCDSRPlusConfig(**SIZE | {"dropout": 0.1}, cross=cross)
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
        return AutoCDSRPlusConfig(**SIZE, cross=cross).build(make_catalog(3), 12, generator).state_dict()

    null = start(None)
    for placement in ("early", "stack"):
        treated = start(CrossConfig(placement=placement))
        assert null.keys() < treated.keys()
        assert all(torch.equal(null[name], treated[name]) for name in null)


def test_parameters_in_closed_form(make_catalog):
    n, d, ff, layers, length, domains = 60, 8, 12, 2, 10, 3
    config = AutoCDSRPlusConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2, num_bottlenecks=4)
    with torch.device("meta"):
        counts = count_parameters(config.build(make_catalog(domains, n), length))
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    assert counts == {
        "item_table": (n + 1) * d,
        "other_embeddings": (length + 1 + 4) * d,
        "encoder": domains * layers * block,
        "cross_attention": 0,
        "gate": 0,
        "output": domains * 2 * d,
        "total": counts["total"],
    }


def test_one_block_has_no_transfer_and_is_refused():
    with pytest.raises(ValidationError, match="num_layers"):
        AutoCDSRPlusConfig(num_layers=1)
