"""LLM4CDSR against its equations: two threads on one item, frozen tables, alignments, and what a state may know."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy_equations import assert_step, attention, feed_forward, layer_norm, sigmoid, weights_of
from pydantic import ValidationError

from recsys.losses import BCEConfig
from recsys.models import LLM4CDSRConfig, count_parameters
from recsys.models.attention import CrossConfig
from recsys.models.llm4cdsr import Adapter, _k_means, soft_contrast
from recsys.types import NO_DOMAIN, Batch, Catalog, Draw, HasThreads, TrainingEvents

D, D_TEXT, ITEMS = 4, 6, 20
SIZE = {"d_model": D, "d_text": D_TEXT, "d_ff": 3, "num_layers": 1, "num_heads": 2, "num_clusters": 3}
# Even items are of domain 0, odd ones of domain 1. A user's events in a domain are all of one item, so that the item
# drawn for the alignment is known. The last user has no event in domain 1 when it is first asked for.
HISTORIES = [[(2, 0, 1), (3, 1, 2), (2, 0, 3), (3, 1, 4)], [(4, 0, 1), (4, 0, 2), (5, 1, 3)], [(6, 0, 1), (6, 0, 2)]]
TARGETS = [[3, 2, 3, 8], [4, 5, 10], [9, 12]]
ASKED = [[1, 0, 1, 0], [0, 1, 0], [1, 0]]
NEGATIVE = {0: 14, 1: 13}
ALPHA, BETA, TAU = 0.3, 0.2, 0.7


class OneNegative:
    """A fixed negative of the target's domain."""

    generator = torch.Generator()

    def draw(self, targets):
        items = torch.tensor([[NEGATIVE[int(target) % 2]] for target in targets])
        return Draw(items, torch.zeros(items.shape), torch.zeros(len(targets)))


def make_events(num_items=ITEMS, d_text=D_TEXT, dtype=torch.float64):
    """Three users' training events, and a text vector for every item but the last."""
    text = torch.randn(num_items + 1, d_text, generator=torch.Generator().manual_seed(5), dtype=dtype)
    text /= text.norm(dim=1, keepdim=True)
    text[[0, -1]] = 0
    items = [2, 3, 2, 3, 7, 4, 4, 5, 6, 6, 9]
    return TrainingEvents(torch.tensor(items), torch.arange(len(items)), torch.tensor([0, 5, 8, 11]), text)


@pytest.fixture
def build(make_catalog, stir):
    def make(num_domains=2, max_len=6, num_items=ITEMS, **config):
        config = LLM4CDSRConfig(**SIZE | {"alpha": ALPHA, "beta": BETA, "temperature": TAU} | config)
        model = stir(config.build(make_catalog(num_domains, num_items), max_len))
        model.fit(make_events(num_items))
        return model

    return make


@pytest.fixture
def batch(make_batch) -> Batch:
    made = make_batch(HISTORIES, ASKED, pad=1)
    targets = torch.zeros_like(made.items)
    for row, wanted in enumerate(TARGETS):
        targets[row, -len(wanted) :] = torch.tensor(wanted)
    return dataclasses.replace(made, targets=targets)


# The paper's equations in NumPy, user by user


def adapt(v, weights, name):
    hidden = weights[f"{name}.first.weight"] @ v + weights[f"{name}.first.bias"]
    return weights[f"{name}.second.weight"] @ hidden + weights[f"{name}.second.bias"]


def local_table(text):
    """Principal coordinates within each domain, of the items with a text."""
    table = np.zeros((len(text), D))
    for domain in (0, 1):
        members = [item for item in range(1, len(text)) if item % 2 == domain and text[item].any()]
        centred = text[members] - text[members].mean(0)
        axes = np.linalg.svd(centred, full_matrices=False)[2][:D]
        axes *= np.sign(axes[np.arange(D), np.abs(axes).argmax(1)])[:, None]
        table[members] = centred @ axes.T
    return table


