"""What every neural recommender promises: causality, indifference to padding and neighbours, finite gradients."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.models import (
    ABXIConfig,
    AutoCDSRConfig,
    AutoCDSRPlusConfig,
    BERT4RecConfig,
    C2DSRConfig,
    CDSRNPConfig,
    CrossDomainConfig,
    GRU4RecConfig,
    HSTUConfig,
    LLM4CDSRConfig,
    SASRecConfig,
)
from recsys.models.attention import CrossConfig
from recsys.types import NO_DOMAIN, PAD_ID, TrainingEvents

SIZE = {"d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2, "dropout": 0.3}
BLOCKS = {"d_model": 8, "num_layers": 2, "num_heads": 2, "dropout": 0.3}
MAX_LEN = 12


def host(**cross):
    return CrossDomainConfig(**SIZE, cross=CrossConfig(**cross) if cross else None)


def abxi(**cross):
    """ABXI with positions counted from the start: from the end, as published, a state knows how much is to come."""
    return ABXIConfig(
        d_model=8,
        d_ff=12,
        domain_rank=2,
        invariant_rank=3,
        dropout=0.3,
        positions="from_start",
        cross=CrossConfig(**cross) if cross else None,
    )


def c2dsr(**cross):
    return C2DSRConfig(**SIZE, graph_layers=2, cross=CrossConfig(**cross) if cross else None)


def llm4cdsr(**cross):
    return LLM4CDSRConfig(**SIZE, d_text=10, cross=CrossConfig(**cross) if cross else None)


def cdsrnp(**cross):
    return CDSRNPConfig(**SIZE, num_support=4, cross=CrossConfig(**cross) if cross else None)


def autocdsr(**cross):
    return AutoCDSRConfig(**SIZE, cross=CrossConfig(**cross) if cross else None)


def autocdsr_plus(**cross):
    return AutoCDSRPlusConfig(**SIZE, num_bottlenecks=2, cross=CrossConfig(**cross) if cross else None)


CONFIGS = {
    "sasrec": SASRecConfig(**SIZE),
    "sasrec post-norm, one layer": SASRecConfig(**SIZE | {"num_layers": 1}, norm_first=False, activation="relu"),
    "sasrec without domains": SASRecConfig(**SIZE, domain_embedding=False),
    "sasrec with target query": SASRecConfig(**SIZE, target_query="domain"),
    "bert4rec": BERT4RecConfig(**SIZE),
    "bert4rec with target query": BERT4RecConfig(**SIZE, target_query="domain"),
    "gru4rec": GRU4RecConfig(d_model=8, num_layers=2),
    "gru4rec with target query": GRU4RecConfig(d_model=8, target_query="domain", domain_embedding=False),
    "hstu": HSTUConfig(**BLOCKS),
    "hstu with target query": HSTUConfig(**BLOCKS, target_query="domain"),
    "hstu without gate": HSTUConfig(**BLOCKS, gate=False, domain_embedding=False),
    "null": host(),
    "null post-norm": CrossDomainConfig(**SIZE, norm_first=False),
    "early": host(placement="early", num_units=1),
    "early x 2, tanh": host(placement="early", num_units=2, gate="tanh"),
    "stack, scalar": host(placement="stack", num_units=1, gate="scalar"),
    "stack x 2, no gate, no norm": host(placement="stack", num_units=2, gate="none", layer_norm=False),
    "abxi": abxi(),
    "abxi early": abxi(placement="early", num_units=2),
    "abxi stack": abxi(placement="stack", gate="tanh"),
    "llm4cdsr": llm4cdsr(),
    "llm4cdsr early": llm4cdsr(placement="early", num_units=2),
    "llm4cdsr stack": llm4cdsr(placement="stack", num_units=2, gate="tanh"),
    "c2dsr": c2dsr(),
    "c2dsr early": c2dsr(placement="early", num_units=2),
    "c2dsr stack": c2dsr(placement="stack", gate="tanh"),
    "cdsrnp": cdsrnp(),
    "cdsrnp early": cdsrnp(placement="early", num_units=2),
    "cdsrnp stack": cdsrnp(placement="stack", gate="tanh"),
    "autocdsr": autocdsr(),
    "autocdsr early": autocdsr(placement="early", num_units=2),
    "autocdsr stack x 2": autocdsr(placement="stack", num_units=2, gate="scalar"),
    "autocdsr+": autocdsr_plus(),
    "autocdsr+ early": autocdsr_plus(placement="early"),
    "autocdsr+ stack": autocdsr_plus(placement="stack", gate="tanh"),
}
NEURAL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

# Three users over three domains; items are all different, times hold ties. The second user knows one domain only.
HISTORIES = [
    [(1, 0, 5), (2, 1, 6), (3, 1, 6), (4, 2, 6), (5, 0, 9), (6, 1, 12)],
    [(7, 1, 3), (8, 1, 4)],
    [(9, 2, 1), (10, 0, 1), (11, 2, 1), (12, 1, 8)],
]
ASKED = [[1, 1, 2, 0, 1, 2], [1, 1], [0, 2, 1, 0]]


# Training events for models that read them: none of the users above is in two domains, as a support user would be.
TRAINING = TrainingEvents(
    items=torch.tensor([18, 24, 25, 26, 28, 30, 20, 21, 22, 19, 33, 32, 35, 24]),
    times=torch.arange(14),
    offsets=torch.tensor([0, 2, 2, 2, 6, 9, 14]),
    text=torch.randn(61, 10, generator=torch.Generator().manual_seed(0)),
)


@pytest.fixture
def model_of(make_catalog, stir):
    def make(config, num_domains=3):
        model = stir(config.build(make_catalog(num_domains), MAX_LEN))
        if isinstance(config, CDSRNPConfig | LLM4CDSRConfig):
            model.fit(TRAINING)
        return model

    return make


def two_domains(histories, asked):
    return (
        [[(item, min(domain, 1), time) for item, domain, time in row] for row in histories],
        [[None if domain is None else min(domain, 1) for domain in row] for row in asked],
    )


def visible(config, history, t, s, domain):
    """May the state at t that asks for `domain` know the event at s?"""
    if s > t:
        return False
    if not isinstance(config, CrossDomainConfig):
        return True
    if history[s][1] == domain:
        return True
    return config.cross is not None


@NEURAL
@pytest.mark.parametrize("num_domains", [2, 3])
def test_a_state_depends_on_exactly_what_it_may_know(config, num_domains, make_batch, model_of):
    """A state's gradient to each item's vector is 0 or not as the rules say, ties in time included."""
    model = model_of(config, num_domains)
    histories, asked = (HISTORIES, ASKED) if num_domains == 3 else two_domains(HISTORIES, ASKED)
    batch = make_batch(histories, asked, pad=1)
    table = model.text.requires_grad_() if isinstance(config, LLM4CDSRConfig) else model.embedding.items.weight
    hidden = model(batch)
    length = hidden.shape[1]
    for row, history in enumerate(histories):
        for t in range(len(history)):
            state = hidden[row, length - len(history) + t]
            (slope,) = torch.autograd.grad(state[0] + 0.3 * state[1], table, retain_graph=True)
            for other, events in enumerate(histories):
                for s, (item, _, _) in enumerate(events):
                    expected = other == row and visible(config, history, t, s, asked[row][t])
                    assert bool((slope[item] != 0).any()) == expected, (row, t, other, s)


@NEURAL
def test_the_future_changes_nothing(config, make_batch, model_of):
    model = model_of(config)
    before = model(make_batch(HISTORIES, ASKED))
    for cut in range(1, 6):
        changed = [HISTORIES[0][:cut] + [(40 + n, 2 - n % 3, 99 + n) for n in range(6 - cut)], *HISTORIES[1:]]
        asked = [ASKED[0][:cut] + [(n + 1) % 3 for n in range(6 - cut)], *ASKED[1:]]
        after = model(make_batch(changed, asked))
        torch.testing.assert_close(after[0, :cut], before[0, :cut], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after[1:], before[1:], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[0, cut:], before[0, cut:])


@NEURAL
def test_a_prefix_has_the_state_of_the_whole(config, make_batch, model_of):
    """What is asked last of a cut history, alone in its batch, is what the whole history says at that event."""
    model = model_of(config)
    whole = model(make_batch(HISTORIES, ASKED))
    for row, history in enumerate(HISTORIES):
        for end in range(1, len(history) + 1):
            part = make_batch([history[:end]], [[None] * (end - 1) + [ASKED[row][end - 1]]])
            place = whole.shape[1] - len(history) + end - 1
            torch.testing.assert_close(model(part)[0, -1], whole[row, place], rtol=1e-12, atol=1e-12)


@NEURAL
@pytest.mark.parametrize("pad", [1, 5])
def test_padding_changes_nothing(config, pad, make_batch, model_of):
    model = model_of(config)
    tight, loose = model(make_batch(HISTORIES, ASKED)), model(make_batch(HISTORIES, ASKED, pad=pad))
    torch.testing.assert_close(loose[:, pad:], tight, rtol=1e-12, atol=1e-12)
    assert (loose[:, :pad] == 0).all()
    assert (tight[1, :4] == 0).all()
    single = model.float()
    torch.testing.assert_close(
        single(make_batch(HISTORIES, ASKED, pad=pad))[:, pad:], tight.float(), rtol=1e-4, atol=2e-5
    )


@NEURAL
def test_neighbours_in_the_batch_change_nothing(config, make_batch, model_of):
    model = model_of(config)
    whole = model(make_batch(HISTORIES, ASKED))
    turned = model(make_batch(HISTORIES[::-1], ASKED[::-1]))
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-12, atol=1e-12)
    for row, history in enumerate(HISTORIES):
        alone = model(make_batch([history], [ASKED[row]]))
        torch.testing.assert_close(alone[0], whole[row, -len(history) :], rtol=1e-12, atol=1e-12)


@NEURAL
def test_questions_elsewhere_change_nothing(config, make_batch, model_of):
    model = model_of(config)
    before = model(make_batch(HISTORIES, ASKED))
    for kept in range(6):
        asked = [[domain if t == kept else None for t, domain in enumerate(row)] for row in ASKED]
        after = model(make_batch(HISTORIES, asked))
        torch.testing.assert_close(after[0, kept], before[0, kept], rtol=1e-12, atol=1e-12)


@NEURAL
def test_targets_are_not_read(config, make_batch, model_of):
    model = model_of(config)
    batch = make_batch(HISTORIES, ASKED)
    scrambled = dataclasses.replace(batch, targets=batch.targets * 0 + 33)
    assert torch.equal(model(scrambled), model(batch))


@NEURAL
def test_rows_of_padding_give_zeros_and_finite_gradients(config, make_batch, make_catalog):
    model = config.build(make_catalog(3), MAX_LEN).train()
    batch = make_batch([HISTORIES[0], [], HISTORIES[1]], [ASKED[0], [], ASKED[1]])
    hidden = model(batch)
    assert (hidden[1] == 0).all()
    hidden.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    nothing = model(make_batch([[], []], [[], []], pad=2))
    assert torch.equal(nothing, torch.zeros_like(nothing))
    nothing.sum().backward()


@NEURAL
def test_narrow_integers_are_read_alike(config, make_batch, model_of):
    model = model_of(config)
    assert torch.equal(model(make_batch(HISTORIES, ASKED, dtype=torch.int32)), model(make_batch(HISTORIES, ASKED)))


@NEURAL
def test_the_generator_decides_the_start(config, make_catalog):
    def start(seed):
        return config.build(make_catalog(3), MAX_LEN, torch.Generator().manual_seed(seed)).state_dict()

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    if isinstance(config, LLM4CDSRConfig):  # has no table of its own
        assert not torch.equal(first["adapter.first.weight"], other["adapter.first.weight"])
        return
    assert not torch.equal(first["embedding.items.weight"], other["embedding.items.weight"])
    assert (first["embedding.items.weight"][PAD_ID] == 0).all()


@NEURAL
def test_too_long_a_history_is_an_error(config, make_batch, make_catalog):
    model = config.build(make_catalog(3), 5)
    with pytest.raises(ValueError, match="max_len = 5"):
        model(make_batch(HISTORIES, ASKED))


@NEURAL
def test_a_full_history_of_one_domain_fits(config, make_batch, make_catalog):
    model = config.build(make_catalog(3), 4)
    hidden = model(make_batch([[(item, 0, item) for item in range(1, 5)]], [[0] * 4]))
    assert hidden.isfinite().all()


@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=7),
        min_size=1,
        max_size=4,
    )
)
@pytest.mark.parametrize("name", ["sasrec with target query", "early x 2, tanh"])
def test_any_batch_row_by_row(name, rows, make_batch, model_of):
    """Any mix of histories gives each row what it gets alone; whatever is asked at an event has an answer."""
    model = model_of(CONFIGS[name])
    histories = [[(item, domain, t) for t, (item, domain, _, _) in enumerate(row)] for row in rows]
    asked = [[domain if is_asked else None for _, _, domain, is_asked in row] for row in rows]
    batch = make_batch(histories, asked, pad=1)
    hidden = model(batch)
    for row, history in enumerate(histories):
        if history:
            alone = model(make_batch([history], [asked[row]]))
            torch.testing.assert_close(hidden[row, -len(history) :], alone[0], rtol=1e-11, atol=1e-11)
    answered = (hidden != 0).any(-1)
    assert (answered | (batch.target_domains == NO_DOMAIN)).all()
