"""Learning a policy from logged feedback, with the project's one LightningModule."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from recsys.data.schema import DataError
from recsys.evaluation.running import RankingMetrics
from recsys.experiment import Data, Experiment, build_model
from recsys.loading import Config
from recsys.models import count_parameters
from recsys.offpolicy.candidates import Candidate, HistoryScores, ItemScores
from recsys.offpolicy.estimators import SNIPS
from recsys.offpolicy.evaluate import EvaluateConfig, Report, evaluate
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.objectives import BY_MODEL, BY_REFERENCE, ObjectiveConfig, SmoothingObjective, View
from recsys.offpolicy.policies import PlackettLuce
from recsys.offpolicy.rewards import ItemMeans, RewardModel
from recsys.offpolicy.simulator import Truth, true_value
from recsys.offpolicy.sources import LogSource, Opened, World, history_reader, open_for, open_log, write_scores
from recsys.optim import OptimConfig
from recsys.results import RunDirectory, fingerprint, write_json, write_text
from recsys.training.checkpoint import write_checkpoint
from recsys.training.environment import describe_environment
from recsys.training.module import SequentialModule
from recsys.training.run import quiet_lightning
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, NegativeSampler, Recommender


class LearnConfig(Config):
    """A policy learnt from a log."""

    log: LogSource
    init: str | None = None
    """The run whose model is trained further; null learns a score per item, for a log without histories."""
    fresh: bool = False
    """Begin with new weights of the run's model instead of its own."""
    objective: ObjectiveConfig = SmoothingObjective()
    policy: PlackettLuce = PlackettLuce()
    """The policy over the model's scores that is trained and afterwards evaluated."""
    reward: dict[str, float] = Field({"click": 1.0}, min_length=1)
    reward_model: ItemMeans | None = None
    """For the objectives `dr` and `mdpo`."""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of users whose requests are kept to evaluate what was learnt."""
    epochs: int = Field(5, ge=1)
    refresh: int = Field(1, ge=1)
    """Epochs of an iteration: how long `mdpo` and `opmd` keep their reference."""
    batch_size: int = Field(256, ge=2)
    gradient_clip: float | None = Field(1.0, gt=0)
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig(estimators=(SNIPS(),))
    """Of the held-out requests."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True)
class LoggedBatch(Batch):
    """Histories of requests that ask for one domain, with what was shown to them and what came of it."""

    request: Int[Tensor, " batch"]
    """Row of the log."""
    slates: Int[Tensor, "batch slots"]
    """Item ids."""
    reward: Float[Tensor, "batch slots"]
    propensity: Float[Tensor, "batch slots"]
    reference: Float[Tensor, "batch candidates"] | None
    """Scores of the last iteration's model for the domain's items."""


class ItemTable(nn.Module):
    """A score per item, whatever the history: the smallest recommender."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items + 1, 1))

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        return torch.ones(*batch.items.shape, 1, device=self.weight.device)

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.weight


class Shown(nn.Module):
    """A model as it is when it is shown: without dropout, and without objectives of its own.

    Weights compare the policy that would be shown with the one that was; the noise of dropout would be in them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def train(self, mode: bool = True) -> "Shown":
        return super().train(False)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        return cast("Recommender", self.model)(batch)

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return cast("Recommender", self.model).item_embeddings()


class PolicyLoss(nn.Module):
    """An objective as the training loop calls a loss."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        policy: PlackettLuce,
        catalog: Catalog,
        reward_model: RewardModel | None = None,
    ) -> None:
        """Raises DataError for an objective that lacks its reward model."""
        super().__init__()
        if isinstance(objective, BY_MODEL) and reward_model is None:
            raise DataError(f"{objective.name} needs a reward model; give one (reward_model: {{name: item_means}})")
        self.objective = objective
        self.policy = policy
        self.catalog = catalog
        self.reward_model = reward_model

    def forward(
        self,
        hidden: Float[Tensor, "batch length d_model"],
        table: Float[Tensor, "items d_model"],
        batch: Batch,
        negatives: NegativeSampler | None,
    ) -> Float[Tensor, ""]:
        assert isinstance(batch, LoggedBatch)
        domain = int(batch.target_domains[0, -1])
        scores = hidden[:, -1] @ table[self.catalog.items_of(domain)].T
        return self.objective.loss(self.view(scores, batch)).to(hidden.dtype)

    def view(self, scores: Float[Tensor, "batch candidates"], batch: LoggedBatch) -> View:
        """A batch under the policy over these scores of its domain's items."""
        domain = int(batch.target_domains[0, -1])
        items = self.catalog.items_of(domain)
        slates = self.catalog.local_index[batch.slates]
        policy = self._top(scores)
        propensity = batch.propensity.log()
        reference = None if batch.reference is None else self._top(batch.reference)
        model = None
        if self.reward_model is not None:
            model = self.reward_model.predict(batch.request, 0, items).double()
        return View(
            slate=self.policy.log_probs(scores, slates).sum(1),
            slate_propensity=propensity.sum(1),
            shown=policy.gather(1, slates),
            propensity=propensity,
            reward=batch.reward,
            policy=policy,
            reference=reference,
            shown_reference=None if reference is None else reference.gather(1, slates),
            model=model,
            shown_model=None if model is None else model.gather(1, slates),
        )

    def _top(self, scores: Float[Tensor, "batch candidates"]) -> Float[Tensor, "batch candidates"]:
        """log π of every candidate at the top."""
        chosen = (scores.double() / self.policy.temperature).log_softmax(1)
        if self.policy.epsilon == 0:
            return chosen
        uniform = math.log(self.policy.epsilon) - math.log(scores.shape[1])
        if self.policy.epsilon == 1:
            return torch.full_like(chosen, uniform)
        return torch.logaddexp(chosen + math.log1p(-self.policy.epsilon), torch.full_like(chosen, uniform))


