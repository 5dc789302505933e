"""Objectives: values against NumPy by hand, gradients against finite differences or the formula that defines them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.data.schema import DataError
from recsys.offpolicy.learn import ItemTable, LoggedBatch, PolicyLoss
from recsys.offpolicy.objectives import (
    AsymREObjective,
    ClippedGroupObjective,
    DRObjective,
    IPSObjective,
    MDPOObjective,
    ObjectiveConfig,
    OPMDObjective,
    SmoothingObjective,
    SNIPSObjective,
    TopKObjective,
)
from recsys.offpolicy.policies import PlackettLuce
from recsys.types import NO_DOMAIN, Catalog

ITEMS = 5
BATCH = 4
CATALOG = Catalog(("one",), torch.tensor([NO_DOMAIN, *[0] * ITEMS]), torch.zeros(ITEMS + 1, dtype=torch.int64))
MODEL = torch.rand((BATCH, ITEMS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SCORES = torch.randn((BATCH, ITEMS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OLD = torch.randn((BATCH, ITEMS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Model:
    def predict(self, requests: Tensor, slot: int, items: Tensor) -> Tensor:
        return MODEL[requests]


def logged(slots: int) -> LoggedBatch:
    generator = torch.Generator().manual_seed(slots)
    slates = torch.stack([torch.randperm(ITEMS, generator=generator)[:slots] + 1 for _ in range(BATCH)])
    last = torch.zeros((BATCH, 1), dtype=torch.int64)
    return LoggedBatch(
        user=last[:, 0],
        items=last,
        domains=last - 1,
        times=last,
        targets=last,
        target_domains=last,
        request=torch.arange(BATCH),
        slates=slates,
        reward=torch.rand((BATCH, slots), generator=generator, dtype=torch.float64),
        propensity=torch.rand((BATCH, slots), generator=generator, dtype=torch.float64) * 0.5 + 0.1,
        reference=OLD,
    )


def value(objective: ObjectiveConfig, scores: Tensor, slots: int = 1, policy: PlackettLuce | None = None) -> Tensor:
    loss = PolicyLoss(objective, policy or PlackettLuce(), CATALOG, Model())
    return objective.loss(loss.view(scores, logged(slots)))


def softmax(scores: Tensor) -> np.ndarray:
    weights = np.exp(scores.numpy())
    return weights / weights.sum(1, keepdims=True)


def by_hand(slots: int) -> dict[str, np.ndarray]:
    """π of slates by the definition of Plackett–Luce, and what else the formulas need."""
    batch = logged(slots)
    columns = batch.slates.numpy() - 1
    pi, old = softmax(SCORES), softmax(OLD)
    slate = np.ones(BATCH)
    for row in range(BATCH):
        left = 1.0
        for column in columns[row]:
            slate[row] *= pi[row, column] / left
            left -= pi[row, column]
    rows = np.arange(BATCH)[:, None]
    reward, p = batch.reward.numpy(), batch.propensity.numpy()
    return {
        "columns": columns,
        "pi": pi,
        "old": old,
        "w": slate / p.prod(1),
        "slate": slate,
        "p": p,
        "r": reward,
        "total": reward.sum(1),
        "shown": pi[rows, columns],
        "shown_old": old[rows, columns],
        "q": MODEL.numpy(),
        "shown_q": MODEL.numpy()[rows, columns],
    }


def expectations(slots: int) -> list[tuple[ObjectiveConfig, float]]:
    h = by_hand(slots)
    w, total, r, log_pi = h["w"], h["total"], h["r"], np.log(h["shown"])
    capped = np.minimum(w, 1.5)
    above = r - r.mean(1, keepdims=True)
    away = (log_pi - np.log(h["shown_old"])) ** 2
    soft = 0.5 * np.log(np.exp(r / 0.5).mean(1, keepdims=True))
    kl = (h["pi"] * (np.log(h["pi"]) - np.log(h["old"]))).sum(1)
    found: list[tuple[ObjectiveConfig, float]] = [
        (IPSObjective(), -(w * total).mean()),
        (
            IPSObjective(cap=1.5, variance=2.0),
            -(capped * total).mean() + 2 * np.sqrt((capped * total).var(ddof=1) / BATCH),
        ),
        (SNIPSObjective(), -(w * total).sum() / w.sum()),
        (SmoothingObjective(alpha=0.7), -(h["slate"] / h["p"].prod(1) ** 0.7 * total).mean()),
        (MDPOObjective(step=3.0), (kl / 3 - (h["pi"] * h["q"]).sum(1)).mean()),
        (OPMDObjective(temperature=0.5), (0.25 * away - above * log_pi).mean()),
        (OPMDObjective(temperature=0.5, scaled=True), (0.25 * away - above * log_pi).mean() / 1.5),
        (OPMDObjective(temperature=0.5, baseline="soft"), (0.25 * away - (r - soft) * log_pi).mean()),
        (AsymREObjective(shift=-0.1), -((above + 0.1) * log_pi).mean()),
        (AsymREObjective(shift=0.0, group="batch"), -((r - r.mean()) * log_pi).mean()),
    ]
    if slots == 1:
        dr = (h["pi"] * h["q"]).sum(1) + w * (total - h["shown_q"][:, 0])
        found.append((DRObjective(), -dr.mean()))
    return found


@pytest.mark.parametrize("slots", [1, 3])
def test_values_and_gradients(slots: int) -> None:
    for objective, expected in expectations(slots):
        assert float(value(objective, SCORES, slots)) == pytest.approx(expected, rel=1e-9), objective
        leaf = SCORES.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, o=objective: value(o, s, slots), leaf, fast_mode=True), objective


def gradient(objective: ObjectiveConfig, slots: int) -> np.ndarray:
    leaf = SCORES.clone().requires_grad_()
    value(objective, leaf, slots).backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


def score_function(weight: np.ndarray, slots: int) -> np.ndarray:
    """- mean(weight · ∇log π) with ∇log π(a) = 1[a] - π by hand."""
    h = by_hand(slots)
    found = np.zeros((BATCH, ITEMS))
    for row in range(BATCH):
        for slot in range(slots):
            one = np.eye(ITEMS)[h["columns"][row, slot]]
            found[row] -= weight[row, slot] * (one - h["pi"][row]) / (BATCH * slots)
    return found


@pytest.mark.parametrize("slots", [1, 3])
def test_gradients_with_fixed_weights(slots: int) -> None:
    h = by_hand(slots)
    pi, p, r = h["shown"], h["p"], h["r"]
    ratio = pi / p
    above = r - r.mean()
    up, down = above > 0, above < 0
    inside = (ratio >= 0.8) & (ratio <= 1.2)
    cases: list[tuple[ObjectiveConfig, np.ndarray]] = [
        (TopKObjective(k=1, cap=None), ratio * r),
        (TopKObjective(k=4, cap=1.2), np.minimum(ratio, 1.2) * 4 * (1 - pi) ** 3 * r),
        (ClippedGroupObjective(group="batch"), ratio * above * ((up & (ratio <= 1.2)) | (down & (ratio >= 0.8)))),
        (ClippedGroupObjective(group="batch", clip="two_side", weighted=False), above * inside),
        (
            ClippedGroupObjective(group="batch", clip="ring", outer_low=0.5, outer_high=0.5, weighted=False),
            above * (inside | (up & (ratio <= 0.5)) | (down & (ratio >= 1.5))),
        ),
    ]
    for objective, weight in cases:
        np.testing.assert_allclose(gradient(objective, slots), score_function(weight, slots), atol=1e-12)


def test_a_capped_request_gives_no_gradient() -> None:
    heavy = by_hand(1)["w"] > 1.5
    assert heavy.any()
    assert not heavy.all()
    assert (gradient(IPSObjective(cap=1.5), 1)[heavy] == 0).all()
    assert (gradient(IPSObjective(cap=1.5), 1)[~heavy] != 0).all()


def test_exploration_is_part_of_the_policy_that_is_trained() -> None:
    policy = PlackettLuce(temperature=2.0, epsilon=0.3)
    batch = logged(1)
    pi = 0.7 * softmax(SCORES / 2) + 0.3 / ITEMS
    shown = pi[np.arange(BATCH), batch.slates[:, 0].numpy() - 1]
    expected = -(shown / batch.propensity[:, 0].numpy() * batch.reward[:, 0].numpy()).mean()
    assert float(value(IPSObjective(), SCORES, 1, policy)) == pytest.approx(expected)
    by_item = -((batch.reward[:, 0].numpy() + 0.0 - batch.reward.mean().item()) * np.log(shown)).mean()
    assert float(value(AsymREObjective(shift=0.0, group="batch"), SCORES, 1, policy)) == pytest.approx(by_item)


def test_special_cases_are_one_another() -> None:
    same = torch.testing.assert_close
    same(value(SmoothingObjective(alpha=1.0), SCORES, 2), value(IPSObjective(), SCORES, 2))
    assert gradient(TopKObjective(k=1, cap=None), 1) == pytest.approx(gradient(IPSObjective(), 1)), "REINFORCE is IPS"
    assert (gradient(AsymREObjective(shift=0.0), 1) == 0).all(), "a slate of one is no group"


def test_what_an_objective_lacks_is_said() -> None:
    with pytest.raises(DataError, match="use ips, snips or exp_smoothing for slates"):
        value(DRObjective(), SCORES, 2)
    with pytest.raises(DataError, match="mdpo needs a reward model"):
        PolicyLoss(MDPOObjective(), PlackettLuce(), CATALOG)


def test_the_mirror_descent_optimum() -> None:
    """π_k · exp(step · q̂), normalised: nothing else has a lower loss."""
    best = (OLD.log_softmax(1) + 3.0 * MODEL).requires_grad_()
    loss = value(MDPOObjective(step=3.0), best)
    loss.backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-12


def train_table(objective: ObjectiveConfig, steps: int = 250) -> Tensor:
    """The policy of 20 items, of which the log shows each once: rewards 1, .9, .8, then .1 each."""
    catalog = Catalog(("one",), torch.tensor([NO_DOMAIN, *[0] * 20]), torch.zeros(21, dtype=torch.int64))
    reward = torch.full((20, 1), 0.1, dtype=torch.float64)
    reward[:3, 0] = torch.tensor([1.0, 0.9, 0.8])
    none = torch.zeros((20, 1), dtype=torch.int64)
    batch = LoggedBatch(
        user=none[:, 0],
        items=none,
        domains=none - 1,
        times=none,
        targets=none,
        target_domains=none,
        request=torch.arange(20),
        slates=torch.arange(1, 21)[:, None],
        reward=reward,
        propensity=torch.full((20, 1), 0.05, dtype=torch.float64),
        reference=None,
    )
    table = ItemTable(20)
    loss = PolicyLoss(objective, PlackettLuce(), catalog)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(table(batch), table.item_embeddings(), batch, None).backward()
        optimizer.step()
    return table.weight.detach()[1:, 0].softmax(0)


def test_top_k_keeps_k_items_and_plain_reinforce_one() -> None:
    plain = train_table(TopKObjective(k=1, cap=None))
    assert plain[0] > 0.99
    corrected = train_table(TopKObjective(k=3, cap=None))
    assert ((corrected[:3] >= 0.25) & (corrected[:3] <= 0.42)).all()
    torch.testing.assert_close(corrected[:3], torch.tensor([0.369, 0.335, 0.295]), atol=0.01, rtol=0)
