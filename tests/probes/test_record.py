"""Recording from outside: what is seen is what the unit computes, and nothing is left behind."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import recsys.models
from recsys.models.exchange import look
from recsys.models.streams import cut_streams
from recsys.probes import find_units, record
from recsys.types import NO_DOMAIN


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("cross", [{}, {"placement": "stack", "num_units": 2}, {"gate": "none", "layer_norm": False}])
def test_sites_hold_together(cross, make_model, make_batch):
    model, batch = make_model(**cross), make_batch(6)
    with record(model) as recorder, torch.no_grad():
        model(batch)
        units = dict(recorder.units)
    assert set(units) == {unit.name for unit in find_units(model)}
    for name, seen in units.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            output = module.attention(seen.query, seen.context, seen.mask)
            assert torch.equal(seen.output, output)
            assert torch.equal(seen.gate, module.gate(seen.query, output))
            assert torch.equal(seen.update, seen.gate * output)
            assert torch.equal(seen.result, seen.query + seen.update)
            assert torch.equal(seen.normalised_query, module.attention.query_norm(seen.query))
            assert torch.equal(seen.normalised_context, module.attention.context_norm(seen.context))
            heads = seen.head_outputs(seen.attended)
            whole = heads.sum(-2) + module.attention.heads.output.bias
            torch.testing.assert_close(whole[seen.tokens], output[seen.tokens])
            weights = seen.weights(seen.projected_query)
            sums = weights.sum(-1).transpose(1, 2)[seen.tokens]
            torch.testing.assert_close(sums, torch.ones_like(sums))
            read = (weights @ seen.values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(read[seen.tokens], seen.attended[seen.tokens])


def test_rows_are_told_apart(make_model, make_batch):
    model, batch = make_model(), make_batch(6, first_user=40)
    streams = cut_streams(batch, 2)
    masks = look(batch, streams, model.early).masks
    with record(model) as recorder, torch.no_grad():
        model(batch)
        for domain in (0, 1):
            seen = recorder.units[f"early.0.{domain}"]
            assert seen.domain == domain
            assert torch.equal(seen.user, batch.user[streams.users()[domain]])
            assert torch.equal(seen.mask, masks[domain])
            assert torch.equal(seen.real, streams.split(streams.real)[domain])
            assert int(seen.asked.sum()) == int((batch.target_domains == domain).sum())
            assert not (seen.tokens & seen.silent).any()
            assert torch.equal(seen.tokens | seen.silent, seen.real)
            assert seen.silent.any()
            assert (~seen.real).any()
            assert not seen.output[~seen.tokens].any()
            for row, user in enumerate(seen.row.tolist()):
                assert torch.equal(seen.context_domain[row], batch.domains[user])
            short = seen.last(2, 3)
            assert torch.equal(short.query, seen.query[:, -2:])
            assert torch.equal(short.mask, seen.mask[:, -2:, -3:])
            assert torch.equal(short.context, seen.context[:, -3:])


def test_the_model_is_left_as_it_was(make_model, make_batch):
    model, batch = make_model(), make_batch(5)
    before = model(batch)
    with record(model) as recorder:
        during = recorder.model(batch)
        assert recorder.units["early.0.0"].output.requires_grad  # a penalty on it can be trained
    after = model(batch)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert hooks(model) == 0
    assert recorder.units == {}
    with pytest.raises(RuntimeError, match="boom"), record(model):
        assert hooks(model) > 0
        raise RuntimeError("boom")
    assert hooks(model) == 0


def test_a_pass_that_fails_leaves_nothing_to_the_next(make_model, make_batch):
    model = make_model(num_units=2)
    too_long = make_batch(4)
    too_long = too_long.map(lambda t: torch.cat([t, t], dim=1) if t.ndim > 1 else t)
    with record(model) as recorder:
        model(make_batch(4))
        with pytest.raises(ValueError, match="max_len"):
            model(too_long)
        assert recorder.units == {}
        model(make_batch(3))
        assert len(recorder.units["early.1.0"].user) <= 3
    assert hooks(model) == 0


_COMPILED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from conftest import _batch, _model
from recsys.probes import record

batch = _batch(4)
with torch.no_grad():
    model = _model()
    expected = model(batch)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(batch), expected)
    with record(compiled) as recorder:
        assert recorder.model is model
        torch.testing.assert_close(recorder.model(batch), expected)
        assert set(recorder.units) == {"early.0.0", "early.0.1"}
    torch.testing.assert_close(compiled(batch), expected)
    model.early[0][1] = torch.compile(model.early[0][1], backend="eager")
    model.early[0][0].compile(backend="eager")
    model(batch)
    with record(model) as recorder:
        model(batch)
        assert set(recorder.units) == {"early.0.0", "early.0.1"}
assert not any(module._forward_hooks for module in model.modules())
"""


@pytest.mark.slow
def test_a_compiled_model_is_seen_through_its_raw_module():
    """In a process of its own, where annotations are not checked: what checks them cannot be compiled."""
    subprocess.run([sys.executable, "-c", _COMPILED, str(Path(__file__).parent)], check=True)


def test_a_unit_that_nobody_has_a_state_for_has_no_record(make_model, make_batch):
    batch = make_batch(4)
    alone = dataclasses.replace(
        batch,
        domains=torch.where(batch.mask, 0, NO_DOMAIN),
        target_domains=torch.where(batch.mask, 0, NO_DOMAIN),
        items=batch.items // 2 * 2,
    )
    with record(make_model()) as recorder, torch.no_grad():
        recorder.model(alone)
        assert set(recorder.units) == {"early.0.0"}
        assert not recorder.units["early.0.0"].tokens.any()


def test_units_called_on_their_own_have_no_users(make_model, make_batch):
    model = make_model()
    alone = (torch.zeros(1, 2, 8), torch.zeros(1, 3, 8), torch.ones(1, 2, 3, dtype=torch.bool))
    with record(model):
        with pytest.raises(RuntimeError, match=r"early\.0\.0 ran outside"):
            model.early[0][0](*alone)
        model(make_batch(2))
        with pytest.raises(RuntimeError, match=r"early\.0\.0 ran outside"):
            model.early[0][0](*alone)
    model.early[0][0](*alone)


def test_states_that_are_not_those_of_streams_are_refused(make_model, make_batch):
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.early = make_model().early

        def forward(self, batch):
            states = torch.zeros(*batch.items.shape, 8)
            mask = torch.ones(*batch.items.shape, batch.items.shape[1], dtype=torch.bool)
            return self.early[0][0](states, states, mask)

    with record(Host()) as recorder, pytest.raises(ValueError, match=r"early\.0\.0 was asked"):
        recorder.model(make_batch(3))


def test_a_unit_must_say_which_domain_asks(make_model):
    with pytest.raises(ValueError, match="ends in the domain"):
        find_units(nn.ModuleDict({"cross": make_model().early[0][0]}))


def test_model_files_hold_no_probe_code():
    for path in Path(recsys.models.__file__).parent.rglob("*.py"):
        assert "recsys.probes" not in path.read_text(), path
        assert "register_forward" not in path.read_text(), path
