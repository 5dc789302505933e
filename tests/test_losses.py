import math
from dataclasses import dataclass, field

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from recsys import losses
from recsys.losses import (
    BCEConfig,
    GBCEConfig,
    InfoNCEConfig,
    LossConfig,
    SampledSoftmaxConfig,
    SoftmaxConfig,
    chunked_cross_entropy,
    sampled_logits,
)
from recsys.negatives import InBatchConfig, PopularityConfig, UniformConfig
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, Draw

D_MODEL = 5
# Interleaved ids; domain 2 has a single item.
ITEM_DOMAIN = torch.tensor([NO_DOMAIN, 0, 1, 0, 1, 0, 0, 1, 2, 0, 1])
CATALOG = Catalog(("food", "kitchen", "toys"), ITEM_DOMAIN, torch.arange(11))
# User 2 has targets of one domain only, user 3 none at all; a target may be missing between others.
TARGETS = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 7, 8, 2], [0, 0, 0, 5, 9], [0, 0, 0, 0, 0], [6, 0, 4, 1, 2]])

SAMPLED = [
    SampledSoftmaxConfig(),
    SampledSoftmaxConfig(log_q=False, temperature=0.5),
    SampledSoftmaxConfig(temperature=2.0),
    BCEConfig(),
    GBCEConfig(t=0.6),
    GBCEConfig(t=1.0, catalogue="all"),
    InfoNCEConfig(),
]
EVERY = [SoftmaxConfig(), SoftmaxConfig(catalogue="all", temperature=0.7, chunk_positions=2), *SAMPLED]


def batch_of(targets: torch.Tensor, item_domain: torch.Tensor = ITEM_DOMAIN) -> Batch:
    return Batch(
        user=torch.arange(len(targets)),
        items=targets,
        domains=item_domain[targets],
        times=targets,
        targets=targets,
        target_domains=item_domain[targets],
    )


