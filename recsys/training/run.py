"""A run: from an experiment to a directory with its numbers, and from such a directory back to its model."""

import contextlib
import difflib
import logging
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn

from recsys.data.batches import EvalBatches, TrainBatches
from recsys.data.split import VALID, split_report
from recsys.evaluation import DotScorer, EvalConfig, Evaluation, RanksInfo, evaluate, rank_full, summarize
from recsys.evaluation.metrics import metric_key
from recsys.evaluation.ranks import Split
from recsys.evaluation.running import RankingMetrics
from recsys.experiment import Data, Experiment, TrainerConfig, build_model, load_data
from recsys.loading import ConfigError, load_yaml
from recsys.memory import keep_freed_memory
from recsys.models import count_parameters
from recsys.precision import matmul_precision
from recsys.probes import find_units
from recsys.results import RunDirectory, RunError, atomic, fingerprint, write_json, write_text
from recsys.training.callbacks import EpochLog, EpochProgress
from recsys.training.checkpoint import AtomicCheckpoints, read_checkpoint, write_checkpoint
from recsys.training.curve import draw_curve
from recsys.training.environment import describe_environment
from recsys.training.module import SequentialModule, require_metric
from recsys.training.objective import compile_pass
from recsys.training.throughput import Throughput, flops_per_token, peak_rate
from recsys.training.trajectory import BEST, Trajectory
from recsys.types import HasObjective, NegativeSampler, Recommender, Scorer


