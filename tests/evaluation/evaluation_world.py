"""A small world with targets in two domains, and scorers whose results are known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recsys.evaluation.evaluate import EvalConfig, Evaluation, evaluate
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, Scorer


@dataclass(frozen=True)
class Rows:
    batch: Batch
    seen: Tensor
    history: Tensor


@dataclass(frozen=True)
class World:
    catalog: Catalog
    users: list[int]
    histories: list[list[int]]
    targets: list[int]

    def batches(self, size: int, order: Sequence[int] | None = None, max_len: int = 8) -> Iterator[Rows]:
        """The rows in the given order, cut into batches of one domain, each as long as its longest history."""
        order = range(len(self.users)) if order is None else order
        for domain in range(self.catalog.num_domains):
            rows = [row for row in order if self.catalog.item_domain[self.targets[row]] == domain]
            for start in range(0, len(rows), size):
                yield self.rows(rows[start : start + size], domain, max_len)

    def rows(self, rows: Sequence[int], domain: int, max_len: int = 8) -> Rows:
        seen = _left_padded([self.histories[row] for row in rows])
        items = seen[:, -max_len:]
        items = items[:, -int((items != PAD_ID).sum(1).max()) :]
        last = torch.zeros_like(items)
        last[:, -1] = torch.tensor([self.targets[row] for row in rows])
        asked = torch.full_like(items, NO_DOMAIN)
        asked[:, -1] = domain
        users = torch.tensor([self.users[row] for row in rows])
        batch = Batch(users, items, self.catalog.item_domain[items], (items != PAD_ID).long(), last, asked)
        return Rows(batch, seen, torch.tensor([len(self.histories[row]) for row in rows]))

    def renamed(self, names: Tensor) -> "World":
        """The same world in which item i is called `names[i]`."""
        item_domain, counts = torch.empty_like(self.catalog.item_domain), torch.empty_like(self.catalog.train_counts)
        item_domain[names], counts[names] = self.catalog.item_domain, self.catalog.train_counts
        return World(
            Catalog(self.catalog.domain_names, item_domain, counts),
            self.users,
            [[int(names[item]) for item in history] for history in self.histories],
            [int(names[item]) for item in self.targets],
        )

    def evaluate(self, scorer: Scorer, config: EvalConfig | None = None, size: int = 16) -> Evaluation:
        return evaluate(
            scorer, self.batches(size), self.catalog, config or EvalConfig(), split="test", split_hash="5917"
        )


def _left_padded(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([[PAD_ID] * (width - len(items)) + items for items in lists])


def make_world(sizes: Sequence[int] = (1100, 1300), users: int = 40, seed: int = 0) -> World:
    """Every user has one target in each domain; no item is met twice."""
    generator = np.random.default_rng(seed)
    item_domain = torch.tensor([NO_DOMAIN, *np.repeat(np.arange(len(sizes)), sizes).tolist()])
    counts = torch.from_numpy(generator.integers(0, 50, len(item_domain)))
    counts[0] = 0
    catalog = Catalog(("food", "kitchen", "garden")[: len(sizes)], item_domain, counts)
    world = World(catalog, [], [], [])
    for user in range(users):
        for domain in range(len(sizes)):
            items = generator.permutation(np.arange(1, len(item_domain)))
            target = next(int(item) for item in items if item_domain[item] == domain)
            history = [int(item) for item in items[:13] if item != target][: int(generator.integers(1, 13))]
            world = replace(
                world,
                users=[*world.users, user],
                histories=[*world.histories, history],
                targets=[*world.targets, target],
            )
    return world


@dataclass
class Constant:
    value: float = 0.5

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        return torch.full((len(batch.user), len(items)), self.value)


@dataclass
class Oracle:
    """Knows the target."""

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        return (items == batch.targets[:, -1:]).float()


class Vectors:
    """A fixed vector per item; a history is the sum of its items' vectors."""

    def __init__(self, num_items: int, seed: int = 1) -> None:
        self.table = torch.randn(num_items + 1, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table[PAD_ID] = 0

    def renamed(self, names: Tensor) -> "Vectors":
        other = Vectors(len(self.table) - 1)
        other.table[names] = self.table
        return other

    def scores(self, batch: Batch, items: Tensor) -> Tensor:
        return (self.table[batch.items].sum(1) @ self.table[items].T).float()
