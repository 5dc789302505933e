import operator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from evaluation_world import make_world

from recsys.evaluation.draws import NegativesHash, draw_negatives
from recsys.evaluation.protocols import PROTOCOLS, Negatives, ProtocolName, among, positions
from recsys.evaluation.targets import Targets
from recsys.types import PAD_ID, Catalog

WORLD = make_world()
CATALOG = WORLD.catalog
SAMPLED = [name for name, protocol in PROTOCOLS.items() if protocol.negatives]


def targets(domain: int, size: int = 1000, order: list[int] | None = None) -> Targets:
    (rows,) = (rows for rows in WORLD.batches(size, order) if int(rows.batch.target_domains[0, -1]) == domain)
    return Targets(rows.batch, rows.seen, rows.history)


def drawn_items(name: str, domain: int, rows: Targets, catalog: Catalog = CATALOG, seed: int = 0) -> torch.Tensor:
    protocol = PROTOCOLS[name]
    pool = protocol.pool(catalog, domain)
    assert protocol.negatives
    return pool[draw_negatives(protocol.negatives, pool, catalog, rows, seed)]


def test_every_name_has_its_protocol():
    assert tuple(PROTOCOLS) == get_args(ProtocolName)


def test_pools():
    assert PROTOCOLS["full"].pool(CATALOG, 1).tolist() == list(range(1101, 2401))
    assert PROTOCOLS["all"].pool(CATALOG, 1).tolist() == list(range(1, 2401))
    assert PROTOCOLS["abxi_999"].pool(CATALOG, 1).tolist() == list(range(1101, 2401))
    assert PROTOCOLS["abxi_999_compat"].pool(CATALOG, 0).tolist() == list(range(1, 1101))
    assert PROTOCOLS["abxi_999_compat"].pool(CATALOG, 1).tolist() == list(range(1100, 2401)), "the published off-by-one"


def test_a_domain_is_what_the_catalogue_says_not_a_range_of_ids():
    catalog = Catalog(("food", "kitchen"), torch.tensor([-1, 1, 0, 1, 0]), torch.zeros(5).long())
    assert PROTOCOLS["full"].pool(catalog, 1).tolist() == [1, 3]
    assert PROTOCOLS["all"].pool(catalog, 1).tolist() == [1, 2, 3, 4]
    assert PROTOCOLS["abxi_999_compat"].pool(catalog, 1).tolist() == [1, 3, 4]


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("domain", [0, 1])
def test_negatives_are_what_the_protocol_says(name: str, domain: int):
    rows, negatives = targets(domain), PROTOCOLS[name].negatives
    assert negatives
    items = drawn_items(name, domain, rows)
    assert items.shape == (40, int(name.split("_")[1]))
    assert not (items == PAD_ID).any()
    assert not (items == rows.target[:, None]).any()
    assert set(items.unique().tolist()) <= set(PROTOCOLS[name].pool(CATALOG, domain).tolist())
    repeats = [len(set(row)) < len(row) for row in items.tolist()]
    assert all(repeats) if negatives.replace else not any(repeats)
    met = [bool(set(row) & set(seen)) for row, seen in zip(items.tolist(), rows.seen.tolist(), strict=True)]
    assert any(met) if name == "c2dsr_999" else not any(met)
    if negatives.by_popularity:
        assert (CATALOG.train_counts[items] > 0).all()


def test_the_stray_item_of_the_compatible_protocol_is_drawn():
    assert (drawn_items("abxi_999_compat", 1, targets(1)) == 1100).any()
    assert not (drawn_items("abxi_999", 1, targets(1)) == 1100).any()


@pytest.mark.parametrize("thread", [0, 3])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 3 * 2**70 + 11])
def test_each_target_has_the_generator_that_numpy_makes_of_seed_user_and_target(seed: int, thread: int):
    rows = targets(1)
    pool = PROTOCOLS["abxi_999"].pool(CATALOG, 1)
    drawn = pool[draw_negatives(Negatives(50), pool, CATALOG, rows, seed, thread)]
    for row in (0, 17, 39):
        user, target = int(rows.user[row]), int(rows.target[row])
        free = np.setdiff1d(pool.numpy(), [*rows.seen[row].tolist(), target])
        generator = np.random.default_rng((seed, user, target, thread) if thread else (seed, user, target))
        assert drawn[row].tolist() == generator.choice(free, 50, replace=False, shuffle=False).tolist()


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("domain", [0, 1])
def test_the_draw_is_numpys_choice_among_what_is_left_of_the_pool(name: str, domain: int):
    rows, protocol = targets(domain), PROTOCOLS[name]
    many = torch.randint(1, 2401, (400, 400), generator=torch.Generator().manual_seed(0)).tril()[::10]
    rows = replace(rows, seen=torch.cat([many, rows.seen, rows.seen[:, -3:], rows.target[:, None]], dim=1))
    negatives, pool = protocol.negatives, protocol.pool(CATALOG, domain).numpy()
    assert negatives
    drawn = drawn_items(name, domain, rows)
    weights = CATALOG.train_counts.numpy().astype(float)
    for row, (user, target) in enumerate(zip(rows.user.tolist(), rows.target.tolist(), strict=True)):
        free = np.setdiff1d(pool, [target, *rows.seen[row].tolist()] if negatives.unseen else [target])
        odds = None
        if negatives.by_popularity:
            free = free[weights[free] > 0]
            odds = weights[free] / weights[free].sum()
        count = negatives.count if negatives.replace else min(negatives.count, len(free))
        expected = np.random.default_rng((0, user, target)).choice(free, count, negatives.replace, odds, shuffle=False)
        assert drawn[row].tolist() == [*expected.tolist(), *[target] * (negatives.count - count)]