def inputs(targets: torch.Tensor = TARGETS, items: int = 11, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(*targets.shape, D_MODEL, generator=generator, dtype=torch.float64)
    table = torch.randn(items, D_MODEL, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()


@dataclass
class ByTarget:
    """Negatives that are fixed for every target id: whatever the order of the positions, the draws follow them."""

    items: torch.Tensor
    log_q: torch.Tensor
    target_log_q: torch.Tensor
    row: torch.Tensor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def draw(self, targets: torch.Tensor) -> Draw:
        row = torch.zeros(11, dtype=torch.int64) if len(self.log_q) == 1 else self.row
        if row is not None:
            return Draw(self.items, self.log_q, self.target_log_q[targets], row[targets])
        items = self.items if len(self.items) == 1 else self.items[targets]
        return Draw(items, self.log_q[targets], self.target_log_q[targets])


def sampler(kind: str, num_negatives: int = 6) -> ByTarget:
    """Draws with repetitions and accidental hits, `shared` by all positions or `by_domain`. `barred` shares them and
    bars those of other domains."""
    generator = torch.Generator().manual_seed(1)
    rows = {"per_position": 11, "by_domain": 3}.get(kind, 1)
    items = torch.randint(1, 11, (rows, num_negatives), generator=generator)
    items[:, 1] = items[:, 0]
    if kind == "per_position":
        items[1:, 2] = torch.arange(1, 11)
    log_q = torch.rand(rows, num_negatives, generator=generator, dtype=torch.float64).log()
    if kind == "barred":
        log_q = log_q.where(ITEM_DOMAIN[items] == ITEM_DOMAIN[:, None], -torch.inf)
    row = ITEM_DOMAIN.clamp(min=0) if kind == "by_domain" else None
    return ByTarget(items, log_q, torch.rand(11, generator=generator, dtype=torch.float64).log(), row)


def direct(config, hidden, table, targets, negatives, catalog=CATALOG) -> torch.Tensor:
    """Every loss again, position by position, from its formula."""
    terms = []
    for user, time in (targets != PAD_ID).nonzero().tolist():
        target = targets[user, time]
        domain = int(catalog.item_domain[target])
        scores = table @ hidden[user, time]
        if config.name == "softmax":
            pool = catalog.items_of(domain) if config.catalogue == "domain" else torch.arange(1, len(table))
            loss = (scores[pool] / config.temperature).logsumexp(0) - scores[target] / config.temperature
            terms.append((user, domain, loss))
            continue
        draw = negatives.draw(target[None])
        row = 0 if draw.row is None else draw.row[0]
        kept = [(int(i), q) for i, q in zip(draw.items[row], draw.log_q[row], strict=True) if q > -torch.inf]
        draws = len(kept)
        kept = [(i, q) for i, q in kept if i != target]
        if config.name in ("bce", "gbce"):
            beta = 1.0
            if config.name == "gbce":
                pool = len(catalog.items_of(domain)) if config.catalogue == "domain" else catalog.num_items
                alpha = min(1.0, draws / max(pool - 1, 1))
                beta = alpha * (config.t * (1 - 1 / alpha) + 1 / alpha) if alpha > 0 else 1 - config.t
            loss = -beta * scores[target].sigmoid().log()
            loss = loss - sum((1 - scores[i].sigmoid()).log() for i, _ in kept)
            terms.append((user, domain, loss / (1 + len(kept))))
            continue
        corrected = config.name == "sampled_softmax" and config.log_q
        logits = [scores[target] / config.temperature - (draw.target_log_q[0] if corrected else 0)]
        logits += [scores[i] / config.temperature - (q if corrected else 0) for i, q in kept]
        terms.append((user, domain, torch.stack(logits).logsumexp(0) - logits[0]))
    if config.name != "infonce":
        return sum(loss for _, _, loss in terms) / len(terms)
    total = 0.0
    for domain in range(catalog.num_domains):
        users = sorted({user for user, d, _ in terms if d == domain})
        means = []
        for user in users:
            mine = [loss for u, d, loss in terms if (u, d) == (user, domain)]
            means.append(sum(mine) / len(mine))
        if means:
            total = total + sum(means) / len(means)
    return total


def assert_same_with_gradients(config, targets=TARGETS, negatives=None, catalog=CATALOG) -> None:
    hidden, table = inputs(targets, catalog.num_items + 1)
    expected = direct(config, hidden, table, targets, negatives, catalog)
    d_hidden, d_table = torch.autograd.grad(expected, (hidden, table))
    loss = config.build(catalog)(hidden, table, batch_of(targets, catalog.item_domain), negatives)
    loss.backward()
    for mine, direct_value in ((loss, expected), (hidden.grad, d_hidden), (table.grad, d_table)):
        torch.testing.assert_close(mine, direct_value, rtol=0, atol=1e-10)
    assert (hidden.grad[targets == PAD_ID] == 0).all()
    assert (table.grad[PAD_ID] == 0).all()


@pytest.mark.parametrize("chunk_positions", [1, 2, 3, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("catalogue", ["domain", "all"])
def test_softmax_equals_the_direct_computation(catalogue, temperature, chunk_positions):
    config = SoftmaxConfig(catalogue=catalogue, temperature=temperature, chunk_positions=chunk_positions)
    assert_same_with_gradients(config)
    assert_same_with_gradients(config, targets=TARGETS[2:3])  # a single domain has targets


@pytest.mark.parametrize("kind", ["per_position", "shared", "by_domain", "barred"])
@pytest.mark.parametrize("config", SAMPLED, ids=repr)
def test_sampled_losses_equal_the_direct_computation(config, kind):
    assert_same_with_gradients(config, negatives=sampler(kind))
    assert_same_with_gradients(config, negatives=sampler(kind), targets=TARGETS[2:3])


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("kind", ["shared", "by_domain"])
@pytest.mark.parametrize("config", [config for config in SAMPLED if config.name == "sampled_softmax"], ids=repr)
def test_shared_negatives_in_several_pieces(config, kind, counts, monkeypatch):
    monkeypatch.setattr(losses, "_SHARED_ROWS", 2)
    monkeypatch.setattr(losses, "may_count", lambda _: counts)
    assert_same_with_gradients(config, negatives=sampler(kind))


@pytest.mark.parametrize("num_negatives", [6, 40], ids=["fewer than items", "more than items"])
@pytest.mark.parametrize("config", SAMPLED, ids=repr)
def test_sampled_losses_without_sparse_kernels(config, num_negatives, monkeypatch):
    assert_same_with_gradients(config, negatives=sampler("per_position", num_negatives))
    monkeypatch.setattr(losses, "_sparse_applies", lambda *_: False)
    assert_same_with_gradients(config, negatives=sampler("per_position", num_negatives))


@pytest.mark.parametrize(
    "negatives",
    [
        UniformConfig(num_negatives=4),
        UniformConfig(num_negatives=4, shared=True),
        UniformConfig(num_negatives=4, scope="each_domain"),
        PopularityConfig(num_negatives=4, alpha=0.5, scope="all", shared=True),
        InBatchConfig(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("config", SAMPLED, ids=repr)
def test_losses_take_what_the_samplers_draw(config, negatives):
    item_domain = ITEM_DOMAIN.where(ITEM_DOMAIN != 2, 0)
    catalog = Catalog(("food", "kitchen"), item_domain, torch.arange(11))
    sampler = negatives.build(catalog, torch.Generator().manual_seed(0))
    draw = sampler.draw(TARGETS[TARGETS != PAD_ID])

    class Replayed:
        """The same draws for the whole batch and, in order, for single positions."""

        generator = sampler.generator
        position = 0

        def draw(self, targets):
            if len(targets) > 1:
                return draw
            row, self.position = self.position, self.position + 1
            target_log_q = draw.target_log_q[row][None]
            if draw.row is not None:
                return Draw(draw.items, draw.log_q, target_log_q, draw.row[row][None])
            items, log_q = (x[0 if len(x) == 1 else row][None] for x in (draw.items, draw.log_q))
            return Draw(items, log_q, target_log_q)

    assert_same_with_gradients(config, negatives=Replayed(), catalog=catalog)


def test_softmax_of_equal_scores_is_the_log_of_the_catalogue():
    hidden, table = torch.zeros(5, 5, D_MODEL), torch.randn(11, D_MODEL)
    everything = SoftmaxConfig(catalogue="all").build(CATALOG)(hidden, table, batch_of(TARGETS), None)
    assert everything.item() == pytest.approx(math.log(10))
    # Targets 1 3 5 9 6 1 among the five items of domain 0, 2 4 7 2 4 2 among the four of 1, and 8, alone in 2.
    domain = SoftmaxConfig().build(CATALOG)(hidden, table, batch_of(TARGETS), None)
    assert domain.item() == pytest.approx((6 * math.log(5) + 6 * math.log(4)) / 13)


def test_sampled_softmax_over_all_other_items_is_the_softmax():
    others = torch.stack([torch.tensor([j for j in range(1, 11) if j != i][:9]) for i in range(11)])
    negatives = ByTarget(others, torch.full((11, 9), -0.3).double(), torch.full((11,), -0.3).double())
    hidden, table = inputs()
    sampled = SampledSoftmaxConfig(temperature=0.7).build(CATALOG)(hidden, table, batch_of(TARGETS), negatives)
    full = SoftmaxConfig(catalogue="all", temperature=0.7).build(CATALOG)(hidden, table, batch_of(TARGETS), None)
    torch.testing.assert_close(sampled, full, rtol=0, atol=1e-12)


def test_log_q_correction_by_hand():
    """Target score 1 drawn with 1/2, one negative of score 2 drawn with 1/8: softmax of (1 + ln 2, 2 + ln 8)."""
    hidden, table = torch.tensor([[[1.0]]]), torch.zeros(11, 1)
    table[1], table[3] = 1.0, 2.0
    negatives = ByTarget(torch.tensor([[3]]), torch.tensor([[1 / 8]]).log(), torch.full((11,), 0.5).log())
    loss = SampledSoftmaxConfig().build(CATALOG)(hidden, table, batch_of(torch.tensor([[1]])), negatives)
    assert loss.item() == pytest.approx(math.log(1 + 8 * math.e**2 / (2 * math.e)))


def test_gbce_without_calibration_is_bce():
    for kind in ("per_position", "shared", "barred"):
        results = []
        for config in (GBCEConfig(t=0.0), GBCEConfig(t=0.0, catalogue="all"), BCEConfig()):
            hidden, table = inputs()
            loss = config.build(CATALOG)(hidden, table, batch_of(TARGETS), sampler(kind))
            results.append((loss, *torch.autograd.grad(loss, (hidden, table))))
        for result in results[:2]:
            assert all(torch.equal(mine, its) for mine, its in zip(result, results[2], strict=True))


@pytest.mark.parametrize(
    ("t", "catalogue", "beta"),
    [
        (1.0, "domain", 2 / 4),  # alpha = 2 draws of 4 rivals
        (0.5, "domain", 3 / 4),
        (1.0, "all", 2 / 9),
        (0.9, "all", 0.9 * 2 / 9 + 0.1),
    ],
)
def test_gbce_weighs_the_target_by_the_sampling_rate(t, catalogue, beta):
    hidden, table = torch.zeros(1, 1, D_MODEL), torch.zeros(11, D_MODEL)
    negatives = ByTarget(torch.tensor([[3, 5]]), torch.zeros(1, 2), torch.zeros(11))
    config = GBCEConfig(t=t, catalogue=catalogue)
    loss = config.build(CATALOG)(hidden, table, batch_of(torch.tensor([[1]])), negatives)
    assert loss.item() == pytest.approx((beta + 2) * math.log(2) / 3)


def test_gbce_sampling_rate_is_at_most_one():
    hidden, table = torch.zeros(1, 1, D_MODEL), torch.zeros(11, D_MODEL)
    negatives = ByTarget(torch.tensor([[3, 5, 6] * 3]), torch.zeros(1, 9), torch.zeros(11))
    loss = GBCEConfig(t=1.0).build(CATALOG)(hidden, table, batch_of(torch.tensor([[1]])), negatives)
    assert loss.item() == pytest.approx(math.log(2))


def test_infonce_averages_by_user_within_each_domain_and_sums_the_domains():
    """Scores are hidden (one number per position) times 1 for the target and 0 for the only negative."""
    targets = torch.tensor([[1, 3, 2], [0, 0, 5]])
    hidden = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]])[:, :, None]
    table = torch.ones(11, 1)
    table[10] = 0
    negatives = ByTarget(torch.tensor([[10]]), torch.zeros(1, 1), torch.zeros(11))
    loss = InfoNCEConfig(temperature=0.5).build(CATALOG)(hidden, table, batch_of(targets), negatives)

    def nce(score):
        return math.log(1 + math.exp(-score / 0.5))

    domain_0 = ((nce(1) + nce(2)) / 2 + nce(4)) / 2
    domain_1 = nce(3)  # the second user has no such target
    assert loss.item() == pytest.approx(domain_0 + domain_1)


@pytest.mark.parametrize("kind", ["per_position", "shared"])
@pytest.mark.parametrize("config", SAMPLED, ids=repr)
def test_a_negative_never_equals_the_target(config, kind):
    """Draws that hit the target count as if they had not been there; if all do, only the target's own term is left."""
    target = torch.tensor([[1]])
    hidden, table = inputs(target)

    def loss(*drawn):
        items = torch.tensor([drawn]).expand(11 if kind == "per_position" else 1, -1).contiguous()
        negatives = ByTarget(items, torch.zeros(items.shape), torch.zeros(11))
        return config.build(CATALOG)(hidden, table, batch_of(target), negatives)

    if config.name != "gbce":  # whose sampling rate counts draws, not hits
        assert loss(1, 3, 1, 5).item() == pytest.approx(loss(3, 5).item(), abs=1e-12)
    alone = loss(1, 1)
    d_hidden, d_table = torch.autograd.grad(alone, (hidden, table))
    assert d_hidden.isfinite().all()
    assert d_table.isfinite().all()
    if config.name in ("bce", "gbce"):
        assert alone > 0
        assert torch.dot(d_hidden.flatten(), table[1]) < 0  # it still pulls towards the target
    else:
        assert alone.item() == 0
        assert (d_table == 0).all()


@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_order_of_users_and_padding_change_nothing(config):
    hidden, table = inputs()

    def loss(targets, states):
        return config.build(CATALOG)(states, table, batch_of(targets), sampler("per_position")).item()

    expected = loss(TARGETS, hidden)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert loss(TARGETS[order], hidden[order]) == pytest.approx(expected, abs=1e-12)
    wider = torch.cat([torch.zeros(5, 3, dtype=torch.int64), TARGETS], 1)
    states = torch.cat([torch.full((5, 3, D_MODEL), 1e3), hidden], 1)
    assert loss(wider, states) == pytest.approx(expected, abs=1e-12)
    taller = torch.cat([TARGETS, torch.zeros(2, 5, dtype=torch.int64)])
    states = torch.cat([hidden, torch.full((2, 5, D_MODEL), torch.nan)])
    assert loss(taller, states) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_no_target_at_all_is_zero_and_differentiable(config):
    hidden, table = inputs()
    loss = config.build(CATALOG)(hidden, table, batch_of(torch.zeros_like(TARGETS)), sampler("per_position"))
    assert loss.item() == 0
    loss.backward()
    assert (hidden.grad == 0).all()
    assert (table.grad == 0).all()


@pytest.mark.parametrize("kind", ["per_position", "shared"])
@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_either_side_may_be_frozen(config, kind):
    hidden, table = inputs()
    loss = config.build(CATALOG)
    whole = loss(hidden, table, batch_of(TARGETS), sampler(kind))
    d_hidden, d_table = torch.autograd.grad(whole, (hidden, table))
    half = loss(hidden, table.detach(), batch_of(TARGETS), sampler(kind))
    torch.testing.assert_close(torch.autograd.grad(half, hidden)[0], d_hidden)
    half = loss(hidden.detach(), table, batch_of(TARGETS), sampler(kind))
    torch.testing.assert_close(torch.autograd.grad(half, table)[0], d_table)
    with torch.no_grad():
        silent = loss(hidden, table, batch_of(TARGETS), sampler(kind))
    assert not silent.requires_grad
    torch.testing.assert_close(silent, whole.detach())


@pytest.mark.parametrize("kind", ["per_position", "shared", "by_domain"])
@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_losses_are_computed_in_single_precision_under_autocast(config, kind):
    hidden, table = inputs(dtype=torch.float32)
    loss = config.build(CATALOG)
    coarse = hidden.detach().bfloat16().requires_grad_()
    exact = loss(coarse.float(), table, batch_of(TARGETS), sampler(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(coarse, table, batch_of(TARGETS), sampler(kind))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)
    mixed.backward()
    assert coarse.grad.dtype == torch.bfloat16
    assert table.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["per_position", "shared"])
@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_large_scores_stay_finite(config, kind):
    hidden, table = inputs(dtype=torch.float32, scale=1e4)
    loss = config.build(CATALOG)(hidden, table, batch_of(TARGETS), sampler(kind))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert table.grad.isfinite().all()


def test_a_domain_of_one_item_costs_nothing_under_softmax():
    hidden, table = inputs(torch.tensor([[8]]))
    loss = SoftmaxConfig().build(CATALOG)(hidden, table, batch_of(torch.tensor([[8]])), None)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()


def test_gradients_of_chunked_cross_entropy():
    hidden, table = inputs(torch.ones(1, 7, dtype=torch.int64))
    rows = torch.tensor([0, 10, 3, 3, 5, 0, 9])
    for chunk_positions in (1, 3, 7):
        assert torch.autograd.gradcheck(
            lambda h, w, chunk: chunked_cross_entropy(h, w, rows, chunk), (hidden[0], table, chunk_positions)
        )


@pytest.mark.parametrize("num_candidates", [4, 11, 12, 30])
@pytest.mark.parametrize("sparse", [True, False])
def test_sampled_logits_with_repeated_unsorted_items(num_candidates, sparse, monkeypatch):
    if not sparse:
        monkeypatch.setattr(losses, "_sparse_applies", lambda *_: False)
    hidden, table = inputs(torch.ones(1, 7, dtype=torch.int64))
    items = torch.randint(0, 11, (7, num_candidates), generator=torch.Generator().manual_seed(2))
    items[:, 2] = items[:, 0]
    logits = sampled_logits(hidden[0], table, items)
    torch.testing.assert_close(logits, (hidden[0] @ table.t()).gather(1, items), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda h, w: sampled_logits(h, w, items), (hidden[0], table))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_softmax_never_holds_positions_by_catalogue():
    positions, items, chunk = 600, 400, 10
    catalog = Catalog(("all",), torch.tensor([NO_DOMAIN] + [0] * items), torch.ones(items + 1, dtype=torch.int64))
    targets = torch.arange(positions).view(20, 30) % items + 1
    hidden, table = inputs(targets, items + 1)
    with Largest() as largest:
        loss = SoftmaxConfig(chunk_positions=chunk).build(catalog)(
            hidden, table, batch_of(targets, catalog.item_domain), None
        )
        loss.backward()
    assert largest.numel == max(chunk * items, positions * D_MODEL)


def test_softmax_without_gradients_computes_only_the_logits():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._opname in ("mm", "addmm", "addmm_")
            return func(*args, **(kwargs or {}))

    hidden, table = inputs()
    loss = SoftmaxConfig(catalogue="all").build(CATALOG)
    for context, products in ((torch.no_grad(), 1), (torch.enable_grad(), 3)):
        with context, Products() as counted:
            loss(hidden, table, batch_of(TARGETS), None)
        assert counted.count == products


@pytest.mark.parametrize("sparse", [True, False])
def test_sampled_logits_never_gather_every_vector(sparse, monkeypatch):
    positions, items, candidates, d_model = 400, 500, 300, 64
    if not sparse:
        monkeypatch.setattr(losses, "_sparse_applies", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, d_model, generator=generator, requires_grad=True)
    table = torch.randn(items, d_model, generator=generator, requires_grad=True)
    with Largest() as largest:
        sampled_logits(
            hidden, table, torch.randint(0, items, (positions, candidates), generator=generator)
        ).sum().backward()
    assert largest.numel <= (positions * candidates if sparse else 2**22) < positions * candidates * d_model


def test_configs_are_one_union_by_name():
    union = TypeAdapter(LossConfig)
    assert union.validate_python({"name": "gbce", "t": 0.5}) == GBCEConfig(t=0.5)
    for bad in ({"name": "hinge"}, {"name": "gbce", "t": 1.5}, {"name": "infonce", "temperature": 0.0}):
        with pytest.raises(ValidationError):
            union.validate_python(bad)
    assert not SoftmaxConfig.needs_negatives
    assert all(config.needs_negatives for config in SAMPLED)
