"""Steps without a word from the device: sizes that a batch brings, and batches of few shapes."""

import io
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.data.batches import TrainBatches, make_catalog
from recsys.data.sequences import Sequences
from recsys.data.split import LeaveOneOut, make_split
from recsys.experiment import Data, Experiment, build_model, load_data
from recsys.loading import parse_config
from recsys.models.abxi import ABXIConfig
from recsys.models.streams import cut_streams
from recsys.training.objective import StepObjective
from recsys.training.run import train
from recsys.types import Batch

SOURCE = {
    "name": "synthetic",
    "num_users": 60,
    "items_per_domain": 30,
    "num_domains": 3,
    "mean_events": 10,
    "max_events": 25,
}
SIZE = {"d_model": 8, "num_heads": 2, "dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec", **SIZE, "target_query": "domain"},
    "hstu": {"name": "hstu", **SIZE},
    "gru4rec": {"name": "gru4rec", "d_model": 8, "dropout_hidden": 0.0, "dropout_embedding": 0.0},
    "cross_domain": {"name": "cross_domain", **SIZE, "cross": None},
    "cross_domain_early": {"name": "cross_domain", **SIZE, "cross": {"placement": "early", "dropout": 0.0}},
    "cross_domain_stack": {"name": "cross_domain", **SIZE, "cross": {"placement": "stack", "dropout": 0.0}},
    "cross_domain_shuffled": {"name": "cross_domain", **SIZE, "cross": {"context": "shuffled", "dropout": 0.0}},
    "abxi": {"name": "abxi", **SIZE, "d_ff": 12},
    "abxi_early": {"name": "abxi", **SIZE, "d_ff": 12, "cross": {"dropout": 0.0}},
    "abxi_stack": {"name": "abxi", **SIZE, "d_ff": 12, "cross": {"placement": "stack", "dropout": 0.0}},
}
UNIFORM = {"name": "uniform", "num_negatives": 5}
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {"loss": {"name": "softmax"}},
    "softmax_all": {"loss": {"name": "softmax", "catalogue": "all"}},
    "sampled_softmax": {"loss": {"name": "sampled_softmax"}, "negatives": {**UNIFORM, "shared": True}},
    "gbce": {"loss": {"name": "gbce"}, "negatives": UNIFORM},
    "infonce": {"loss": {"name": "infonce"}, "negatives": {**UNIFORM, "scope": "each_domain"}},
}
CASES = [(model, "softmax") for model in MODELS] + [("abxi", loss) for loss in LOSSES if loss != "softmax"]


def experiment(model: str, loss: str) -> Experiment:
    values = {"name": "static", "data": {"source": SOURCE, "max_len": 13}, "model": MODELS[model], **LOSSES[loss]}
    return parse_config(values, Experiment, "test")


def batches(config: Experiment, data: Data, device: str = "cpu", **options: Any) -> TrainBatches:
    return TrainBatches(data.sequences, data.split, max_len=13, batch_size=16, seed=0, device=device, **options)


def objective(config: Experiment, data: Data, device: str = "cpu") -> StepObjective:
    catalog = data.catalog.to(device)
    assert config.loss is not None
    negatives = None
    if config.negatives is not None:
        negatives = config.negatives.build(catalog, torch.Generator(device).manual_seed(0))
    model = build_model(config, data).to(device).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in model.parameters():
            part += 0.1 * torch.randn(part.shape, generator=generator).to(device)
        model.item_embeddings()[0] = 0
    return StepObjective(model, config.loss.build(catalog), negatives, torch.Generator(device))


class Waits(Exception):
    """An operation whose result, or whose shape, the host waits for where the tensors are on a GPU."""