def test_popular_items_are_drawn_more_often_in_proportion_to_training_events():
    counts = torch.tensor([0, 1, 2, 3, 0, 4, 10])  # the target is item 6
    catalog = Catalog(("food",), torch.tensor([-1, 0, 0, 0, 0, 0, 0]), counts)
    rows = targets(0)
    many = 4000
    batch = rows.batch.map(lambda tensor: tensor[:1].repeat(many, *[1] * (tensor.dim() - 1)))
    batch = replace(batch, user=torch.arange(many), targets=torch.full_like(batch.targets, 6))
    many_rows = Targets(batch, torch.zeros(many, 1).long(), torch.ones(many).long())
    drawn = 1 + draw_negatives(Negatives(1, by_popularity=True), torch.arange(1, 7), catalog, many_rows, seed=0)
    shares = torch.bincount(drawn.flatten(), minlength=7) / many
    torch.testing.assert_close(shares, torch.tensor([0, 0.1, 0.2, 0.3, 0, 0.4, 0]), atol=0.03, rtol=0)
    uniform = 1 + draw_negatives(Negatives(1), torch.arange(1, 7), catalog, many_rows, seed=0)
    torch.testing.assert_close(
        torch.bincount(uniform.flatten(), minlength=7) / many,
        torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0]),
        atol=0.03,
        rtol=0,
    )


@pytest.mark.parametrize("name", SAMPLED)
def test_a_row_draws_the_same_whoever_shares_its_batch(name: str):
    together = drawn_items(name, 0, targets(0))
    order = np.random.default_rng(0).permutation(len(WORLD.users)).tolist()
    shuffled = targets(0, order=order)
    by_user = dict(zip(shuffled.user.tolist(), drawn_items(name, 0, shuffled).tolist(), strict=True))
    assert [by_user[user] for user in targets(0).user.tolist()] == together.tolist()
    assert not torch.equal(together[0], together[1]), "users have streams of their own"
    assert not torch.equal(together, drawn_items(name, 0, targets(0), seed=1))


@pytest.mark.parametrize("name", ["abxi_999", "uni_100", "pop_100"])
def test_a_small_domain_is_used_up(name: str):
    catalog = Catalog(("food",), torch.tensor([-1, 0, 0, 0, 0, 0]), torch.tensor([0, 5, 5, 5, 5, 0]))
    rows = targets(0)
    batch = replace(rows.batch.map(lambda tensor: tensor[:1]), targets=torch.full_like(rows.batch.targets[:1], 2))
    row = Targets(batch, torch.tensor([[0, 0, 3]]), torch.tensor([1]))
    items = drawn_items(name, 0, row, catalog)
    unseen = {1, 4} if name == "pop_100" else {1, 4, 5}  # item 5 has no training event
    assert set(items[0].tolist()) == unseen | {2}, "filled up with the target, which counts for nothing"
    assert (items[0] != 2).sum() == len(unseen)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_domain_of_one_item_has_no_negatives(name: str):
    catalog = Catalog(("food",), torch.tensor([-1, 0]), torch.tensor([0, 5]))
    rows = targets(0)
    batch = replace(rows.batch.map(lambda tensor: tensor[:1]), targets=torch.ones_like(rows.batch.targets[:1]))
    items = drawn_items(name, 0, Targets(batch, torch.tensor([[0]]), torch.tensor([1])), catalog)
    assert (items == 1).all()


def test_the_hash_knows_the_negatives_and_not_their_order():
    rows = targets(0)
    items = drawn_items("uni_100", 0, rows)

    def digest(*parts: slice, items: torch.Tensor = items) -> str:
        total = NegativesHash()
        for part in parts:
            batch = rows.batch.map(operator.itemgetter(part))
            cut = Targets(batch, rows.seen[part], rows.history[part])
            total.update(cut, items[part])
        return total.hexdigest()

    assert digest(slice(0, 40)) == digest(slice(20, 40), slice(0, 20))
    changed = items.clone()
    changed[3, 5] += 1
    assert digest(slice(0, 40)) != digest(slice(0, 40), items=changed)
    assert digest(slice(0, 40)) != digest(slice(0, 39))


def test_among_ignores_padding_and_strangers():
    catalog = Catalog(("food", "kitchen"), torch.tensor([-1, 0, 1, 0, 1]), torch.zeros(5).long())
    pool = catalog.items_of(1)
    assert positions(pool, catalog).tolist() == [2, 2, 0, 2, 1]
    assert among(pool, torch.tensor([[0, 1, 4], [0, 0, 3]]), catalog).tolist() == [[False, True], [False, False]]
