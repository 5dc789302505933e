"""CDSRNP against its equations, its support set against the training events, and what its users may know."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy_equations import (
    ASKED,
    HISTORIES,
    NUM_ITEMS,
    TARGETS,
    assert_step,
    attention,
    cross_entropy,
    feed_forward,
    gelu,
    layer_norm,
    linear,
    pre_norm_block,
    sigmoid,
    training_batch,
    weights_of,
)
from torch.distributions import kl_divergence

from recsys.data.batches import training_events
from recsys.data.split import TRAIN
from recsys.data.synthetic import SyntheticConfig
from recsys.experiment import DataConfig, load_data
from recsys.losses import SoftmaxConfig
from recsys.models import CDSRNPConfig, count_parameters
from recsys.models.attention import CrossConfig
from recsys.types import PAD_ID, TrainingEvents

SIZE = {"d_model": 3, "d_ff": 2, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
MAX_LEN = 6
# Training events per user, even items of domain 0. The first two are the users of the batch. The fourth is in one
# domain only; all others are drawn.
EVENTS = [[2, 3, 4, 5, 8], [6, 9, 10], [4, 7, 1, 6], [2, 4, 6], [1, 3, 10, 11, 2, 9, 4, 5, 7]]
OVERLAPPING = [0, 1, 2, 4]


def events_of(histories):
    lengths = torch.tensor([len(history) for history in histories])
    items = torch.tensor([item for history in histories for item in history])
    return TrainingEvents(
        items, torch.arange(len(items)), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    )


@pytest.fixture
def build(make_catalog, stir):
    def make(events=EVENTS, num_domains=2, **config):
        model = stir(CDSRNPConfig(**SIZE | config).build(make_catalog(num_domains, NUM_ITEMS), MAX_LEN))
        if events is not None:
            model.fit(events_of(events))
        return model

    return make


@pytest.fixture
def batch(make_batch):
    return training_batch(make_batch)


# The equations in NumPy, user by user


def states_along(items, weights):
    """f^j of both domains after each event; the learned one as long as there is no event."""
    encoded = []
    for domain in (0, 1):
        own = [item for item in items if item % 2 == domain]
        x = weights["embedding.items.weight"][own] + weights["embedding.positions.weight"][1 : len(own) + 1]
        allowed = np.tril(np.ones((len(own), len(own))))
        x = layer_norm(
            pre_norm_block(x, x, allowed, gelu, weights, f"layers.0.{domain}", 1), weights, f"norms.{domain}"
        )
        encoded.append(np.concatenate([weights["nulls.weight"][[domain]], x]))
    counts = [np.cumsum([item % 2 == domain for item in items]) for domain in (0, 1)]
    return np.stack([encoded[domain][counts[domain]] for domain in (0, 1)], axis=1)


def pair(states, answer, weights):
    """r of what all domains' states say and an answer."""
    return feed_forward(np.concatenate([*states, weights["embedding.items.weight"][answer]]), gelu, weights, "pair")


def support_pairs(weights, users=OVERLAPPING):
    return {
        user: pair(states_along(EVENTS[user][:-1][-MAX_LEN:], weights)[-1], EVENTS[user][-1], weights) for user in users
    }


def gaussian(pairs, weights):
    """mu and sigma."""
    m = np.mean(pairs, axis=0) if len(pairs) else np.zeros(3)
    return linear(m, weights, "mean"), 0.1 + 0.9 * sigmoid(linear(m, weights, "spread"))


def divergence(q, p):
    """KL(q || p) of independent Gaussians."""
    (mu_q, sigma_q), (mu_p, sigma_p) = q, p
    return np.sum(np.log(sigma_p / sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * sigma_p**2) - 0.5)


def answer(user, states, domain, support, z, weights):
    """hidden of a user."""
    others = np.array([r for other, r in support.items() if other != user])
    h = linear(np.concatenate(states), weights, "interest")
    c = attention(h[None], others, np.ones((1, len(others))), weights, "attention", 1)[0]
    g = sigmoid(linear(np.concatenate([h, c, z]), weights, "gate"))
    return states[domain] + feed_forward(np.concatenate([states[domain], g * c, z]), gelu, weights, "answer")


def rows_along(weights):
    return [states_along([item for item, _, _ in history], weights) for history in HISTORIES]


def loss(weights, noise, users):
    """Mean cross-entropy over the questions of the batch, plus 0.7 times the KL."""
    support, rows = support_pairs(weights, users), rows_along(weights)
    others = [r for user, r in support.items() if user not in (0, 1)]
    asked = [pair(states[-1], targets[-1], weights) for states, targets in zip(rows, TARGETS, strict=True)]
    prior, posterior = gaussian(others, weights), gaussian(others + asked, weights)
    z = posterior[0] + posterior[1] * noise
    table = weights["embedding.items.weight"]
    each = [
        cross_entropy(answer(row, rows[row][t], target % 2, support, z, weights), table, target)
        for row, targets in enumerate(TARGETS)
        for t, target in enumerate(targets)
    ]
    return np.mean(each) + 0.7 * divergence(posterior, prior)


