"""What training and ranking reach on a GPU: `python benchmarks/gpu.py`.

Measures the rate of matrix products, epochs of ABXI and SASRec on Food–Kitchen (where that is prepared), widths,
catalogues, lengths, and exact ranking. Each case is written to `benchmarks/results/gpu-<device>.json` as it ends, and
one whose figures stand there is not measured again, so an interrupted run goes on; `--again` forgets them. What does
not fit on the device stands there with its error. `--tiny` is the same on sizes for a test, on a CPU too.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from recsys.data.batches import EvalBatches, make_catalog
from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import LeaveOneOut, make_split
from recsys.evaluation import DotScorer, EvalConfig, evaluate
from recsys.experiment import Data, Experiment, build_model, load_data
from recsys.loading import apply_overrides, load_yaml, parse_config
from recsys.results import write_json
from recsys.training.environment import describe_environment
from recsys.training.objective import StepObjective, compile_pass
from recsys.training.run import matmul_precision, train_batches
from recsys.training.throughput import flops_per_token, matmul_rate, peak_memory, peak_rate

HERE = Path(__file__).parent
Answer = dict[str, Any]

ARITHMETIC: dict[str, dict[str, Any]] = {
    "fp32": {},
    "tf32": {"tf32": True},
    "bf16": {"tf32": True, "precision": "bf16-mixed"},
}
FULL = {"loss": {"name": "softmax", "catalogue": "all"}, "negatives": None}
FUSED = {"loss": {"name": "softmax", "catalogue": "all", "fused": True}, "negatives": None}
SHARED = {
    "loss": {"name": "sampled_softmax"},
    "negatives": {"name": "uniform", "num_negatives": 1024, "scope": "all", "shared": True},
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the cases."""

    matmul: int
    widths: tuple[int, ...]
    catalogues: tuple[int, ...]
    lengths: tuple[int, ...]
    ranked: tuple[int, ...]
    """Catalogues that are ranked."""
    users: int
    tokens: int
    """Positions of a step."""
    steps: int
    modes: tuple[str | None, ...]
    """Of `trainer.compile`."""
    small: dict[str, Any]
    """Laid over the configs of Food–Kitchen."""


WHOLE = Scale(
    matmul=8192,
    widths=(64, 128, 256, 512, 1024, 2048),
    catalogues=(10**4, 10**5, 10**6, 10**7),
    lengths=(50, 128, 256, 512, 1024, 2048),
    ranked=(10**4, 10**5, 10**6),
    users=50_000,
    tokens=12_800,
    steps=20,
    modes=(None, "default", "reduce-overhead"),
    small={},
)
TINY = Scale(
    matmul=64,
    widths=(8, 16),
    catalogues=(50, 100),
    lengths=(6, 12),
    ranked=(100,),
    users=30,
    tokens=60,
    steps=2,
    modes=(None,),
    small={
        "data": {
            "source": {"name": "synthetic", "num_users": 40, "items_per_domain": 60, "max_events": 30},
            "max_len": 12,
        },
        "trainer.batch_size": 16,
        "model.d_model": 8,
        "model.d_ff": 12,
    },
)


def random_data(items: int, length: int, users: int) -> Data:
    """Users with as many events each, two domains, nothing to be learnt."""
    rng = np.random.default_rng(0)
    item_domain = np.concatenate([[-1], np.arange(items) % 2])
    drawn = rng.integers(1, items + 1, users * length)
    times = np.tile(np.arange(length), users)
    offsets = np.arange(users + 1) * length
    sequences = Sequences.pack(drawn, item_domain[drawn], times, offsets, ("a", "b"), item_domain, "order")
    split = make_split(sequences, LeaveOneOut())
    return Data(sequences, split, make_catalog(sequences, split))