def encode(vectors, positions, weights, block, norm):
    x = np.sqrt(D) * np.array(vectors) + positions[: len(vectors)]
    causal = np.tril(np.ones((len(x), len(x))))
    normed = layer_norm(x, weights, f"{block}.attention_norm")
    x = x + attention(normed, normed, causal, weights, f"{block}.attention", 2)
    normed = layer_norm(x, weights, f"{block}.feed_forward_norm")
    x = x + feed_forward(normed, lambda h: np.maximum(h, 0), weights, f"{block}.feed_forward")
    return layer_norm(x, weights, norm)


def states(history, asked, weights, text, local):
    """[f; f_k] at every event."""
    items = [item for item, _, _ in history]
    vectors = [adapt(text[item], weights, "adapter") for item in items]
    mixed = encode(vectors, weights["positions.weight"], weights, "blocks.0", "norm")
    own = {}
    for k in (0, 1):
        of_k = [item for item in items if item % 2 == k]
        if of_k:
            places = weights[f"own_positions.{k}.weight"][1:]  # row 0 is the state before the first event
            own[k] = encode([local[item] for item in of_k], places, weights, f"own_layers.0.{k}", f"own_norms.{k}")
    hidden = []
    for t, k in enumerate(asked):
        count = sum(item % 2 == k for item in items[: t + 1])
        hidden.append(np.concatenate([mixed[t], own[k][count - 1] if count else np.zeros(D)]))
    return hidden


def softmax(x):
    share = np.exp(x - x.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def soft_targets(x, y):
    return softmax((x @ x.T + y @ y.T) / 2 * TAU)


def contrast(x, y, targets):
    logits = x @ y.T / TAU
    rows, columns = (-(targets * np.log(softmax(part))).sum(1).mean() for part in (logits, logits.T))
    return (rows + columns) / 2


def profile(user, weights, text, cluster):
    events = make_events()
    items = events.items[events.offsets[user] : events.offsets[user + 1]].numpy()
    means = [text[items[cluster[items] == c]].mean(0) for c in np.unique(cluster[items])]
    share = softmax(np.array([[mean @ weights["profile.query"] / np.sqrt(D_TEXT) for mean in means]]))[0]
    return sum(a * mean for a, mean in zip(share, means, strict=True))


def aligned(weights, text, local, cluster):
    """X and Y of both alignments: item against item, user against profile."""
    items = [(2, 3), (4, 5)]  # of the users who have events in both domains
    x, y = (np.array([adapt(text[pair[side]], weights, "adapter") for pair in items]) for side in (0, 1))
    last = np.array([states(h, a, weights, text, local)[-1][:D] for h, a in zip(HISTORIES, ASKED, strict=True)])
    users = [adapt(profile(user, weights, text, cluster), weights, "profile_adapter") for user in range(3)]
    return (x, y), (last, np.array(users))


def score(state, item, weights, text, local):
    return state[:D] @ adapt(text[item], weights, "adapter") + state[D:] @ local[item]


def total_loss(weights, text, local, cluster, fixed):
    """BCE with one negative, and the alignments, whose soft targets are `fixed`."""
    losses = []
    for history, asked, targets in zip(HISTORIES, ASKED, TARGETS, strict=True):
        for state, k, target in zip(states(history, asked, weights, text, local), asked, targets, strict=True):
            yes, no = (score(state, item, weights, text, local) for item in (target, NEGATIVE[k]))
            losses.append(-(np.log(sigmoid(yes)) + np.log(sigmoid(-no))) / 2)
    of_items, of_users = aligned(weights, text, local, cluster)
    return np.mean(losses) + ALPHA * contrast(*of_items, fixed[0]) + BETA * contrast(*of_users, fixed[1])


def test_states_and_scores_are_the_equations(build, batch):
    model = build()
    text, weights = model.text.numpy(), weights_of(model)
    local = local_table(text)
    np.testing.assert_allclose(model.local.numpy(), local, atol=1e-10)
    hidden, table = model(batch).detach().numpy(), model.item_embeddings().detach().numpy()
    for row, (history, asked) in enumerate(zip(HISTORIES, ASKED, strict=True)):
        expected = states(history, asked, weights, text, local)
        np.testing.assert_allclose(hidden[row, -len(history) :], expected, rtol=1e-9, atol=1e-12)
    for item in (2, 9):
        assert hidden[0, -1] @ table[item] == pytest.approx(score(expected_last(model), item, weights, text, local))


def expected_last(model):
    text = model.text.numpy()
    return states(HISTORIES[0], ASKED[0], weights_of(model), text, local_table(text))[-1]


def test_loss_and_one_gradient_step_are_the_equations(build, batch, make_catalog):
    model = build()
    objective = model.objective(batch, torch.Generator().manual_seed(0))
    assert objective.batch is batch
    [(weight, hidden)] = objective.answers
    bce = BCEConfig().build(make_catalog(2, ITEMS))
    value = weight * bce(hidden, model.item_embeddings(), batch, OneNegative()) + sum(objective.terms.values())

    text, cluster = model.text.numpy(), model.cluster.numpy()
    local = local_table(text)
    fixed = [soft_targets(x, y) for x, y in aligned(weights_of(model), text, local, cluster)]
    assert_step(model, value, lambda weights: total_loss(weights, text, local, cluster, fixed))


def test_alignment_by_hand():
    """Two rows, tau 1: X = Y = I gives targets softmax([1, 0]) and logits [1, 0], in both directions."""
    x = torch.eye(2, dtype=torch.float64)
    share = np.e / (1 + np.e)
    expected = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert soft_contrast(x, x, 1.0).item() == pytest.approx(expected)
    assert soft_contrast(x[:1], x[:1], 1.0).item() == 0, "one row has nothing to be told from"


def test_the_adapter_is_two_maps():
    adapter = Adapter(6, 4).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), adapter.second(adapter.first(x)))


