"""The contenders of this package, and naive stand-ins that share its parameters: `python benchmarks/ours.py NAME`."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive_abxi
import torch
from torch import Tensor, nn
from worker import serve

from recsys.data.batches import EvalBatches, TrainBatches
from recsys.evaluation import DotScorer, EvalConfig, evaluate
from recsys.experiment import Data, Experiment, build_model, load_data
from recsys.loading import apply_overrides, load_yaml, parse_config
from recsys.memory import keep_freed_memory
from recsys.models.embeddings import ItemEmbedding
from recsys.training.objective import StepObjective
from recsys.types import PAD_ID, Batch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

SASREC = {
    "sasrec_256": [
        "model.d_model=256",
        "model.d_ff=256",
        "model.num_layers=2",
        "model.num_heads=4",
        "trainer.batch_size=128",
    ],
    "sasrec_64": [
        "model.d_model=64",
        "model.d_ff=256",
        "model.num_layers=2",
        "model.num_heads=2",
        "trainer.batch_size=96",
    ],
}
"""Sizes of RecTools' and of RecBole's contender, with the whole catalogue in the softmax as they have it."""

FULL = ["loss={name: softmax, catalogue: all}"]
SHARED = [
    "loss={name: sampled_softmax}",
    "negatives={name: uniform, num_negatives: 1024, scope: target_domain, shared: true}",
]
PER_POSITION = ["loss={name: infonce}", "negatives={name: uniform, num_negatives: 128, scope: each_domain}"]
ROOFLINE = ["model.d_model=256", "model.d_ff=1024", "model.num_layers=1", "model.num_heads=2", "trainer.batch_size=256"]


class Training:
    """Steps over the batches of an experiment, epoch after epoch, without validation."""

    warm_up = 12
    """Steps before the first that is asked for: those in which the memory of a run is still growing."""

    def __init__(self, config: str, overrides: list[str]) -> None:
        values = load_yaml(ROOT / "configs" / "amazon_afk" / config, Experiment).model_dump(mode="json")
        self.experiment = parse_config(apply_overrides(values, overrides), Experiment, config)
        self.data: Data = load_data(self.experiment.data, None)
        self.model = build_model(self.experiment, self.data).train()
        assert self.experiment.loss is not None
        self.loss = self.experiment.loss.build(self.data.catalog)
        self.negatives = None
        if self.experiment.negatives is not None:
            self.negatives = self.experiment.negatives.build(self.data.catalog, torch.Generator().manual_seed(0))
        self.optimizer, _ = self.experiment.optim.build(self.model, 10_000, "")
        self.step_objective = StepObjective(self.model, self.loss, self.negatives, torch.Generator().manual_seed(0))
        self.batches = self._batches()
        for _ in range(self.warm_up):
            self.step()

    def _batches(self) -> Iterator[Batch]:
        trainer = self.experiment.trainer
        batches = TrainBatches(
            self.data.sequences,
            self.data.split,
            max_len=self.experiment.data.max_len,
            batch_size=trainer.batch_size,
            seed=0,
            device=CPU,
            domain=None,
            windows="last",
            length_pool=trainer.length_pool,
        )
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            yield from batches

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "torch": torch.__version__}

    def step(self) -> int:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.objective(batch).backward()
        self.optimizer.step()
        return int((batch.targets != PAD_ID).sum())

    def objective(self, batch: Batch) -> Tensor:
        return self.step_objective(batch).loss


class Counted(Training):
    """A step of SASRec whose operations are counted: only those that valid tokens and candidates ask for."""

    def __init__(self, candidates: int | None, overrides: list[str]) -> None:
        """`candidates` per target; None: all items."""
        super().__init__("sasrec.yaml", [*ROOFLINE, *overrides])
        self.candidates = candidates or self.data.catalog.num_items

    def about(self) -> dict[str, Any]:
        width = self.model.item_embeddings().shape[1]
        tables = {id(part.weight) for part in self.model.modules() if isinstance(part, nn.Embedding | ItemEmbedding)}
        maps = sum(p.numel() for p in self.model.parameters() if p.ndim == 2 and id(p) not in tables)
        per_target = maps + width * self.candidates  # multiplications; attention itself is a percent of them
        return super().about() | {"flop_per_target": 3 * 2 * per_target}


class NaiveABXI(Training):
    """The same parameters and equations, with everything padded and every negative gathered."""

    warm_up = 0

    def objective(self, batch: Batch) -> Tensor:
        assert self.negatives is not None
        draw = self.negatives.draw(batch.targets.flatten())
        drawn = draw.items.unflatten(0, batch.targets.shape)
        states = naive_abxi.hidden(self.model, batch)
        return naive_abxi.loss(states, self.model.item_embeddings(), batch, drawn, 0.75, self.model.num_domains)


class Ranking(Training):
    """All test users: every item of the target's domain, and the sampled protocol in the same pass."""

    warm_up = 0

    def step(self) -> int:
        evaluation = evaluate(
            DotScorer(self.model.eval(), self.experiment.data.max_len),
            EvalBatches(
                self.data.sequences, self.data.split, "test", max_len=47, batch_size=1024, device=CPU, domain=None
            ),
            self.data.catalog,
            EvalConfig(protocols=("full", "abxi_999")),
            split="test",
            split_hash=self.data.split.hash,
        )
        return evaluation.ranks.num_rows // 2


