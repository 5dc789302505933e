"""What the units of an exchange read, and the controls that read something else with the same parameters."""

import dataclasses

import pytest
import torch

from recsys.models import CrossDomainConfig, count_parameters
from recsys.models.attention import CrossConfig
from recsys.models.exchange import context_rows, look, make_units
from recsys.models.streams import cut_streams

SIZE = {"d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}
FIRST = [(1, 0, 5), (2, 1, 6), (3, 1, 6), (5, 0, 9)]
SECOND = [(11, 1, 4), (12, 0, 6), (13, 1, 6), (14, 1, 8)]
ASKED = [1, 1, 0, 1]


@pytest.fixture
def build(make_catalog, stir):
    def make(**cross):
        config = CrossDomainConfig(**SIZE, cross=CrossConfig(**cross))
        return stir(config.build(make_catalog(2), 12, torch.Generator().manual_seed(0)))

    return make


@pytest.fixture
def views(make_batch):
    """The masks of both domains for two users, each of whom asks in domain 0 at the end."""

    def make(context):
        batch = make_batch([FIRST, SECOND], [[None, None, None, 0]] * 2)
        units = make_units(CrossConfig(context=context), 2, 8, None)[0]
        return batch, look(batch, cut_streams(batch, 2), units)

    return make


def change(history, domain):
    return [(item + 20, k, time) if k == domain else (item, k, time) for item, k, time in history]


def test_others_by_hand(views):
    _, view = views("others")
    assert view.rows.tolist() == [0, 1]
    # Stream of domain 0: slots at 0 and 3 of the first user, at 1 and 3 of the second.
    assert view.masks[0].int().tolist() == [[[0, 0, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 0], [1, 0, 1, 1]]]


def test_own_by_hand(views):
    _, view = views("own")
    assert view.rows.tolist() == [0, 1]
    assert view.masks[0].int().tolist() == [[[1, 0, 0, 0], [1, 0, 0, 1]], [[0, 1, 0, 0], [0, 1, 0, 0]]]


def test_shuffled_by_hand(views):
    """The other user's events of the other domain, by time alone: the second user's at 4 and 6 before time 6."""
    _, view = views("shuffled")
    assert view.rows.tolist() == [1, 0]
    # First user's slots at times 5 and 9, second user's at 6 and 8.
    assert view.masks[0].int().tolist() == [[[1, 0, 0, 0], [1, 0, 1, 1]], [[0, 1, 1, 0], [0, 1, 1, 0]]]


def test_the_controls_have_the_parameters_of_the_exchange(make_catalog):
    def start(**cross):
        config = CrossDomainConfig(**SIZE, cross=CrossConfig(**cross))
        return config.build(make_catalog(2), 12, torch.Generator().manual_seed(1))

    free = start()
    for control in ({"context": "own"}, {"context": "shuffled"}, {"update": "orthogonal"}, {"frozen": True}):
        model = start(**control)
        assert count_parameters(model) == count_parameters(free)
        states = zip(model.state_dict().values(), free.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in states)


def test_own_sees_no_other_domain(build, make_batch):
    model = build(context="own")
    before = model(make_batch([FIRST], [ASKED]))[0]
    after = model(make_batch([change(FIRST, 1)], [ASKED]))[0]
    for t, asked in enumerate(ASKED):
        assert torch.equal(before[t], after[t]) == (asked == 0 or t == 0)


def test_shuffled_reads_the_other_user_and_not_the_own_other_domain(build, make_batch):
    model = build(context="shuffled")
    last = [None, None, None, 0]
    before = model(make_batch([FIRST, SECOND], [last, last]))[0, -1]
    assert torch.equal(before, model(make_batch([change(FIRST, 1), SECOND], [last, last]))[0, -1])
    assert not torch.equal(before, model(make_batch([FIRST, change(SECOND, 1)], [last, last]))[0, -1])
    later = [*SECOND[:3], (14, 1, 10)]  # behind the question's time, 9
    assert torch.equal(
        model(make_batch([FIRST, later], [last, last]))[0, -1],
        model(make_batch([FIRST, [*SECOND[:3], (34, 1, 10)]], [last, last]))[0, -1],
    )


@pytest.mark.parametrize("context", ["others", "own", "shuffled"])
def test_nothing_later_changes_what_was_before(context, build, make_batch):
    """Neither in the user's own states nor, with another's history as context, in anybody's of an earlier time."""
    model = build(context=context, placement="stack", num_units=2)
    whole = model(make_batch([FIRST, SECOND], [ASKED, ASKED]))
    changed = [(30, 1, 9)]
    again = model(make_batch([FIRST[:3] + changed, SECOND], [ASKED, ASKED]))
    torch.testing.assert_close(whole[0, :3], again[0, :3])
    times = torch.tensor([event[2] for event in SECOND])
    torch.testing.assert_close(whole[1][times < 9], again[1][times < 9])


def test_the_partner_is_the_next_row_of_another_user(make_batch):
    batch = make_batch([FIRST] * 5, [ASKED] * 5)
    batch = dataclasses.replace(batch, user=torch.tensor([3, 3, 4, 9, 9]))
    rows, there = context_rows(batch, "shuffled")
    assert rows.tolist() == [2, 2, 3, 0, 0]
    assert there.all()
    repeated = dataclasses.replace(batch, user=torch.tensor([3, 4, 9, 9, 9]))  # as an evaluation fills up its batches
    assert context_rows(repeated, "shuffled")[0].tolist() == [1, 2, 0, 0, 0]


def test_a_batch_of_one_user_has_nobody_to_read(build, make_batch):
    model = build(context="shuffled")
    batch = make_batch([FIRST], [ASKED])
    assert not context_rows(batch, "shuffled")[1].any()
    assert torch.equal(model(batch), model(make_batch([change(FIRST, 1)], [ASKED]))) is False  # the own stream of 1
    with_exchange, without = model(batch)[0, 2], build(context="shuffled")(batch)[0, 2]
    assert torch.equal(with_exchange, without)
    for unit in model.early[0]:
        torch.nn.init.ones_(unit.attention.heads.output.bias)
    assert torch.equal(model(batch)[0, 2], without)


@pytest.mark.parametrize("direction", ["orthogonal", "parallel"])
def test_an_update_is_projected_token_by_token(direction, build, make_batch):
    model = build(update=direction)
    seen = {}
    unit = model.early[0][0]
    unit.update.register_forward_hook(lambda _, given, output: seen.update(query=given[0], given=given[1], out=output))
    model(make_batch([FIRST, SECOND], [ASKED, ASKED]))
    query, given, out = seen["query"], seen["given"], seen["out"]
    moved = given.abs().sum(-1) > 0
    assert moved.any()
    cos = torch.cosine_similarity(query, out, dim=-1)[moved]
    torch.testing.assert_close(cos.abs(), torch.full_like(cos, float(direction == "parallel")), atol=1e-9, rtol=0)
    other = given - out
    torch.testing.assert_close((other * out).sum(-1), torch.zeros_like(other[..., 0]), atol=1e-9, rtol=0)
    assert out.isfinite().all()


def test_the_two_parts_by_hand(build):
    x, y = torch.tensor([[[3.0, 0, 4], [0, 0, 0]]]), torch.tensor([[[1.0, 2, 0], [1, 2, 0]]])
    parts = {}
    for direction in ("free", "orthogonal", "parallel"):
        unit = CrossConfig(num_heads=1, update=direction).build(3)
        parts[direction] = unit.update(x, y)
    torch.testing.assert_close(parts["parallel"], torch.tensor([[[0.36, 0, 0.48], [0, 0, 0]]]))
    torch.testing.assert_close(parts["orthogonal"], torch.tensor([[[0.64, 2, -0.48], [1, 2, 0]]]))
    assert torch.equal(parts["free"], y)


def test_a_frozen_attention_is_not_trained(make_catalog, make_batch):
    config = CrossDomainConfig(**SIZE, cross=CrossConfig(frozen=True))
    model = config.build(make_catalog(2), 12, torch.Generator().manual_seed(0))
    model(make_batch([FIRST, SECOND], [ASKED, ASKED])).square().sum().backward()
    for unit in model.early[0]:
        assert not any(parameter.requires_grad for parameter in unit.attention.parameters())
        assert all(parameter.grad is not None for parameter in unit.gate.parameters())
