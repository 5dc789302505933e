"""Cross-attention: the unit's equations, rows with nothing to attend to, probe sites, sizes."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recsys.models.attention import (
    CrossAttention,
    CrossConfig,
    ElementwiseGate,
    GatedCrossAttention,
    MultiHeadAttention,
)
from recsys.models.initialization import initialize


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(gate: str = "sigmoid", layer_norm: bool = True, d_model: int = 4, num_heads: int = 2) -> GatedCrossAttention:
    config = CrossConfig(gate=gate, layer_norm=layer_norm, num_heads=num_heads, dropout=0.5)
    module = config.build(d_model).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def by_hand(module: GatedCrossAttention, gate: str, layer_norm: bool, query, context, mask) -> np.ndarray:
    """X + g * X' for one row of a batch, head by head and pair by pair."""
    weight = {name: value.numpy() for name, value in module.state_dict().items()}
    length, d_model = query.shape
    heads, width = 2, d_model // 2

    def norm(x, name):
        if not layer_norm:
            return x
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / spread * weight[f"attention.{name}.weight"] + weight[f"attention.{name}.bias"]

    x, y = norm(query, "query_norm"), norm(context, "context_norm")
    q = x @ weight["attention.heads.query.weight"].T + weight["attention.heads.query.bias"]
    key_value = y @ weight["attention.heads.key_value.weight"].T + weight["attention.heads.key_value.bias"]
    k, v = key_value[:, :d_model], key_value[:, d_model:]
    result = np.zeros_like(query)
    for i in range(length):
        seen = [j for j in range(len(context)) if mask[i, j]]
        output = np.zeros(d_model)
        if seen:
            joined = np.zeros(d_model)
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                share = np.array([math.exp(q[i, part] @ k[j, part] / math.sqrt(width)) for j in seen])
                joined[part] = (share / share.sum()) @ v[seen, part]
            output = weight["attention.heads.output.weight"] @ joined + weight["attention.heads.output.bias"]
        if gate == "none":
            g = np.ones(d_model)
        elif gate == "scalar":
            g = np.full(d_model, math.tanh(weight["gate.alpha"]))
        else:
            both = np.concatenate([query[i], output])
            inner = weight["gate.feed_forward.0.weight"] @ both + weight["gate.feed_forward.0.bias"]
            inner = np.array([z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in inner])
            outer = weight["gate.feed_forward.2.weight"] @ inner + weight["gate.feed_forward.2.bias"]
            g = np.tanh(outer) if gate == "tanh" else 1 / (1 + np.exp(-outer))
        result[i] = query[i] + g * output
    return result


MASK = torch.tensor([[[True, False, False], [False, False, False], [True, True, False], [False, True, True]]])


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "scalar", "none"])
def test_unit_equals_its_equations_forward_and_backward(gate, layer_norm):
    module = unit(gate, layer_norm)
    query, context = draw(1, 4, 4).requires_grad_(), draw(1, 3, 4, seed=1).requires_grad_()
    result = module(query, context, MASK)
    numbers = [query.detach()[0].numpy(), context.detach()[0].numpy()]
    expected = by_hand(module, gate, layer_norm, *numbers, MASK[0])
    np.testing.assert_allclose(result.detach()[0], expected, rtol=1e-12, atol=1e-13)

    slope = draw(4, 4, seed=2).numpy()
    (result * torch.tensor(slope)).sum().backward()
    step = 1e-6
    for side, tensor in enumerate((query, context)):
        for place in np.ndindex(*numbers[side].shape):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in numbers]
                moved[side][place] += sign * step
                ends.append((by_hand(module, gate, layer_norm, *moved, MASK[0]) * slope).sum())
            assert tensor.grad[0][place] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


def test_a_known_answer():
    """One head, identity projections, no LayerNorm: equal keys give the mean value, plus the bias of the way out."""
    attention = CrossAttention(2, 1, layer_norm=False)
    identity = torch.eye(2)
    with torch.no_grad():
        attention.heads.query.weight.copy_(identity)
        attention.heads.key_value.weight.copy_(torch.cat([torch.zeros(2, 2), identity]))
        attention.heads.output.weight.copy_(2 * identity)
        for part in (attention.heads.query, attention.heads.key_value, attention.heads.output):
            part.bias.zero_()
        attention.heads.output.bias.copy_(torch.tensor([10.0, 20.0]))
    context = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[[True, True, False], [False, False, False]]])
    output = attention(torch.ones(1, 2, 2), context, mask)
    assert output.tolist() == [[[14.0, 28.0], [0.0, 0.0]]]