def test_every_item_of_a_domain_may_be_drawn_for_the_alignment(build, make_batch):
    model = build(alpha=1.0)
    batch = make_batch([[(2, 0, 1), (4, 0, 2), (3, 1, 3)], [(6, 0, 1), (5, 1, 2)]], [[0, 0, 0], [0, 0]])
    found = {
        round(model.objective(batch, torch.Generator().manual_seed(seed)).terms["item_alignment"].item(), 10)
        for seed in range(20)
    }
    x = model.adapter(model.text)
    expected = {round(soft_contrast(x[[item, 6]], x[[3, 5]], TAU).item(), 10) for item in (2, 4)}
    assert found == expected


def test_users_of_one_domain_have_no_pair(build, make_batch):
    batch = make_batch([[(2, 0, 1)], [(3, 1, 3)], []], [[0], [0], []])
    terms = build().objective(batch, torch.Generator()).terms
    assert terms["item_alignment"] == 0
    assert terms["user_alignment"] > 0
    nobody = build().objective(make_batch([[], []], [[], []], pad=2), torch.Generator()).terms
    assert all(term == 0 for term in nobody.values())


def test_three_domains_have_three_pairs(build, make_batch):
    """Item i is of domain i % 3; every user has one item of each."""
    model = build(num_domains=3, alpha=1.0)
    batch = make_batch([[(1, 1, 1), (2, 2, 2), (3, 0, 3)], [(4, 1, 1), (5, 2, 2), (6, 0, 3)]], [[0] * 3, [0] * 3])
    x = model.adapter(model.text)
    pairs = [([3, 6], [1, 4]), ([3, 6], [2, 5]), ([1, 4], [2, 5])]
    expected = torch.stack([soft_contrast(x[a], x[b], TAU) for a, b in pairs]).mean()
    torch.testing.assert_close(model.objective(batch, torch.Generator()).terms["item_alignment"], expected)


