"""The cross-domain host: with and without exchange, causality by time, many domains."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from recsys.models import CrossDomainConfig, count_parameters
from recsys.models.attention import CrossAttention, CrossConfig

SIZE = {"d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}
HISTORY = [(1, 0, 5), (2, 1, 6), (3, 1, 6), (5, 0, 9), (4, 1, 9), (7, 0, 11)]
ASKED = [0, 0, 0, 1, 0, 1]


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, cross=None, **size):
        return stir(CrossDomainConfig(**SIZE | size, cross=cross).build(make_catalog(num_domains), 12))

    return make


def change(history, domain):
    """The history with other items at the events of one domain."""
    return [(item + 20, k, time) if k == domain else (item, k, time) for item, k, time in history]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_exchange_nothing_of_the_other_domain_is_known(dtype, build, make_batch):
    model = build().to(dtype)
    for domain in (0, 1):
        before = model(make_batch([HISTORY], [ASKED]))[0]
        after = model(make_batch([change(HISTORY, 1 - domain)], [ASKED]))[0]
        for t, asked in enumerate(ASKED):
            assert torch.equal(before[t], after[t]) == (asked == domain)


def test_without_exchange_other_events_may_as_well_be_gone(build, make_batch):
    """Not even their number is known: the state is that of the domain's own history."""
    model = build()
    whole = model(make_batch([HISTORY], [ASKED]))[0]
    own = [event for event in HISTORY if event[1] == 0]
    alone = model(make_batch([own], [[0] * len(own)]))[0]
    torch.testing.assert_close(whole[2], alone[0])  # after the first event of domain 0, two others since
    torch.testing.assert_close(whole[4], alone[1])


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_with_exchange_the_other_domain_counts(placement, build, make_batch):
    model = build(cross=CrossConfig(placement=placement))
    before = model(make_batch([HISTORY], [ASKED]))[0]
    after = model(make_batch([change(HISTORY, 1)], [ASKED]))[0]
    assert torch.equal(before[0], after[0])  # no event of domain 1 so far
    assert (before[1:] != after[1:]).any(-1).all()


def test_a_later_time_is_not_seen_even_at_an_earlier_place(build, make_batch):
    """Times decide as well as places: an event that claims a later time is not read."""
    model = build(cross=CrossConfig())
    late = [(2, 1, 9), (1, 0, 5)]
    assert torch.equal(model(make_batch([late], [[None, 0]])), model(make_batch([change(late, 1)], [[None, 0]])))
    tied = [(2, 1, 5), (1, 0, 5)]
    assert not torch.equal(model(make_batch([tied], [[None, 0]])), model(make_batch([change(tied, 1)], [[None, 0]])))


@pytest.mark.parametrize(
    "cross", [CrossConfig(), CrossConfig(placement="stack", num_units=2), CrossConfig(gate="tanh")]
)
def test_the_shared_parts_start_alike_with_and_without(cross, make_catalog):
    def start(chosen, generator):
        return CrossDomainConfig(**SIZE, cross=chosen).build(make_catalog(3), 12, generator).state_dict()

    null = start(None, torch.Generator().manual_seed(3))
    treated = start(cross, torch.Generator().manual_seed(3))
    assert null.keys() < treated.keys()
    assert all(torch.equal(null[name], treated[name]) for name in null)
    with torch.random.fork_rng():  # and so they do when the caller seeds torch's default generator
        torch.manual_seed(3)
        null = start(None, None)
        torch.manual_seed(3)
        treated = start(cross, None)
    assert all(torch.equal(null[name], treated[name]) for name in null)


def test_directions_change_together_and_have_their_own_weights(build, make_batch):
    model = build(cross=CrossConfig(num_units=2))
    inputs, outputs = {}, {}
    for unit, domains in enumerate(model.early):
        for domain, module in enumerate(domains):

            def note(_, given, result, key=(unit, domain)):
                inputs[key], outputs[key] = given, result

            module.register_forward_hook(note)
    model(make_batch([HISTORY], [ASKED]))
    # The context of a unit, in merged order, holds the states that entered that round, of either domain.
    for unit in (0, 1):
        contexts = [inputs[unit, domain][1] for domain in (0, 1)]
        assert torch.equal(contexts[0], contexts[1])
        entering = [inputs[unit, domain][0][0] for domain in (0, 1)]
        for t, (_, domain, _) in enumerate(HISTORY):
            assert (contexts[0][0, t] == entering[domain]).all(-1).any()
    for domain in (0, 1):
        assert torch.equal(outputs[0, domain], inputs[1, domain][0])
    first, second = model.early[0]
    assert not torch.equal(first.attention.heads.query.weight, second.attention.heads.query.weight)


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_units_stand_where_the_config_says(placement, build, make_batch):
    model = build(num_layers=3, cross=CrossConfig(placement=placement, num_units=2))
    order = []
    for prefix in ("early", "stack", "layers"):
        for depth, parts in enumerate(getattr(model, prefix)):
            parts[1].register_forward_hook(lambda *_, name=f"{prefix}{depth}": order.append(name))
    model(make_batch([HISTORY], [ASKED]))
    expected = {
        "early": ["early0", "early1", "layers0", "layers1", "layers2"],
        "stack": ["layers0", "stack0", "layers1", "stack1", "layers2"],
    }
    assert order == expected[placement]