class NaiveRanking(Training):
    """1,024 test users: each target among 999 of its domain, their vectors gathered per user, ties for the target."""

    warm_up = 0

    def step(self) -> int:
        batches = EvalBatches(
            self.data.sequences, self.data.split, "test", max_len=47, batch_size=1024, device=CPU, domain=None
        )
        batch = next(iter(batches)).batch
        model, catalog = self.model.eval(), self.data.catalog
        with torch.no_grad():
            states = naive_abxi.hidden(model, batch)[:, -1]
            target, domain = batch.targets[:, -1], batch.target_domains[:, -1]
            drawn = torch.zeros(len(target), 999, dtype=torch.long)
            for row, (items, k) in enumerate(zip(batch.items, domain.tolist(), strict=True)):
                pool = catalog.items_of(k)
                free = pool[~torch.isin(pool, torch.cat([items, target[row : row + 1]]))]
                drawn[row] = free[torch.randperm(len(free))[:999]]
            vectors = model.item_embeddings()[torch.cat([target[:, None], drawn], dim=1)]
            scores = torch.einsum("bd,bcd->bc", states, vectors)
            _ = 1 + (scores[:, 1:] > scores[:, :1]).sum(1)
        return len(target)


class MatrixProduct:
    """fp32 products of the shape of a step's logits: the rate that this machine reaches at this moment."""

    rows, inner, columns = 5433, 256, 28096

    def __init__(self) -> None:
        self.a, self.b = torch.randn(self.rows, self.inner), torch.randn(self.inner, self.columns)
        self.out = torch.empty(self.rows, self.columns)

    def about(self) -> dict[str, Any]:
        return {"torch": torch.__version__}

    def step(self) -> int:
        torch.mm(self.a, self.b, out=self.out)
        return 2 * self.rows * self.inner * self.columns


CONTENDERS: dict[str, Callable[[], Any]] = {
    "abxi": lambda: Training("abxi.yaml", []),
    "abxi_naive": lambda: NaiveABXI("abxi.yaml", []),
    "ranking": lambda: Ranking("abxi.yaml", []),
    "ranking_naive": lambda: NaiveRanking("abxi.yaml", []),
    "matmul": MatrixProduct,
    **{name: (lambda size=size: Training("sasrec.yaml", [*size, *FULL])) for name, size in SASREC.items()},
    "roofline_full": lambda: Counted(None, FULL),
    "roofline_shared": lambda: Counted(1025, SHARED),
    "roofline_per_position": lambda: Counted(257, PER_POSITION),
}

if __name__ == "__main__":
    if not sys.argv[1].endswith("naive"):
        keep_freed_memory()
    contender = CONTENDERS[sys.argv[1]]()
    serve(contender.step, contender.about())