def test_states(build, batch):
    model = build()
    assert model.support_user.tolist() == OVERLAPPING
    hidden = model(batch).detach().numpy()
    weights = weights_of(model)
    support, rows = support_pairs(weights), rows_along(weights)
    for row, asked in enumerate(ASKED):
        z, _ = gaussian([r for user, r in support.items() if user != row], weights)
        for t, domain in enumerate(asked):
            expected = answer(row, rows[row][t], domain, support, z, weights)
            np.testing.assert_allclose(hidden[row, t - len(asked)], expected, rtol=1e-10, atol=1e-12)


def test_objective_and_a_step(build, batch, make_catalog):
    model = build(kl_weight=0.7, num_support=2, support_seed=9)
    assert model.support_user.tolist() == [0, 2], "one in the batch and one who is not"
    objective = model.objective(batch, torch.Generator().manual_seed(5))
    assert objective.batch is batch
    [(weight, hidden)] = objective.answers
    assert weight == 1
    criterion = SoftmaxConfig().build(make_catalog(2, NUM_ITEMS))
    value = criterion(hidden, model.item_embeddings(), batch, None) + objective.terms["kl"]
    noise = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    assert_step(model, value, lambda weights: loss(weights, noise, [0, 2]))


def test_the_latent_by_hand(build):
    """One coordinate: m = 2 of two pairs of three, then of no pair at all."""
    model = build(None, d_model=1)
    with torch.no_grad():
        for part, weight, bias in ((model.mean, 3.0, 1.0), (model.spread, math.log(3) / 2, 0.0)):
            part.weight.fill_(weight)
            part.bias.fill_(bias)
    pairs = torch.tensor([[1.5], [7.0], [2.5]], dtype=torch.float64)
    q = model._latent(pairs, torch.tensor([True, False, True]))
    assert q.mean.item() == pytest.approx(3 * 2 + 1)
    assert q.stddev.item() == pytest.approx(0.1 + 0.9 * 0.75)
    p = model._latent(pairs, torch.zeros(3, dtype=torch.bool))
    assert (p.mean.item(), p.stddev.item()) == pytest.approx((1, 0.55))
    expected = math.log(0.55 / 0.775) + (0.775**2 + 36) / (2 * 0.55**2) - 0.5
    assert kl_divergence(q, p).item() == pytest.approx(expected)
    assert kl_divergence(q, q).item() == 0


def test_in_half_precision_the_latent_keeps_its_own(build, batch):
    model = build().float()
    expected = model.objective(batch, torch.Generator().manual_seed(5)).terms["kl"]
    with torch.autocast("cpu", torch.bfloat16):
        objective = model.objective(batch, torch.Generator().manual_seed(5))
        assert model(batch).isfinite().all()
    assert objective.terms["kl"].dtype == torch.float32
    torch.testing.assert_close(objective.terms["kl"], expected, rtol=0.05, atol=0)
    (objective.answers[0][1].square().sum() + objective.terms["kl"]).backward()


def test_a_batch_that_is_all_of_the_support_has_a_prior_of_no_pairs(build, batch):
    model = build(EVENTS[:2])
    weights = weights_of(model)
    objective = model.objective(batch, torch.Generator().manual_seed(5))
    rows = rows_along(weights)
    asked = [pair(states[-1], targets[-1], weights) for states, targets in zip(rows, TARGETS, strict=True)]
    expected = divergence(gaussian(asked, weights), gaussian([], weights))
    assert objective.terms["kl"].item() == pytest.approx(expected)


