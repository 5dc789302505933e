"""Interventions: what is added in place of an update, by hand and in a model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recsys.models.attention import CrossConfig
from recsys.probes import record
from recsys.probes.intervene import INTERVENTIONS, RANDOM, Call, Ledger, intervene
from recsys.types import Batch


@pytest.fixture
def call():
    """x = (3, 0, 4) and y = (1, 2, 0) of the first user; two more users with random states; the last place is empty."""
    generator = torch.Generator().manual_seed(0)
    query, update = (torch.randn(3, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    query[0, 0], update[0, 0] = torch.tensor([3.0, 0, 4]), torch.tensor([1.0, 2, 0])
    mask = torch.ones(3, 2, 5, dtype=torch.bool)
    mask[2, 1] = False
    update[2, 1] = 0
    unit = CrossConfig(num_heads=1, dropout=0.0).build(3).double().eval()
    context = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    mean = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    return Call(unit, torch.tensor([4, 7, 9]), query, context, mask, update, mean, generator)


def result(call, name):
    return INTERVENTIONS[name](call)


def test_parts_by_hand(call):
    along, across = torch.tensor([0.36, 0, 0.48]).double(), torch.tensor([0.64, 2, -0.48]).double()
    expected = {
        "orthogonal part": across,
        "parallel part": along,
        "nothing": torch.zeros(3).double(),
        "parallel × 0.5": 0.5 * along + across,
        "parallel × 2": 2 * along + across,
        "orthogonal × 0.5": along + 0.5 * across,
        "orthogonal × 2": along + 2 * across,
        "orthogonal part, full norm": across / 0.928**0.5,
        "parallel part, full norm": along / 0.072**0.5,
        "mean": torch.tensor([1.0, 0, 0]).double(),
    }
    for name, vector in expected.items():
        torch.testing.assert_close(result(call, name)[0, 0], vector, msg=name)
    assert set(expected) | RANDOM == set(INTERVENTIONS)


def test_energies_by_hand(call):
    first = {name: getattr(call, name)[:1] for name in ("user", "context")}
    first |= {name: getattr(call, name)[:1, :1] for name in ("query", "update", "mask")}
    one = Call(**{**vars(call), **first})
    for name, energy in (
        ("orthogonal part", 0.072),
        ("parallel part", 0.928),
        ("nothing", 1.0),
        ("parallel × 2", 0.072),
    ):
        ledger = Ledger()
        ledger.add("unit", one, result(one, name))
        assert ledger.energy == pytest.approx(energy)


def test_a_row_that_repeats_the_one_before_counts_once(call):
    ledger, again = Ledger(), Ledger()
    ledger.add("unit", call, result(call, "parallel part"))
    repeated = torch.tensor([0, 1, 2, 2, 2])
    names = ("user", "query", "context", "mask", "update")
    longer = Call(**{**vars(call), **{name: getattr(call, name)[repeated] for name in names}})
    again.add("unit", longer, result(longer, "parallel part"))
    assert again.energy == pytest.approx(ledger.energy)
    assert again.tokens == ledger.tokens == {"unit": 5}


def test_a_rotation_keeps_cosine_and_norm(call):
    turned = result(call, "rotated")
    there = call.tokens
    torch.testing.assert_close(turned.norm(dim=-1)[there], call.update.norm(dim=-1)[there])
    cosines = [F.cosine_similarity(call.query, vector, dim=-1)[there] for vector in (turned, call.update)]
    torch.testing.assert_close(*cosines)
    assert (turned[there] != call.update[there]).any(-1).all()
    assert not torch.equal(turned, result(call, "rotated"))  # the next draw


def test_a_shuffle_gives_every_token_another_users_update_of_its_place(call):
    other = result(call, "another user's")
    for place, rows in ((0, [0, 1, 2]), (1, [0, 1])):
        assert sorted(map(tuple, other[rows, place].tolist())) == sorted(map(tuple, call.update[rows, place].tolist()))
        assert (other[rows, place] != call.update[rows, place]).any(-1).all()


def test_another_users_context_is_read_as_that_user_reads_it(call):
    unit = call.module
    for part in unit.parameters():
        torch.nn.init.normal_(part, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        swapped = result(call, "another user's context")
        expected = []
        for partner in range(3):
            output = unit.attention(call.query[:1], call.context[[partner]], call.mask[[partner]])
            expected.append((unit.gate(call.query[:1], output) * output)[0, 0])
    distances = [float((swapped[0, 0] - vector).abs().max()) for vector in expected]
    assert min(distances[1:]) < 1e-12 < distances[0]


@pytest.mark.parametrize("name", list(INTERVENTIONS))
def test_in_a_model(name, make_model, make_batch):
    """What has nothing to attend to gets nothing; the rest gets the replacement; nothing stays behind."""
    model, batch = make_model(), make_batch(6)
    with torch.no_grad():
        before = model(batch)
        with intervene(model, None) as books:
            assert torch.equal(model(batch), before)
        with (
            intervene(model, INTERVENTIONS[name], means=books.means(), seed=3) as ledger,
            record(model) as recorder,
        ):
            changed = model(batch)
            seen = recorder.units["early.0.0"]
            if name == "nothing":
                assert torch.equal(seen.result, seen.query)
            assert torch.equal(seen.result[~seen.tokens], seen.query[~seen.tokens])
        with intervene(model, INTERVENTIONS[name], means=books.means(), seed=3):
            assert torch.equal(model(batch), changed)
        assert not torch.equal(changed, before)
        assert changed.isfinite().all()
        assert torch.equal(model(batch), before)
    assert ledger.energy > 0
    assert books.energy == 0
    if name in ("orthogonal part", "parallel part"):
        assert 0 < ledger.energy < 1


def test_in_one_unit_alone(make_model, make_batch):
    model, batch = make_model(), make_batch(6)
    with torch.no_grad(), intervene(model, INTERVENTIONS["nothing"], units=["early.0.1"]) as ledger:
        model(batch)
    assert set(ledger.before) == {"early.0.1"}
    assert ledger.energy == pytest.approx(1)


class _WithSupport(nn.Module):
    """A host that encodes further users once it has encoded the batch."""

    def __init__(self, inner: nn.Module, support: Batch) -> None:
        super().__init__()
        self.inner, self.support = inner, support

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(batch), self.inner(self.support)


def test_users_that_a_model_encodes_besides_are_left_alone(make_model, make_batch):
    inner, batch, support = make_model(), make_batch(6), make_batch(4, seed=1, first_user=50)
    model = _WithSupport(inner, support)
    with torch.no_grad():
        plain, of_support = model(batch)
        with record(inner) as recorder:
            inner(batch)
            expected = recorder.units["early.0.0"].output
        with record(model) as recorder:
            model(batch)
            assert torch.equal(recorder.units["inner.early.0.0"].output, expected)
        with intervene(inner, INTERVENTIONS["nothing"]):
            without = inner(batch)
        with intervene(model, INTERVENTIONS["nothing"]) as ledger:
            changed, support_again = model(batch)
    assert torch.equal(changed, without)
    assert not torch.equal(changed, plain)
    assert torch.equal(support_again, of_support)
    assert ledger.energy == 1
