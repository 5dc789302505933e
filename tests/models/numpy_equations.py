"""Pieces of the papers' equations in NumPy, on one user's events without padding (rows are events), and how a model's
gradient is compared with them. Weights are looked up by the names that the model's parameters have."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import erf

# Two users' training rows, (item, domain, time), and the item that follows each event. Even items are of domain 0.
NUM_ITEMS = 11
HISTORIES = [[(2, 0, 100), (3, 1, 100), (4, 0, 103), (5, 1, 900)], [(6, 0, 50), (9, 1, 51)]]
TARGETS = [[3, 4, 5, 8], [9, 10]]
ASKED = [[item % 2 for item in row] for row in TARGETS]


def training_batch(make_batch):
    batch = make_batch(HISTORIES, ASKED, pad=1)
    targets = torch.zeros_like(batch.items)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(batch, targets=targets)


def items_of(domain):
    return [item for item in range(1, NUM_ITEMS + 1) if item % 2 == domain]


def weights_of(model):
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def attention(query, context, allowed, weights, name, num_heads):
    """Concat(softmax(Q_h K_h^T / sqrt(d_h)) V_h) W_o; `allowed[t, s]` says whether t may look at s."""
    d = query.shape[1] // num_heads
    q = linear(query, weights, f"{name}.query")
    k, v = np.split(linear(context, weights, f"{name}.key_value"), 2, axis=1)
    heads = []
    for h in range(num_heads):
        part = slice(h * d, (h + 1) * d)
        share = np.exp(q[:, part] @ k[:, part].T / np.sqrt(d)) * allowed
        heads.append(share / share.sum(1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(heads, axis=1), weights, f"{name}.output")


def feed_forward(x, activation, weights, name):
    return linear(activation(linear(x, weights, f"{name}.0")), weights, f"{name}.2")


def post_norm_block(query, context, allowed, activation, weights, name, num_heads):
    """LN(x + FFN(x)) with x = LN(query + attention)."""
    read = attention(query, context, allowed, weights, f"{name}.attention", num_heads)
    x = layer_norm(query + read, weights, f"{name}.attention_norm")
    return layer_norm(
        x + feed_forward(x, activation, weights, f"{name}.feed_forward"), weights, f"{name}.feed_forward_norm"
    )


def pre_norm_block(query, context, allowed, activation, weights, name, num_heads):
    """x + FFN(LN(x)) with x = query + attention of the normed."""
    asking, asked = (layer_norm(part, weights, f"{name}.attention_norm") for part in (query, context))
    x = query + attention(asking, asked, allowed, weights, f"{name}.attention", num_heads)
    normed = layer_norm(x, weights, f"{name}.feed_forward_norm")
    return x + feed_forward(normed, activation, weights, f"{name}.feed_forward")


def cross_entropy(state, table, target):
    """-log softmax(state . table)[target] over the items of the target's domain."""
    return np.log(np.exp(table[items_of(target % 2)] @ state).sum()) - table[target] @ state


def assert_step(model, value, loss, rate=0.1):
    """A step of plain gradient descent on `value` against central differences of `loss(weights)`, weight by weight."""
    weights = weights_of(model)
    assert value.item() == pytest.approx(loss(weights), rel=1e-9)
    value.backward()
    torch.optim.SGD(model.parameters(), lr=rate).step()
    moved = 0
    for name, after in weights_of(model).items():
        flat = weights[name].reshape(-1)
        for place, before in enumerate(flat.copy()):
            flat[place] = before + 1e-5
            high = loss(weights)
            flat[place] = before - 1e-5
            low = loss(weights)
            flat[place] = before
            expected = before - rate * (high - low) / 2e-5
            assert after.reshape(-1)[place] == pytest.approx(expected, abs=2e-8), (name, place)
            moved += expected != before
    assert moved > sum(array.size for array in weights.values()) / 3