class NoWaiting(TorchDispatchMode):
    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.bincount.default,
        torch.ops.aten.repeat_interleave.Tensor,
        torch.ops.aten._unique2.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAITING:
            raise Waits(str(func))
        booleans = [index for index in (args[1] if func is torch.ops.aten.index.Tensor else []) if index is not None]
        if any(index.dtype == torch.bool for index in booleans):
            raise Waits(f"{func} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("question_slots", [True, False])
@pytest.mark.parametrize("width_step", [None, 4])
@pytest.mark.parametrize("windows", ["last", "all"])
def test_a_batch_brings_the_sizes_that_counting_finds(
    question_slots: bool, width_step: int | None, windows: str
) -> None:
    config = experiment("sasrec", "softmax")
    data = load_data(config.data, None)
    for batch in batches(config, data, windows=windows, width_step=width_step):
        assert batch.sizes is not None
        counted = cut_streams(batch.map(lambda tensor: tensor), 3, question_slots).sizes
        if width_step is None:
            assert batch.sizes == counted
        assert batch.sizes.targets == counted.targets
        for mine, there in zip(batch.sizes.blocks, counted.blocks, strict=True):
            assert (mine.rows, mine.length, mine.slots) >= (there.rows, there.length, there.slots)


def test_a_static_batch_holds_the_same_rows_in_few_shapes() -> None:
    config = experiment("sasrec", "softmax")
    data = load_data(config.data, None)
    shapes = set()
    for plain, static in zip(batches(config, data), batches(config, data, width_step=4), strict=True):
        rows, width = plain.items.shape
        shapes.add(static.items.shape)
        assert torch.equal(static.items[:rows, -width:], plain.items)
        assert torch.equal(static.targets[:rows, -width:], plain.targets)
        assert not static.items[rows:].any()
        assert not static.items[:, : static.items.shape[1] - width].any()
    assert shapes <= {(17, width) for width in (4, 8, 12, 13)}


def same(left: Batch, right: Batch) -> bool:
    pairs = zip(left.columns().values(), right.columns().values(), strict=True)
    return left.sizes == right.sizes and all(torch.equal(one, other.cpu()) for one, other in pairs)


@pytest.mark.parametrize("ahead", [1, 3, 50])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_batches_made_ahead_are_the_same(ahead: int, device: str) -> None:
    config = experiment("sasrec", "softmax")
    data = load_data(config.data, None)
    plain, early = batches(config, data), batches(config, data, device, prefetch=ahead)
    for _ in range(2):
        assert all(same(*pair) for pair in zip(plain, early, strict=True))
    some = iter(early)
    next(some)
    assert early.state_dict() == {"epoch": 0, "batch": 1}, "what is made ahead is not given out"
    before = threading.active_count()
    some.close()
    assert threading.active_count() < before


def test_an_error_in_the_thread_reaches_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("sasrec", "softmax")
    early = batches(config, load_data(config.data, None), prefetch=2)
    monkeypatch.setattr(early, "_gather", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(early))


@pytest.mark.parametrize(("model", "loss"), CASES)
def test_loss_and_gradients_are_those_of_the_batch_as_it_comes(model: str, loss: str) -> None:
    config = experiment(model, loss)
    data = load_data(config.data, None)
    found: dict[str, Any] = {}
    counted = [batch.map(lambda tensor: tensor) for batch in batches(config, data)]
    kinds = {
        "counted": counted,
        "sizes": list(batches(config, data)),
        "static": list(batches(config, data, width_step=4)),
    }
    for name, several in kinds.items():
        step = objective(config, data)
        step.model.double()
        losses = []
        for batch in islice(several, 3):
            losses.append(step(batch).loss)
            losses[-1].backward()
        found[name] = torch.stack(losses), {key: part.grad for key, part in step.model.named_parameters()}
    for name in ("sizes", "static"):
        torch.testing.assert_close(found[name], found["counted"], rtol=1e-9, atol=1e-12)


def test_a_full_history_of_one_domain_leaves_padding_its_place() -> None:
    """The first row has a place for each of ABXI's table; a slot of padding must not lie behind it."""
    item_domain = np.array([-1] + [0] * 20 + [1] * 20)
    items = np.tile(np.arange(1, 17), 3)
    sequences = Sequences.pack(
        items, item_domain[items], np.arange(48), np.array([0, 16, 32, 48]), ("a", "b"), item_domain
    )
    split = make_split(sequences, LeaveOneOut())
    model = ABXIConfig(d_model=8).build(make_catalog(sequences, split), 13).eval()
    options = {"max_len": 13, "batch_size": 4, "seed": 0, "device": "cpu"}
    [plain], [static] = (list(TrainBatches(sequences, split, **options, width_step=step)) for step in (None, 13))
    torch.testing.assert_close(model(static)[:3], model(plain))


def steps(config: Experiment, device: str, **options: Any) -> None:
    """Two whole steps of training, after one that may make what stays."""
    data = load_data(config.data, None)
    step = objective(config, data, device)
    optimizer, _ = config.optim.build(step.model, 10, "")

    def train(batch: Batch) -> None:
        optimizer.zero_grad()
        step(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
        optimizer.step()

    first, *rest = list(batches(config, data, device, **options))[:3]
    train(first)
    if device == "cpu":
        with NoWaiting(), pytest.MonkeyPatch.context() as patch:
            as_on_a_gpu(patch)
            for batch in rest:
                train(batch)
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in rest:
            train(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("model", "loss"), CASES)
@pytest.mark.parametrize("width_step", [None, 4])
def test_no_step_waits_for_the_device(model: str, loss: str, width_step: int | None) -> None:
    steps(experiment(model, loss), "cpu", width_step=width_step)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Without what only a CPU has."""
    for choice in ("losses._sparse_applies", "losses.may_count", "models.lines.may_count"):
        patch.setattr(f"recsys.{choice}", lambda *_: False)


class Watch(pl.Callback):
    """Guards all that happens from the start of a batch to its end, but for the first."""

    def __init__(self) -> None:
        self.guard: NoWaiting | None = None
        self.guarded = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            self.guard = NoWaiting()
            self.guard.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
            self.guard = None
            self.guarded += 1

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
            self.guard = None


def test_nothing_around_a_step_waits_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    trainer = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    config = parse_config(
        {**experiment("cross_domain_early", "softmax").model_dump(mode="json"), "trainer": trainer}, Experiment, "test"
    )
    watch = Watch()
    train(config, load_data(config.data, None), tmp_path, Console(file=io.StringIO()), callbacks=[watch])
    assert watch.guarded > 3


def test_the_guard_can_fail() -> None:
    config = experiment("abxi", "softmax")
    data = load_data(config.data, None)
    [batch, *_] = batches(config, data)
    with NoWaiting(), pytest.raises(Waits, match="aten"):
        objective(config, data)(batch.map(lambda tensor: tensor))
    mask = torch.tensor([True, False])
    with NoWaiting(), pytest.raises(Waits):
        torch.zeros(2)[mask]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("model", "loss"), CASES)
def test_no_step_waits_for_a_gpu(model: str, loss: str) -> None:
    steps(experiment(model, loss), "cuda")