def sasrec(d_model: int, length: int, batch_size: int, trainer: dict[str, Any], loss: dict[str, Any]) -> Experiment:
    """Two blocks, heads of 64, on data that come from elsewhere."""
    size = {"d_model": d_model, "d_ff": 4 * d_model, "num_layers": 2, "num_heads": max(1, d_model // 64)}
    values = {
        "name": "gpu",
        "data": {"source": {"name": "synthetic"}, "max_len": length},
        "model": {"name": "sasrec", **size, "dropout": 0.1},
        "trainer": {"batch_size": batch_size, **trainer},
        **loss,
    }
    return parse_config(values, Experiment, "benchmark")


def food_kitchen(config: str, small: dict[str, Any], trainer: dict[str, Any], loss: dict[str, Any]) -> Experiment:
    """A config of this package with another arithmetic, or another form of its loss."""
    path = HERE.parent / "configs" / "amazon_afk" / config
    values = load_yaml(path, Experiment).model_dump(mode="json")
    values["trainer"] |= trainer
    values["loss"] |= loss
    values["data"] |= small.get("data", {})
    overrides = [f"{key}={value}" for key, value in small.items() if key != "data"]
    return parse_config(apply_overrides(values, overrides), Experiment, config)


def training(make: Callable[[], tuple[Experiment, Data]], device: torch.device, steps: int | None) -> Answer:
    """Steps of a second pass over the same batches, after one that compiles and warms up; None: a whole epoch."""
    experiment, data = make()
    config = experiment.trainer
    catalog = data.catalog.to(device)
    assert experiment.loss is not None
    negatives = None
    if experiment.negatives is not None:
        negatives = experiment.negatives.build(catalog, torch.Generator(device).manual_seed(0))
    model = build_model(experiment, data).to(device).train()
    objective = StepObjective(
        model,
        experiment.loss.build(catalog),
        negatives,
        torch.Generator(device).manual_seed(0),
        compiled=compile_pass(model, config.compile),
    )
    optimizer, _ = experiment.optim.build(model, 10_000, config.monitor)
    batches = train_batches(experiment, data, device, seed=0)
    bf16 = config.precision == "bf16-mixed"

    def run() -> tuple[float, int, int]:
        wait(device)
        started, tokens, done = time.perf_counter(), 0, 0
        for batch in islice(batches, steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = objective(batch).loss
            loss.backward()
            optimizer.step()
            assert batch.sizes is not None
            tokens += sum(batch.sizes.targets)
            done += 1
        wait(device)
        return time.perf_counter() - started, tokens, done

    with matmul_precision("high" if config.tf32 else "highest"):
        run()
        seconds, tokens, done = min(run() for _ in range(2))
    each, peak = flops_per_token(experiment, data.catalog, batches), peak_rate(config, device)
    return {
        "milliseconds_per_step": 1000 * seconds / done,
        "seconds_per_epoch": seconds / done * len(batches),
        "tokens_per_second": tokens / seconds,
        "tflops": each * tokens / seconds / 1e12,
        "mfu": None if peak is None else each * tokens / seconds / peak,
        "parameters": sum(part.numel() for part in model.parameters()),
    }


def ranking(items: int, users: int, d_model: int, arithmetic: str, device: torch.device) -> Answer:
    """Exact full ranking of random users; operations are those of the scores."""
    data = random_data(items, 20, users)
    experiment = sasrec(d_model, 20, 256, {}, FULL)
    model = build_model(experiment, data).to(device).eval()
    catalog = data.catalog.to(device)

    def run() -> int:
        batches = EvalBatches(data.sequences, data.split, "test", max_len=20, batch_size=1024, device=device)
        scorer = DotScorer(model, 20)
        table = evaluate(scorer, batches, catalog, EvalConfig(), split="test", split_hash=data.split.hash).ranks
        return table.num_rows

    seconds = []
    with matmul_precision("high" if ARITHMETIC[arithmetic] else "highest"):
        for _ in range(2):
            wait(device)
            started = time.perf_counter()
            ranked = run()
            wait(device)
            seconds.append(time.perf_counter() - started)
    best = min(seconds)
    return {"users_per_second": ranked / best, "tflops": 2 * d_model * (items / 2) * ranked / best / 1e12}


def products(size: int, arithmetic: str, device: torch.device) -> Answer:
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    with matmul_precision("high" if arithmetic == "tf32" else "highest"):
        return {"tflops": median(matmul_rate(device, dtype, size) for _ in range(3)) / 1e12}


def cases(scale: Scale, device: torch.device) -> Iterator[tuple[str, Callable[[], Answer]]]:
    """Names and what to do for them. On a CPU only fp32, as bf16 there is slower by far."""
    kinds = ARITHMETIC if device.type == "cuda" else {"fp32": {}}
    best = "bf16" if "bf16" in kinds else "fp32"
    for kind in kinds:
        yield f"matmul {kind}", partial(products, scale.matmul, kind, device)

    def on_food_kitchen(config: str, trainer: dict[str, Any], loss: dict[str, Any]) -> tuple[Experiment, Data]:
        experiment = food_kitchen(config, scale.small, trainer, loss)
        return experiment, load_data(experiment.data, None)

    for kind, trainer in kinds.items():
        for mode in scale.modes:
            asked = trainer | {"compile": mode}
            for name, config, losses in (
                ("abxi", "abxi.yaml", {"": {}}),
                ("sasrec", "sasrec.yaml", {"": {}, " fused": {"fused": True}}),
            ):
                for label, loss in losses.items():
                    make = partial(on_food_kitchen, config, asked, loss)
                    yield f"food-kitchen {name} {kind} {mode or 'eager'}{label}", partial(training, make, device, None)

    def on_random(d_model: int, items: int, length: int, loss: dict[str, Any]) -> tuple[Experiment, Data]:
        rows = max(1, scale.tokens // length)
        experiment = sasrec(d_model, length, rows, kinds[best] | {"compile": scale.modes[-1]}, loss)
        return experiment, random_data(items, length + 3, rows * scale.steps)

    def random(d_model: int, items: int, length: int, loss: dict[str, Any]) -> Callable[[], Answer]:
        return partial(training, partial(on_random, d_model, items, length, loss), device, scale.steps)

    middle = scale.widths[len(scale.widths) // 2 - 1]
    for d_model in scale.widths:
        yield f"width {d_model} fused", random(d_model, scale.catalogues[0], scale.lengths[0], FUSED)
        yield f"width {d_model} full", random(d_model, scale.catalogues[0], scale.lengths[0], FULL)
    for items in scale.catalogues:
        yield f"catalogue {items} fused", random(middle, items, scale.lengths[0], FUSED)
        yield f"catalogue {items} shared", random(middle, items, scale.lengths[0], SHARED)
    for length in scale.lengths:
        yield f"length {length} shared", random(middle, scale.catalogues[0], length, SHARED)
    for items in scale.ranked:
        for kind in kinds:
            if kind != "bf16":  # scores are in fp32 whatever the precision of training
                yield f"ranking {items} {kind}", partial(ranking, items, scale.users, middle, kind, device)


def measure(work: Callable[[], Answer], device: torch.device) -> Answer:
    """What is missing or does not fit is an answer too."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return work() | {"peak_mib": peak_memory(device) / 2**20}
    except DataError as error:
        return {"missing": str(error)}
    except Exception as error:  # of one case: it is written down, and the others are measured all the same
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="regular expression that a case's name has to match")
    parser.add_argument("--again", action="store_true", help="measure what has been measured")
    parser.add_argument("--output", type=Path, help="the file, where it is not the usual one")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny --device cpu shows that the cases run")
    environment = describe_environment(device)
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = arguments.output or HERE / "results" / f"gpu-{name}.json"
    results: dict[str, Any] = {"cases": {}}
    if path.exists() and not arguments.again:
        results = json.loads(path.read_text())
    for case, work in cases(TINY if arguments.tiny else WHOLE, device):
        known = results["cases"].get(case, {"missing": ""})
        if not known.keys() & {"missing", "error"} or not re.search(arguments.only, case):
            continue
        answer = measure(work, device)
        results["cases"][case] = answer | {"commit": environment["commit"], "date": time.strftime("%Y-%m-%d")}
        results["environment"] = environment
        write_json(path, results)
        figures = (f"{key} {value:,.3f}" for key, value in answer.items() if isinstance(value, float))
        print(f"{case:45} {'  '.join(figures) or answer}", flush=True)
    print(f"written  {path}")


if __name__ == "__main__":
    main()