def train(
    experiment: Experiment,
    data: Data,
    runs_dir: Path,
    console: Console,
    *,
    retry: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> RunDirectory:
    """Train, let validation pick the checkpoint, rank the test targets once, and write everything down.

    A finished run is returned as it is, a partial one goes on from its last checkpoint, a failed one is run again
    only with `retry`; `overwrite` starts from nothing. A failure leaves its traceback in `FAILED`. `callbacks` are told
    of the training beside its own.
    """
    keep_freed_memory()
    run = RunDirectory.of(runs_dir, experiment.name, experiment.yaml(), data.fingerprint)
    match "new" if overwrite else run.state:
        case "done":
            console.print(f"{run.path} is done; --overwrite runs it again", highlight=False)
            return run
        case "failed" if not retry:
            raise RunError(f"{run.path} failed earlier: {run.failure()} (see {run.failed}); --retry runs it again")
        case "partial":
            console.print(f"{run.path} was cut off and goes on from its last checkpoint", highlight=False)
    if not experiment.counts:
        _check_monitor(experiment, data)
    parts = _build(experiment, data, choose_device(experiment.trainer))
    with _at_work(run, experiment, overwrite):
        _train(experiment, data, parts, run, console, callbacks)
    return run


def select(
    experiment: Experiment, data: Data, runs_dir: Path, console: Console, *, callbacks: Sequence[Callback] = ()
) -> float:
    """Train without a look at any test target; gives the value of `trainer.monitor` at the chosen checkpoint.

    The run is left unfinished: `train` takes it up behind its training. A finished or cut off run is taken as `train`
    takes it; one that failed is refused.
    """
    run = RunDirectory.of(runs_dir, experiment.name, experiment.yaml(), data.fingerprint)
    if run.state == "failed":
        raise RunError(f"{run.path} failed earlier: {run.failure()} (see {run.failed})")
    _check_monitor(experiment, data)
    parts = _build(experiment, data, choose_device(experiment.trainer))
    if run.state == "done" and not experiment.counts:
        return float(run.read_final()["selection"]["value"])
    with _at_work(run, experiment):
        if experiment.counts:
            return _validate(experiment, data, parts)
        return float(_fit(experiment, data, parts, run, console, callbacks)["value"])


@contextlib.contextmanager
def _at_work(run: RunDirectory, experiment: Experiment, overwrite: bool = False) -> Iterator[None]:
    """Holds the directory of a run, with its config in it; what goes wrong leaves its traceback there."""
    with run.held():
        if overwrite:
            run.clear()
        run.failed.unlink(missing_ok=True)
        write_text(run.config, experiment.yaml())
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                write_text(run.failed, traceback.format_exc())
            raise


def open_run(path: Path, data_root: Path | None) -> tuple[RunDirectory, Experiment, Data, nn.Module]:
    """A finished run again: its experiment, its data, and its model with the weights of the best checkpoint.

    Raises RunError where the checkpoint is of another config, or the data are not those of the run.
    """
    keep_freed_memory()
    run = RunDirectory.open(path)
    experiment = load_yaml(run.config, Experiment)
    data = load_data(experiment.data, data_root)
    expected = run.read_final()["data"]["fingerprint"]
    if expected != data.fingerprint:
        raise RunError(
            f"{path} was made on other data: fingerprint {expected[:12]}, here it is {data.fingerprint[:12]}"
        )
    model = build_model(experiment, data)
    load_weights(model, run)
    return run, experiment, data, model


def load_weights(model: nn.Module, run: RunDirectory) -> None:
    """The weights of a run's best checkpoint, safely. Raises RunError where it is missing, damaged, or of another
    config than the one that lies beside it.

    The config is compared as it was written: a run keeps its checkpoint when later versions have further keys.
    """
    checkpoint = run.best
    content = read_checkpoint(checkpoint)
    weights, config = content["state_dict"], content["config"]
    if config != fingerprint(run.config.read_text(encoding="utf-8")):
        raise RunError(f"{checkpoint} belongs to another config than the config.yaml beside it; train with --overwrite")
    prefix = "model."
    model.load_state_dict({key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})


def evaluate_model(
    model: nn.Module, experiment: Experiment, data: Data, config: EvalConfig, stage: Split, device: torch.device
) -> Evaluation:
    """Ranks of a stage's targets under the protocols of `config`."""
    scorer = make_scorer(model.to(device).eval(), experiment)
    return evaluate(
        scorer,
        eval_batches(experiment, data, config, stage, device),
        data.catalog.to(device),
        config,
        split=stage,
        split_hash=data.split.hash,
    )


def make_scorer(model: nn.Module, experiment: Experiment) -> Scorer:
    """What ranks for a model: the model itself where it counts, its dot products where it was trained."""
    if experiment.counts:
        return cast("Scorer", model)
    return DotScorer(cast("Recommender", model), experiment.data.max_len)


def train_batches(experiment: Experiment, data: Data, device: torch.device, seed: int) -> TrainBatches:
    """As the experiment trains on them."""
    config, max_len = experiment.trainer, experiment.data.max_len
    return TrainBatches(
        data.sequences,
        data.split,
        max_len=max_len,
        batch_size=config.batch_size,
        seed=seed,
        device=device,
        domain=experiment.data.domain,
        windows=experiment.data.windows,
        length_pool=config.length_pool,
        width_step=_width_step(config, max_len),
        prefetch=config.prefetch,
    )


def _width_step(config: TrainerConfig, max_len: int) -> int | None:
    if config.widths is not None:
        return -(-max_len // config.widths)
    return None if config.compile is None else max(16, -(-max_len // 4))  # at most four graphs


def eval_batches(
    experiment: Experiment, data: Data, config: EvalConfig, stage: Split, device: torch.device
) -> EvalBatches:
    return EvalBatches(
        data.sequences,
        data.split,
        stage,
        max_len=experiment.data.max_len,
        batch_size=config.batch_size,
        device=device,
        domain=experiment.data.domain,
    )


def report(evaluation: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """An evaluation as it stands in `final.json`: protocols, counts, and every metric with its interval."""
    return {
        "evaluation": config.model_dump(mode="json") | asdict(RanksInfo.of(evaluation.ranks)),
        "counts": {domain: asdict(counts) for domain, counts in evaluation.counts.items()},
        "metrics": {key: asdict(interval) for key, interval in summarize(evaluation.ranks, config).items()},
        "coverage": evaluation.coverage,
    }


def choose_device(trainer: TrainerConfig) -> torch.device:
    """The device of a run. Raises RunError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if trainer.device == "cuda" and not available:
        raise RunError("trainer.device is cuda, but torch sees no GPU here; use --set trainer.device=cpu")
    return torch.device("cuda" if available and trainer.device != "cpu" else "cpu")


@dataclass(frozen=True)
class _Parts:
    """What an experiment is built into; a model that counts has neither loss nor negatives."""

    device: torch.device
    model: nn.Module
    loss: nn.Module | None
    negatives: NegativeSampler | None


def _build(experiment: Experiment, data: Data, device: torch.device) -> _Parts:
    """Raises ConfigError where a part does not fit the data (an exchange on one domain, no negative to be had)."""
    catalog = data.catalog.to(device)
    try:
        model = build_model(experiment, data)
        loss = None if experiment.loss is None else experiment.loss.build(catalog)
        negatives = None
        if experiment.negatives is not None:
            negatives = experiment.negatives.build(catalog, torch.Generator(device))
    except ValueError as error:
        raise ConfigError(f"{experiment.name} does not fit its data: {error}") from None
    return _Parts(device, model, loss, negatives)


def _train(
    experiment: Experiment,
    data: Data,
    parts: _Parts,
    run: RunDirectory,
    console: Console,
    callbacks: Sequence[Callback],
) -> None:
    """Of a run that goes on, `started` is of the last session; the seconds count the epochs of earlier ones too."""
    started = datetime.now(UTC)
    clock = time.perf_counter() - sum(record["seconds"] for record in run.read_log())
    device, model = parts.device, parts.model
    counts = count_parameters(model)
    console.print(
        f"{run.path.name}: {counts['total']:,} parameters, {data.sequences.num_users:,} users, "
        f"{data.sequences.num_items:,} items, {data.sequences.num_domains} domains, on {device}",
        highlight=False,
    )
    if data.text is not None:
        shares = ", ".join(f"{share:.1%} of {domain}" for domain, share in data.text.titled.items())
        console.print(f"items with a title: {shares}", highlight=False)
    if experiment.counts:
        selection = None
        _save_counts(experiment, model, run)
    else:
        selection = _fit(experiment, data, parts, run, console, callbacks)
    seconds_to_train = time.perf_counter() - clock

    evaluation = evaluate_model(model, experiment, data, experiment.eval, "test", device)
    with atomic(run.ranks) as path:
        pq.write_table(evaluation.ranks, path)
    if selection is not None:
        draw_curve(run.read_log(), run.curve, experiment.name, selection["epoch"])
    final = {
        "name": experiment.name,
        "run": run.path.name,
        "seed": experiment.seed,
        "selection": selection,
        "parameters": counts,
        "data": {"fingerprint": data.fingerprint, "domains": data.sequences.domain_names}
        | {"split": {"name": data.split.name} | split_report(data.sequences, data.split)}
        | ({} if data.text is None else {"titles": data.text.titled}),
        **report(evaluation, experiment.eval),
    }
    write_json(run.final, final)
    times = {
        "started": started.isoformat(timespec="seconds"),
        "seconds_to_train": round(seconds_to_train, 1),
        "seconds": round(time.perf_counter() - clock, 1),
    }
    write_json(run.environment, describe_environment(device) | times)
    write_text(run.done, "")


def _save_counts(experiment: Experiment, model: nn.Module, run: RunDirectory) -> None:
    """A model that counts has seen the training events when it was built."""
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    write_checkpoint({"state_dict": weights, "config": fingerprint(experiment.yaml())}, run.best)


def _validate(experiment: Experiment, data: Data, parts: _Parts) -> float:
    """The value of `trainer.monitor` of a model as it is."""
    metrics = _validation_metrics(experiment, data).to(parts.device)
    scorer, catalog = make_scorer(parts.model.to(parts.device).eval(), experiment), data.catalog.to(parts.device)
    for batch in eval_batches(experiment, data, experiment.eval, "validation", parts.device):
        ranks, cross_entropy = rank_full(scorer, batch, catalog, experiment.eval.seen)
        metrics.update(ranks, cross_entropy, batch.batch.target_domains[:, -1])
    values = metrics.compute()
    require_metric(experiment.trainer.monitor, values)
    return float(values[experiment.trainer.monitor])


def _validation_metrics(experiment: Experiment, data: Data) -> RankingMetrics:
    config = experiment.eval
    return RankingMetrics("validation", data.catalog.domain_names, config.ks, config.ties)


def _check_monitor(experiment: Experiment, data: Data) -> None:
    """Raises ConfigError where validation will not give the metric that picks the checkpoint."""
    metrics, monitor = _validation_metrics(experiment, data), experiment.trainer.monitor
    asked = [metrics.domain_names[domain] for domain in np.unique(data.sequences.domains[data.split.role == VALID])]
    groups = ["macro", "micro", *(asked if experiment.data.domain is None else [experiment.data.domain])]
    keys = [metric_key(metrics.split, group, name, "full") for group in groups for name in metrics.names]
    if monitor not in keys:
        near = difflib.get_close_matches(monitor, keys, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"trainer.monitor: there is no metric {monitor!r}; {hint}"
            f"(validation/<one of {', '.join(groups)}>/<one of {', '.join(metrics.names)}>)"
        )


def _fit(
    experiment: Experiment,
    data: Data,
    parts: _Parts,
    run: RunDirectory,
    console: Console,
    further: Sequence[Callback],
) -> dict[str, Any]:
    """Train to the end or to early stopping; leaves the weights of the best epoch in the model."""
    config, device = experiment.trainer, parts.device
    catalog = data.catalog.to(device)
    assert parts.loss is not None
    if config.widths is not None and isinstance(parts.model, HasObjective):
        name = type(parts.model).__name__
        raise RunError(f"trainer.widths: {name} has terms beside its loss, which count padding in; set it to null")
    module = SequentialModule(
        model=parts.model,
        loss=parts.loss,
        negatives=parts.negatives,
        optim=experiment.optim,
        metrics=_validation_metrics(experiment, data),
        catalog=catalog,
        seen=experiment.eval.seen,
        monitor=config.monitor,
        seed=experiment.seed,
        config=fingerprint(experiment.yaml()),
        balance=None if experiment.balance is None else experiment.balance.build(),
        alignment_penalty=experiment.alignment_penalty,
        compiled=compile_pass(parts.model, config.compile),
    )
    batches = train_batches(experiment, data, device, experiment.seed)
    best = ModelCheckpoint(
        dirpath=run.path,
        filename=run.best.stem,
        monitor=config.monitor,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        dirpath=run.path, filename=run.last.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    throughput = Throughput(
        batches, flops_per_token(experiment, data.catalog, batches), peak_rate(config, device), device
    )
    callbacks: list[Callback] = [
        throughput,
        EpochLog(run.log, throughput),
        EpochProgress(console, config.monitor, throughput),
    ]
    trajectory = None
    if experiment.probes is not None and find_units(parts.model):  # the baseline of a treatment has nothing to measure
        validation = eval_batches(experiment, data, experiment.eval, "validation", device)
        trajectory = Trajectory(experiment.probes, run.probes, validation, data.catalog.domain_names)
        trajectory.begin(parts.model.to(device))
        callbacks.append(trajectory)
    if config.patience is not None:
        callbacks.append(EarlyStopping(config.monitor, mode="max", patience=config.patience))
    with quiet_lightning(), matmul_precision("high" if config.tf32 else "highest"):
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=config.precision,
            max_epochs=config.epochs,
            check_val_every_n_epoch=config.validate_every,
            gradient_clip_val=config.gradient_clip,
            callbacks=[*further, *callbacks, best, last],
            plugins=[AtomicCheckpoints()],
            logger=TensorBoardLogger(run.path, name="", version="tensorboard") if config.tensorboard else False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
            deterministic="warn" if device.type == "cuda" else True,
        )
        if not _stopped_early(run, config):
            try:
                trainer.fit(
                    module,
                    train_dataloaders=batches,
                    val_dataloaders=eval_batches(experiment, data, experiment.eval, "validation", device),
                    ckpt_path=run.last if run.last.exists() else None,
                    weights_only=True,
                )
            except SystemExit:  # which Lightning makes of an interrupt
                raise KeyboardInterrupt from None
    load_weights(parts.model, run)
    log = run.read_log()
    chosen = max((record for record in log if config.monitor in record), key=lambda record: record[config.monitor])
    if trajectory is not None:
        trajectory.measure(parts.model.to(device), BEST, chosen["step"], chosen["epoch"])
    return {
        "metric": config.monitor,
        "value": chosen[config.monitor],
        "epoch": chosen["epoch"],
        "epochs": log[-1]["epoch"],
        "patience": config.patience,
    }


def _stopped_early(run: RunDirectory, config: TrainerConfig) -> bool:
    """Whether a run that is taken up again had ended its training: Lightning would train it for one more epoch."""
    if config.patience is None or not run.last.exists():
        return False
    callbacks = read_checkpoint(run.last)["callbacks"]
    [state] = [state for name, state in callbacks.items() if name.startswith("EarlyStopping")]
    return bool(state["wait_count"] >= config.patience)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning without its banners and its hints about loaders that are not ours."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*num_workers.*")
        try:
            yield
        finally:
            logger.setLevel(level)