def plain_attention(query, key, value, attn_mask):
    """A kernel that knows no mercy: a row with nothing to attend to is NaN."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~attn_mask, -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [nn.functional.scaled_dot_product_attention, plain_attention])
def test_nothing_to_attend_to_gives_zeros_and_no_gradient(kernel, monkeypatch):
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kernel)
    module = unit()
    query, context = draw(2, 3, 4).requires_grad_(), draw(2, 5, 4).requires_grad_()
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[1, 2, :2] = True
    output = module.attention(query, context, mask)
    assert (output[0] == 0).all()
    assert (output[1, :2] == 0).all()
    assert (output[1, 2] != 0).all()
    result = module(query, context, mask)
    assert torch.equal(result[0], query[0])
    result.square().sum().backward()
    for tensor in (query, context, *module.parameters()):
        assert tensor.grad.isfinite().all()
    assert torch.equal(query.grad[0], 2 * query[0])
    assert (context.grad[0] == 0).all()
    assert (context.grad[1, 2:] == 0).all()
    assert (context.grad[1, :2] != 0).any()


def test_an_empty_context_gives_zeros():
    output = unit().attention(draw(2, 3, 4), draw(2, 0, 4), torch.zeros(2, 3, 0, dtype=torch.bool))
    assert torch.equal(output, torch.zeros(2, 3, 4, dtype=torch.float64))


def test_a_masked_context_changes_nothing():
    module = unit()
    query, context = draw(1, 4, 4), draw(1, 3, 4)
    other = context.clone()
    other[0, 2] = 1e6
    before, after = module(query, context, MASK), module(query, other, MASK)
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3], after[0, 3])


def test_hooks_see_and_replace_every_site():
    module = unit()
    query, context = draw(1, 4, 4), draw(1, 3, 4)
    seen = {}
    handles = [
        module.attention.register_forward_pre_hook(lambda _, inputs: seen.update(query=inputs[0])),
        module.attention.register_forward_hook(lambda _, __, output: seen.update(output=output)),
        module.gate.register_forward_hook(lambda _, __, output: seen.update(gate=output)),
        module.update.register_forward_hook(lambda _, __, output: seen.update(update=output)),
        module.register_forward_hook(lambda _, __, output: seen.update(result=output)),
    ]
    module(query, context, MASK)
    assert torch.equal(seen["query"], query)
    assert torch.equal(seen["update"], seen["gate"] * seen["output"])
    assert torch.equal(seen["result"], query + seen["update"])
    for handle in handles:
        handle.remove()

    def replaced(site: nn.Module, value: float) -> torch.Tensor:
        handle = site.register_forward_hook(lambda _, __, output: torch.full_like(output, value))
        result = module(query, context, MASK)
        handle.remove()
        return result

    assert torch.equal(replaced(module.update, 3), query + 3)
    assert torch.equal(replaced(module.gate, 0), query)
    assert torch.equal(replaced(module.attention, 0), query)
    assert torch.equal(replaced(module, 7), torch.full_like(query, 7))


@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "scalar", "none"])
def test_every_gate_shows_one_value_per_coordinate(gate):
    module = unit(gate)
    assert module.gate(draw(2, 3, 4), draw(2, 3, 4)).shape == (2, 3, 4)


def test_a_scalar_gate_starts_closed_but_learns():
    module = CrossConfig(gate="scalar", dropout=0.0).build(4)
    initialize(module, torch.Generator().manual_seed(0))
    query, context = draw(1, 4, 4).float(), draw(1, 3, 4).float()
    result = module(query, context, MASK)
    assert torch.equal(result, query)
    result.sum().backward()
    assert module.gate.alpha.grad != 0


def test_an_elementwise_gate_starts_at_its_middle():
    gate = ElementwiseGate(8, torch.sigmoid)
    initialize(gate, torch.Generator().manual_seed(0))
    assert (gate(draw(2, 3, 8).float(), draw(2, 3, 8).float()) - 0.5).abs().max() < 0.02


@pytest.mark.parametrize(("layer_norm", "linear"), [(True, 13), (False, 9)])
def test_size_of_a_unit(layer_norm, linear):
    """16 d² and a little: projections 4 d² + 4 d, two LayerNorms 4 d, gate 12 d² + 5 d."""
    d = 256
    with torch.device("meta"):
        module = CrossConfig(layer_norm=layer_norm).build(d)
    assert sum(parameter.numel() for parameter in module.parameters()) == 16 * d**2 + linear * d


def test_heads_do_not_mix_before_the_way_out():
    """Two heads of width 2 are two attentions of width 2 side by side."""
    both = MultiHeadAttention(4, 2).double()
    with torch.no_grad():
        both.output.weight.copy_(torch.eye(4))
        both.output.bias.zero_()
        both.key_value.weight[:2] = 0  # the first head's keys are all the same: its share is uniform
        both.key_value.bias[:2] = 0
    context = draw(1, 3, 4)
    output = both(draw(1, 2, 4), context, torch.ones(1, 2, 3, dtype=torch.bool))
    values = both.key_value(context)[..., 4:]
    torch.testing.assert_close(output[..., :2], values[..., :2].mean(1, keepdim=True).expand(1, 2, 2))
    assert not torch.allclose(output[..., 2:], values[..., 2:].mean(1, keepdim=True))


def test_config_refuses():
    for bad in ({"gate": "relu"}, {"num_units": 0}, {"placement": "late"}, {"dropout": 1.0}, {"units": 1}):
        with pytest.raises(ValidationError):
            CrossConfig(**bad)