class LoggedBatches:
    """The requests of a log in shuffled batches of one domain each; the order is a function of (seed, epoch)."""

    def __init__(
        self,
        log: LoggedFeedback,
        reward: np.ndarray,
        histories: Callable[[Int[Tensor, " batch"]], Batch],
        catalog: Catalog,
        *,
        batch_size: int,
        seed: int,
        reference: nn.Module | None = None,
        refresh: int = 1,
    ) -> None:
        """`reference` is the model in training where the objective compares with the last iteration's."""
        self._log = log
        self._columns = [torch.from_numpy(column) for column in (log.items, reward, log.propensity)]
        self._histories = histories
        self._catalog = catalog
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._model = reference
        self._refresh = refresh
        self._snapshot: nn.Module | None = None

    def __len__(self) -> int:
        counts = np.bincount(self._log.domain, minlength=len(self._log.domain_names))
        return int((-(-counts // self._batch_size)).sum())

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[LoggedBatch]:
        if self._model is not None and (self._snapshot is None or self._epoch % self._refresh == 0):
            self._snapshot = copy.deepcopy(self._model)  # the model itself goes on changing
        generator = np.random.default_rng([self._seed, self._epoch])
        batches = []
        for domain in range(len(self._log.domain_names)):
            rows = generator.permutation(np.flatnonzero(self._log.domain == domain))
            batches += np.split(rows, range(self._batch_size, len(rows), self._batch_size)) if len(rows) else []
        for index in generator.permutation(len(batches)):
            yield self._gather(torch.from_numpy(batches[index]))

    def _gather(self, rows: Int[Tensor, " batch"]) -> LoggedBatch:
        batch = self._histories(rows)
        slates, reward, propensity = (column[rows] for column in self._columns)
        reference = None
        if self._snapshot is not None:
            domain = int(batch.target_domains[0, -1])
            model = cast("Recommender", self._snapshot)
            with torch.no_grad():
                reference = model(batch)[:, -1] @ model.item_embeddings()[self._catalog.items_of(domain)].T
        return LoggedBatch(
            **batch.columns(),
            sizes=None,
            request=rows,
            slates=slates,
            reward=reward,
            propensity=propensity,
            reference=reference,
        )


@dataclass(frozen=True)
class Learnt:
    """A policy before and after learning, on the users that were held out."""

    before: Report
    after: Report
    truth_before: Truth | None
    truth_after: Truth | None


def learn(config: LearnConfig, output: Path, data_root: Path | None, tell: Callable[[str], None]) -> Learnt:
    """Train, evaluate on held-out users, and write what was learnt into a folder.

    With `init` the folder is a run directory, which `evaluate` takes as a candidate (`scale: raw`); without, it holds
    `scores.csv`, which it takes as a table.
    """
    opened = open_log(config.log, data_root)
    log = opened.log
    user = np.unique(log.user)
    held_out = np.random.default_rng(config.seed).permutation(user)[: max(1, round(config.holdout * len(user)))]
    kept = np.isin(log.user, held_out)
    train, test = log.take(np.flatnonzero(~kept)), log.take(np.flatnonzero(kept))
    reward = train.reward(config.reward)
    reward_model = None
    if config.reward_model is not None:
        reward_model = config.reward_model.fit(train, reward, np.random.default_rng(config.seed))

    world = None if opened.made_by is None else World.of(opened.made_by, data_root)
    run = None if config.init is None else _open_init(config, world, data_root)
    model: nn.Module = ItemTable(log.num_items) if run is None else run.model
    before = copy.deepcopy(model)
    loss = PolicyLoss(config.objective, config.policy, opened.catalog, reward_model)
    histories = _no_history(train) if run is None else run.reader(model, train).batch
    _fit(config, Shown(model), loss, train, reward, histories, opened.catalog, tell)

    found = []
    for name, version in (("before", before), ("after", model)):
        on_test = Candidate(name, config.policy, _scores(run, version, test))
        truth = None
        if world is not None:
            everyone = Candidate(name, config.policy, _scores(run, version, world.simulator.requests))
            generator = torch.Generator().manual_seed(config.seed)
            truth = true_value(world.simulator, everyone, log.slots, 2, generator)
        found.append((evaluate(test, on_test, opened.catalog, config.evaluate), truth))
    learnt = Learnt(found[0][0], found[1][0], found[0][1], found[1][1])
    _write(config, run, model, opened, learnt, output)
    return learnt


@dataclass(frozen=True)
class _Init:
    """The run that learning starts from."""

    experiment: Experiment
    data: Data
    model: nn.Module

    def reader(self, model: nn.Module, requests: Any) -> HistoryScores:
        return history_reader(self.experiment, self.data, model, requests)


def _open_init(config: LearnConfig, world: World | None, data_root: Path | None) -> _Init:
    assert config.init is not None
    mine = None if world is None else world.data.sequences.fingerprint
    experiment, data, model = open_for(Path(config.init), mine, data_root)
    if experiment.counts:
        raise DataError(f"{config.init} counts and has no gradient to follow; start from a run that was trained")
    return _Init(experiment, data, build_model(experiment, data) if config.fresh else model)


def _scores(run: _Init | None, model: nn.Module, requests: Any) -> ItemScores | HistoryScores:
    if run is None:
        return ItemScores(cast("ItemTable", model).weight.detach()[:, 0])
    return run.reader(model, requests)


def _no_history(log: LoggedFeedback) -> Callable[[Int[Tensor, " batch"]], Batch]:
    """Requests of a log that does not say what its users did before."""
    user, domain = torch.from_numpy(log.user), torch.from_numpy(log.domain)

    def histories(rows: Int[Tensor, " batch"]) -> Batch:
        nothing = torch.full((len(rows), 1), PAD_ID)
        return Batch(
            user=user[rows],
            items=nothing,
            domains=torch.full_like(nothing, NO_DOMAIN),
            times=torch.zeros_like(nothing),
            targets=nothing,
            target_domains=domain[rows, None],
        )

    return histories


def _fit(
    config: LearnConfig,
    model: nn.Module,
    loss: PolicyLoss,
    log: LoggedFeedback,
    reward: np.ndarray,
    histories: Callable[[Int[Tensor, " batch"]], Batch],
    catalog: Catalog,
    tell: Callable[[str], None],
) -> None:
    batches = LoggedBatches(
        log,
        reward,
        histories,
        catalog,
        batch_size=config.batch_size,
        seed=config.seed,
        reference=model if isinstance(config.objective, BY_REFERENCE) else None,
        refresh=config.refresh,
    )
    module = SequentialModule(
        model=model,
        loss=loss,
        negatives=None,
        optim=config.optim,
        metrics=RankingMetrics("validation", catalog.domain_names, (10,), "average"),
        catalog=catalog,
        seen="none",
        monitor="train/loss",
        seed=config.seed,
        config="",
    )
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=config.epochs,
            gradient_clip_val=config.gradient_clip,
            callbacks=[_Told(tell)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic=True,
        )
        trainer.fit(module, train_dataloaders=batches)


class _Told(pl.Callback):
    """Says how each epoch ended."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self._tell(f"epoch {trainer.current_epoch + 1}  loss {loss:.5f}")


def _write(
    config: LearnConfig, run: _Init | None, model: nn.Module, opened: Opened, learnt: Learnt, output: Path
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(torch.device("cpu"))
    outcome = {
        "config": config.model_dump(mode="json"),
        "environment": environment,
        "before": learnt.before.to_json(),
        "after": learnt.after.to_json(),
        "truth": None
        if learnt.truth_before is None or learnt.truth_after is None
        else {"before": vars(learnt.truth_before), "after": vars(learnt.truth_after)},
    }
    write_json(output / "learning.json", outcome)
    if run is None:
        write_scores(
            cast("ItemTable", model).weight.detach()[:, 0], opened.catalog, opened.raw_items, output / "scores.csv"
        )
        return
    name = f"{run.experiment.name}-{config.objective.name}"
    experiment = run.experiment.model_copy(update={"name": name})
    directory = RunDirectory(output)
    write_text(directory.config, experiment.yaml())
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    write_checkpoint({"state_dict": weights, "config": fingerprint(experiment.yaml())}, directory.best)
    write_json(
        directory.final,
        {
            "name": name,
            "seed": experiment.seed,
            "parameters": count_parameters(model),
            "data": {"fingerprint": run.data.fingerprint},
            "metrics": {},
        },
    )
    write_json(directory.environment, environment | {"seconds": None})
    write_text(directory.done, "")