def test_tables_are_frozen_and_made_again(build, make_catalog):
    model = build()
    assert not {"text", "local", "cluster", "history"} & set(model.state_dict())
    assert model.text[0].eq(0).all()
    assert model.local[ITEMS].eq(0).all(), "an item without a text has no local vector"
    names = {name for name, _ in model.named_parameters()}
    assert not any("text" in name or "local" in name for name in names)
    other = LLM4CDSRConfig(**SIZE).build(make_catalog(2, ITEMS), 6).double()
    other.load_state_dict(model.state_dict())
    other.eval().fit(make_events())
    assert torch.equal(other.item_embeddings(), model.item_embeddings())
    again = build()
    assert all(torch.equal(getattr(again, name), getattr(model, name)) for name in ("local", "cluster"))


def test_texts_are_needed_and_of_the_width_asked_for(make_catalog):
    model = LLM4CDSRConfig(**SIZE).build(make_catalog(2, ITEMS), 6)
    with pytest.raises(ValueError, match=r"add `text: \{name: tfidf\}` to data"):
        model.fit(dataclasses.replace(make_events(), text=None))
    with pytest.raises(ValueError, match=r"set model.d_text to 9, or data.text.d_text to 6"):
        model.fit(make_events(d_text=9, dtype=torch.float32))


def test_no_texts_at_all_and_a_domain_without(make_catalog):
    model = LLM4CDSRConfig(**SIZE).build(make_catalog(2, ITEMS), 6).double()
    events = make_events()
    half = events.text * (torch.arange(ITEMS + 1) % 2)[:, None]
    model.fit(dataclasses.replace(events, text=half))
    assert model.local[1:ITEMS:2].any(dim=1).all()
    assert not model.local[::2].any()
    model.fit(dataclasses.replace(events, text=half * 0))
    assert not model.local.any()


def test_k_means_finds_planted_clusters():
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(90) % 3
    vectors = torch.eye(3)[label] + 0.05 * torch.randn(90, 3, generator=generator)
    found = _k_means(vectors, 3, torch.Generator().manual_seed(0))
    assert len(set(zip(label.tolist(), found.tolist(), strict=True))) == 3
    assert _k_means(vectors[:1].repeat(5, 1), 3, generator).tolist() == [0] * 5, "fewer differ than there are clusters"


def test_the_profile_is_of_training_events_only(build, batch):
    """What is in the batch but not in the training events does not matter to the profile, and the other way round."""
    model = build()
    before, present = model._cluster_means(torch.tensor([0, 2]))
    cluster = model.cluster[torch.tensor([2, 3, 2, 3, 7])]
    expected = [model.text[[2, 3, 2, 3, 7]][cluster == c].mean(0) for c in cluster.unique()]
    torch.testing.assert_close(before[0][present[0]], torch.stack(expected))
    assert present.sum(1).tolist() == [len(cluster.unique()), len(model.cluster[torch.tensor([6, 9])].unique())]
    hidden = model(batch)
    model.history = model.history.flip(0)
    assert torch.equal(model(batch), hidden), "states do not read the profile"


def test_without_exchange_a_thread_of_a_domain_holds_its_own_events_only(build, make_batch):
    asked = [[None] * 3 + [0]]
    before = build()(make_batch(HISTORIES[:1], asked))[0, -1]
    others = [[(item + 6 if domain else item, domain, time) for item, domain, time in HISTORIES[0]]]
    after = build()(make_batch(others, asked))[0, -1]
    assert torch.equal(after[D:], before[D:])
    assert not torch.allclose(after[:D], before[:D])
    own = [[(item if domain else item + 6, domain, time) for item, domain, time in HISTORIES[0]]]
    assert not torch.allclose(build()(make_batch(own, asked))[0, -1, D:], before[D:])