def test_the_order_of_the_support_users_means_nothing(build, batch):
    model = build()
    before, drawn = model(batch), model.objective(batch, torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 3, 1])
    for name in ("support_user", "support_items", "support_times", "support_answer"):
        setattr(model, name, getattr(model, name)[order])
    torch.testing.assert_close(model(batch), before, rtol=1e-12, atol=1e-12)
    again = model.objective(batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.answers[0][1], drawn.answers[0][1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.terms["kl"], drawn.terms["kl"], rtol=1e-12, atol=1e-12)


def test_evaluation_draws_nothing_and_training_draws_from_its_generator(build, batch):
    model = build(dropout=0.3)
    before = model(batch)
    first, again, other = (
        model.objective(batch, torch.Generator().manual_seed(seed)).answers[0][1] for seed in (1, 1, 2)
    )
    assert torch.equal(model(batch), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("cross", [None, CrossConfig(num_heads=1), CrossConfig(num_heads=1, placement="stack")])
def test_a_user_reads_nothing_of_its_own_pair(cross, build, batch):
    """What the support holds of a user changes the states of others, and none of its own."""
    model = build(cross=cross)
    alone = batch.map(lambda tensor: tensor[:1])
    generator = torch.Generator()

    def seen():
        objective = model.objective(alone, generator.manual_seed(3))
        return model(batch), objective.answers[0][1], objective.terms["kl"]

    before = seen()
    assert model.support_user[0] == 0
    model.support_answer[0] = 11
    model.support_items[0, -2:] = torch.tensor([10, 9])
    after = seen()
    assert torch.equal(after[0][0], before[0][0])
    assert not torch.allclose(after[0][1], before[0][1])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    model.support_answer[2] = 11
    assert not any(torch.allclose(a, b) for a, b in zip(seen(), after, strict=True))


def test_targets_reach_the_states_by_way_of_z_alone(build, batch):
    model = build()
    scrambled = dataclasses.replace(batch, targets=batch.targets * 0 + 11)

    def states(given):
        return model.objective(given, torch.Generator().manual_seed(2)).answers[0][1]

    assert torch.equal(model(batch), model(scrambled))
    assert not torch.allclose(states(batch), states(scrambled))
    with torch.no_grad():
        model.answer[0].weight[:, 6:] = 0
        model.gate.weight[:, 6:] = 0
    assert torch.equal(states(batch), states(scrambled))


def touched(states, model):
    """The items that states depend on."""
    value = (states[:, 0] + 0.3 * states[:, 1]).sum()
    (slope,) = torch.autograd.grad(value, model.embedding.items.weight, retain_graph=True)
    return set(torch.nonzero(slope.any(1)).flatten().tolist())


def test_no_domain_state_holds_another_domain_or_the_target(build, batch):
    """The gradient of a domain's states reaches their own events alone, and never a target that is not in the row."""
    model = build(None)
    questions = model._ask(batch)
    for domain in (0, 1):
        expected = {item for history in HISTORIES for item, k, _ in history if k == domain}
        assert touched(questions.states[:, domain], model) == expected


@pytest.mark.parametrize("placement", ["early", "stack"])
def test_with_an_exchange_the_state_of_the_asked_domain_is_that_of_the_question(placement, build, make_batch):
    """It knows the other domain's events up to now; a state of another domain those up to its own latest event."""
    model = build(None, cross=CrossConfig(num_heads=1, placement=placement))
    questions = model._ask(make_batch([[(3, 1, 1), (2, 0, 2), (5, 1, 3), (4, 0, 4)]], [[None, None, None, 1]]))
    for domain, expected in ((1, {2, 3, 4, 5}), (0, {2, 3, 4, 5})):
        assert touched(questions.states[:, domain], model) == expected
    questions = model._ask(make_batch([[(3, 1, 1), (2, 0, 2), (5, 1, 3)]], [[None, None, 1]]))
    for domain, expected in ((1, {2, 3, 5}), (0, {2, 3})):
        assert touched(questions.states[:, domain], model) == expected
    questions = model._ask(make_batch([[(2, 0, 2), (4, 0, 3)]], [[None, 1]]))
    assert touched(questions.states[:, 1], model) == {2, 4}


@pytest.mark.parametrize("cross", [None, CrossConfig(num_heads=1), CrossConfig(num_heads=1, placement="stack")])
def test_a_pair_of_the_support_is_that_of_a_user_who_is_asked(cross, build, make_batch):
    model = build(cross=cross)
    times = iter(range(100))
    known = [[(item, item % 2, next(times)) for item in EVENTS[user]][:-1][-MAX_LEN:] for user in OVERLAPPING]
    answers = torch.tensor([EVENTS[user][-1] for user in OVERLAPPING])
    asked = [[None] * (len(row) - 1) + [answer % 2] for row, answer in zip(known, answers.tolist(), strict=True)]
    expected = model._pairs(model._ask(make_batch(known, asked)).states, answers)
    torch.testing.assert_close(model._support(), expected, rtol=1e-12, atol=1e-12)


def test_a_missing_domain_has_its_learned_state(build, make_batch):
    model = build()
    batch = make_batch([[(2, 0, 1), (4, 0, 2)], [(3, 1, 5)]], [[1, 0], [1]])
    questions = model._ask(batch)
    assert questions.row.tolist() == [0, 0, 1]
    for place, domain in ((0, 1), (1, 1), (2, 0)):
        assert torch.equal(questions.states[place, domain], model.nulls.weight[domain])
    assert not torch.equal(questions.states[2, 1], model.nulls.weight[1])


def test_the_support_is_made_of_training_events(make_catalog):
    source = SyntheticConfig(num_users=60, items_per_domain=40, mean_events=12, max_events=20)
    data = load_data(DataConfig(source=source), None)
    model = CDSRNPConfig(**SIZE, num_support=10).build(data.catalog, 5)
    model.fit(training_events(data.sequences, data.split))
    sequences, role = data.sequences, data.split.role
    assert len(set(model.support_user.tolist())) == 10
    rows = zip(model.support_user, model.support_items, model.support_times, model.support_answer, strict=True)
    for user, items, times, following in rows:
        events = slice(sequences.offsets[user], sequences.offsets[user + 1])
        kept = role[events] == TRAIN
        training = sequences.items[events][kept].tolist()
        assert following == training[-1]
        assert items[items != PAD_ID].tolist() == training[:-1][-5:]
        assert times[items != PAD_ID].tolist() == sequences.times[events][kept][:-1][-5:].tolist()
        assert len(set(sequences.domains[events][kept].tolist())) >= 2
        assert not kept.all()


def test_the_support_set_by_hand(build):
    model = build()
    assert model.support_user.tolist() == OVERLAPPING
    assert model.support_answer.tolist() == [8, 10, 6, 7]
    assert model.support_items.tolist() == [
        [0, 0, 2, 3, 4, 5],
        [0, 0, 0, 0, 6, 9],
        [0, 0, 0, 4, 7, 1],
        [10, 11, 2, 9, 4, 5],
    ]


def test_the_seed_of_the_support_decides_who_is_in_it(build):
    def users(seed):
        return build(num_support=2, support_seed=seed).support_user.tolist()

    found = {tuple(users(seed)) for seed in range(12)}
    assert users(3) == users(3)
    assert len(found) > 2
    assert {user for pairs in found for user in pairs} == set(OVERLAPPING)


def test_the_support_is_drawn_anew_and_not_saved(build, batch):
    model, other = build(), build(None)
    assert not any("support" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(batch), model(batch))
    other.fit(events_of(EVENTS))
    assert torch.equal(other(batch), model(batch))


@pytest.mark.parametrize("num_domains", [2, 3])
@pytest.mark.parametrize("cross", [None, CrossConfig(num_heads=1), CrossConfig(num_heads=1, placement="stack")])
def test_a_step_changes_every_part(num_domains, cross, make_batch, make_catalog):
    config = CDSRNPConfig(**SIZE | {"dropout": 0.1}, cross=cross)
    model = config.build(make_catalog(num_domains, 30), 8, torch.Generator().manual_seed(0)).train()
    model.fit(events_of([list(range(1, 9)), list(range(3, 9)), list(range(20, 25))]))
    items = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [9, 12]]
    batch = make_batch(
        [[(item, item % num_domains, t) for t, item in enumerate(row)] for row in items],
        [[(item + 1) % num_domains for item in row] for row in items],
    )
    objective = model.objective(batch, torch.Generator().manual_seed(1))
    value = objective.answers[0][1].square().sum() + objective.terms["kl"] + model.item_embeddings().square().sum()
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_rows_without_questions_add_no_pair(build, batch, make_batch):
    model = build()
    nothing = make_batch([[], []], [[], []], pad=2)
    objective = model.objective(nothing, torch.Generator())
    assert objective.terms["kl"] == 0
    assert (objective.answers[0][1] == 0).all()


def test_the_shared_parts_start_alike_with_and_without(make_catalog):
    def start(cross):
        generator = torch.Generator().manual_seed(3)
        return CDSRNPConfig(**SIZE, cross=cross).build(make_catalog(3), 12, generator).state_dict()

    null = start(None)
    for placement in ("early", "stack"):
        treated = start(CrossConfig(num_heads=1, placement=placement))
        assert null.keys() < treated.keys()
        assert all(torch.equal(null[name], treated[name]) for name in null)


def test_parameters_in_closed_form(make_catalog):
    n, d, ff, layers, length, domains = 60, 8, 12, 2, 10, 3
    config = CDSRNPConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2)
    with torch.device("meta"):
        counts = count_parameters(config.build(make_catalog(domains, n), length))
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    feed_forwards = ((domains + 1) * d + 3 * d) * ff + 2 * (ff + ff * d + d)
    maps = 2 * (d * d + d) + domains * d * d + d + 3 * d * d + d
    assert counts == {
        "item_table": (n + 1) * d,
        "other_embeddings": (length + 1 + domains) * d,
        "encoder": domains * layers * block + 4 * d * d + 4 * d,
        "cross_attention": 0,
        "gate": 0,
        "output": domains * 2 * d + feed_forwards + maps,
        "total": counts["total"],
    }


def test_data_without_overlapping_users_are_refused(make_catalog, build):
    with pytest.raises(ValueError, match="cdsrnp learns from users of several domains and the data has one"):
        CDSRNPConfig(**SIZE).build(make_catalog(1), 6)
    with pytest.raises(ValueError, match="training events in two domains, and there are none"):
        build([[2, 4], [1, 3, 5], []])