def test_padding_enters_a_probe_as_zeros(build, make_batch):
    model = build(cross=CrossConfig(placement="stack", num_units=2))
    seen = []
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    long = [(10 + t, 1, t) for t in range(6)] + [(30, 0, 9)]  # padded in the stream of domain 0 alone
    model(make_batch([HISTORY, [(9, 0, 1)], long], [ASKED, [1], [None] * 7]))
    assert len(seen) == 4
    for domain, (query, output) in zip((0, 1, 0, 1), seen, strict=True):
        padding = (query == 0).all(-1)
        assert (~padding).sum(1).tolist() == [[6, 1, 1], [5, 1, 6]][domain]
        assert (output[padding] == 0).all()
    # The second user has no event in domain 1: the state of domain 0 has nothing to read.
    assert (seen[0][1][1] == 0).all()
    assert (seen[1][1][1, -1] != 0).any()


@pytest.mark.parametrize("cross", [None, CrossConfig(), CrossConfig(placement="stack")])
def test_many_domains(cross, build, make_batch):
    """28 domains, most of them empty in the batch; the state of a domain never seen is still a state."""
    model = build(28, cross=cross)
    histories = [[(item, (5 * item) % 28, item) for item in range(1, 11)], [(3, 15, 1), (4, 20, 2)]]
    asked = [[(3 * item) % 28 for item in range(1, 11)], [27, 15]]
    hidden = model(make_batch(histories, asked))
    assert ((hidden != 0).any(-1) == make_batch(histories, asked).mask).all()
    for row, history in enumerate(histories):
        alone = model(make_batch([history], [asked[row]]))
        torch.testing.assert_close(hidden[row, -len(history) :], alone[0])


def test_the_published_size_of_an_exchange(make_catalog):
    """Two directions at d = 256 add 2 x (16 d² + 13 d), about 2.10 M parameters."""
    with torch.device("meta"):
        sizes = [
            count_parameters(CrossDomainConfig(d_model=256, cross=cross).build(make_catalog(2), 50))
            for cross in (None, CrossConfig())
        ]
    added = sizes[1]["total"] - sizes[0]["total"]
    assert added == 2 * (16 * 256**2 + 13 * 256) == 2_103_808
    assert sizes[1]["cross_attention"] == 2 * (4 * 256**2 + 8 * 256)
    assert sizes[1]["gate"] == 2 * (12 * 256**2 + 5 * 256)


def test_what_cannot_be_is_refused(make_catalog):
    with pytest.raises(ValidationError, match="only num_layers = 2; lower"):
        CrossDomainConfig(**SIZE, cross=CrossConfig(placement="stack", num_units=3))
    with pytest.raises(ValidationError, match=r"cross\.num_heads = 3 does not divide d_model = 8"):
        CrossDomainConfig(**SIZE, cross=CrossConfig(num_heads=3))
    with pytest.raises(ValueError, match="at least two domains"):
        CrossDomainConfig(**SIZE, cross=CrossConfig()).build(make_catalog(1), 12)
    assert CrossDomainConfig(**SIZE, cross=CrossConfig(num_units=3))


def test_asking_nothing_gives_zeros(build, make_batch):
    hidden = build()(make_batch([HISTORY], [[None, 1, None, None, 0, None]]))
    assert (hidden[0] != 0).any(-1).tolist() == [False, True, False, False, True, False]


def test_user_ids_are_not_read(build, make_batch):
    model = build(cross=CrossConfig())
    batch = make_batch([HISTORY], [ASKED])
    assert torch.equal(model(batch), model(dataclasses.replace(batch, user=batch.user + 9)))


def test_states_wider_than_the_items(build, make_batch):
    """The item table keeps its width; each path is there: every weight gets a gradient, and nothing is said unasked."""
    model = build(d_item=6, cross=CrossConfig())
    assert model.item_embeddings().shape == (61, 6)
    hidden = model(make_batch([HISTORY, HISTORY[:2]], [ASKED, [None, 0]]))
    assert hidden.shape == (2, 6, 6)
    assert (hidden[1, :5] == 0).all(), "padding, and a place that asks for nothing"
    hidden.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    counts = count_parameters(model)
    narrow = count_parameters(build(cross=CrossConfig()))
    assert counts["item_table"] == narrow["item_table"] * 6 // 8
    assert counts["encoder"] == narrow["encoder"] + 2 * 6 * 8