@pytest.mark.parametrize("cross", [None, CrossConfig(placement="early"), CrossConfig(placement="stack")])
def test_no_view_contains_the_target(cross, build, make_batch):
    """The state that asks for an event is the same whatever that event and the later ones are."""
    model = build(cross=cross)
    for t in range(1, 4):
        asked = [[(n + t) % 2 for n in range(t)] + [0] * (4 - t)]
        before = model(make_batch(HISTORIES[:1], asked))[0, :t]
        changed = [[*HISTORIES[0][:t], *((item + 8, domain, time) for item, domain, time in HISTORIES[0][t:])]]
        assert torch.allclose(model(make_batch(changed, asked))[0, :t], before, rtol=1e-12, atol=1e-12)


def test_an_exchange_at_one_time_follows_the_order_of_the_history(build, make_batch):
    """Of two events at one time the first does not see the second through the exchange."""
    model = build(cross=CrossConfig(placement="early"))
    histories = [[(2, 0, 5), (3, 1, 5)]]
    before = model(make_batch(histories, [[0, 0]]))[0]
    after = model(make_batch([[(2, 0, 5), (9, 1, 5)]], [[0, 0]]))[0]
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1, D:], before[1, D:]), "and the second sees the first"


@pytest.mark.parametrize("num_domains", [1, 2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(placement="early"), CrossConfig(placement="stack")])
def test_trains_a_step(cross, num_domains, make_catalog, batch):
    config = LLM4CDSRConfig(**SIZE, cross=cross)
    catalog = make_catalog(num_domains, ITEMS)
    if num_domains == 1 and cross is not None:
        with pytest.raises(ValueError, match="at least two domains"):
            config.build(catalog, 6)
        return
    if num_domains == 1:
        zeros = {name: getattr(batch, name).clamp(max=0) for name in ("domains", "target_domains")}
        batch = dataclasses.replace(batch, **zeros)
    model = config.build(catalog, 6, torch.Generator().manual_seed(0)).train()
    model.fit(make_events())
    bce = BCEConfig().build(catalog)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    torch.manual_seed(0)
    losses = []
    for step in range(25):
        objective = model.objective(batch, torch.Generator().manual_seed(step))
        loss = bce(objective.answers[0][1], model.item_embeddings(), batch, OneNegative())
        loss = loss + sum(objective.terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_the_exchange_leaves_the_other_weights_as_they_start(placement, make_catalog):
    def start(cross):
        config = LLM4CDSRConfig(**SIZE, cross=cross)
        return config.build(make_catalog(2), 6, torch.Generator().manual_seed(3)).state_dict()

    baseline, treatment = start(None), start(CrossConfig(placement=placement))
    assert all(torch.equal(treatment[name], value) for name, value in baseline.items())
    assert {name.split(".")[0] for name in treatment.keys() - baseline.keys()} == {placement}


def test_size_in_closed_form():
    """The published widths: 1024 -> 512 -> 128, two blocks, three threads. Frozen tables are not counted."""
    domain = torch.tensor([NO_DOMAIN] + [0] * 500 + [1] * 700)
    with torch.device("meta"):
        model = LLM4CDSRConfig().build(Catalog(("a", "b"), domain, torch.zeros_like(domain)), 200)
    d, text, ff = 128, 1024, 128
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    adapter = text * text // 2 + text // 2 + text // 2 * d + d
    counts = count_parameters(model)
    assert counts["item_table"] == 0
    assert counts["encoder"] == 2 * 3 * block + 2 * adapter + text
    assert counts["other_embeddings"] == (200 + 2 * 201) * d
    assert counts["total"] == counts["encoder"] + counts["other_embeddings"] + 3 * 2 * d


def test_threads_split_states_and_table(build, batch):
    model = build()
    assert isinstance(model, HasThreads)
    assert sum(model.threads) == model(batch).shape[-1] == model.item_embeddings().shape[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 8}, "exceeds d_text = 6"),
        ({"num_heads": 3}, "num_heads = 3 does not divide"),
        ({"cross": CrossConfig(placement="stack", num_units=2)}, "num_units"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        LLM4CDSRConfig(**SIZE | wrong)
