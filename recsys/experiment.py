"""An experiment, whole: seed, data, model, loss, optimizer, training, evaluation. Composition only."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from recsys.balance import ParetoConfig
from recsys.data.batches import make_catalog, training_events
from recsys.data.policies import PrepareOptions, unknown_domain
from recsys.data.prepare import NamedItem, load_items, load_prepared, locate_prepared
from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import TEST, VALID, LeaveOneOut, Split, SplitConfig, make_split
from recsys.data.synthetic import SyntheticConfig
from recsys.data.text import ItemText, TextConfig, encode_items, item_titles
from recsys.evaluation import EvalConfig
from recsys.evaluation.protocols import PROTOCOLS
from recsys.loading import Config, dump_yaml
from recsys.losses import GBCEConfig, LossConfig
from recsys.models import ItemKNNConfig, LLM4CDSRConfig, MarkovConfig, ModelConfig, PopularityConfig, count_parameters
from recsys.negatives import NegativesConfig
from recsys.optim import OptimConfig
from recsys.results import fingerprint
from recsys.types import Catalog, Fitted


class DatasetSource(Config):
    """A dataset with a card in `data/cards`."""

    name: Literal["dataset"] = "dataset"
    dataset: str
    """Name of the card, as `recsys data list` shows it."""
    options: PrepareOptions | None = None
    """Preparation other than the card's own."""

    def sequences(self, data_root: Path | None) -> Sequences:
        """The prepared dataset, prepared first if only its raw files are there."""
        return load_prepared(self.dataset, data_root, self.options)[0]

    def items(self, data_root: Path | None) -> tuple[NamedItem, ...]:
        return load_items(self.dataset, data_root, self.options)

    def directory(self, data_root: Path | None) -> Path:
        """Where the prepared dataset lies."""
        return locate_prepared(self.dataset, data_root, self.options)


class DataConfig(Config):
    """Which events, how they are divided, and how much of a history a model sees."""

    source: Annotated[DatasetSource | SyntheticConfig, Field(discriminator="name")]
    split: SplitConfig = LeaveOneOut()
    domain: str | None = None
    """Only this domain's events, in histories and as targets; the split stays that of all domains."""
    train_users: float | None = Field(None, gt=0, le=1)
    """Share of the users that is trained on, for laws in the amount of data; all are tested. null: all of them."""
    max_len: int = Field(50, ge=1)
    """Most recent events of a history that a model sees; truncation comes after the split."""
    windows: Literal["last", "all"] = "last"
    """Train on the last `max_len` targets of a user, or on consecutive windows over the whole history."""
    text: TextConfig | None = None
    """Vectors of the items' titles, for models that read them; null: none."""


class TrainerConfig(Config):
    """The training loop."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    """Users per step."""
    length_pool: int | None = Field(32, ge=2)
    """Training rows are sorted by length within pools of this many batches, which leaves little padding but batches
    of users who are alike in length; null leaves them mixed."""
    validate_every: int = Field(1, ge=1)
    """Epochs between validations."""
    monitor: str = "validation/macro/ndcg@10"
    """Validation metric that picks the checkpoint; larger is better."""
    patience: int | None = Field(5, ge=1)
    """Validations without a better value before training stops; null trains to the end."""
    gradient_clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null leaves it."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    tf32: bool = False
    """fp32 products on a GPU in TF32 (10 bits of mantissa), in training and its validations."""
    widths: int | None = Field(None, ge=1)
    """Pad batches to at most so many widths, and every domain's stream to that of the whole history, so that batches
    come in so many shapes; with 1, a sweep trains runs that differ in their seed as one (`together`). null pads them to
    their longest history, and to four widths for `compile`."""
    compile: Literal["default", "reduce-overhead"] | None = None
    """Compile the model's pass in a step (`torch.compile`; `reduce-overhead` records CUDA graphs), on batches of few
    widths. For SASRec, HSTU, ABXI and CrossDomain; others say that they do not compile. null does not."""
    prefetch: int | None = Field(None, ge=1)
    """Keep the training events in the host's memory and send so many batches ahead to the GPU, for events that do not
    fit on it; null puts them there whole. Histories to validate and test lie there in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False
    """Also log for TensorBoard (needs the extra `tensorboard`)."""

    @model_validator(mode="after")
    def _validates(self) -> "TrainerConfig":
        if self.validate_every > self.epochs:
            raise ValueError(
                f"validate_every is {self.validate_every} and epochs is {self.epochs}: no epoch would be validated, "
                "and validation picks the checkpoint; lower validate_every"
            )
        return self


class TrajectoryConfig(Config):
    """When the exchange is measured in training, on the validation targets: before the first step, at these times, and
    at the checkpoint that validation picks. Nothing is drawn from what training draws from."""

    every: int | None = Field(1, ge=1)
    """Epochs between measurements; null leaves out the epochs."""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Further optimizer steps after which to measure, as at the start of training, where most changes."""


class Experiment(Config):
    """One run. `cross: null` against `cross: {...}` in the model is the one key between baseline and treatment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    loss: LossConfig | None = None
    """null for a model that counts instead of descending a gradient."""
    negatives: NegativesConfig | None = None
    """null for a loss over whole catalogues."""
    balance: ParetoConfig | None = None
    """How the loss is weighed against a model's further terms; null adds them with the weights the model gives them."""
    alignment_penalty: float | None = Field(None, allow_inf_nan=False)
    """Adds this times mean cos² between the query and the output of every cross-attention to the loss: above 0 it
    presses them towards orthogonality, below 0 towards one line. null adds nothing."""
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    probes: TrajectoryConfig | None = None
    """Measure the exchange while it is trained (`probes.parquet`); null does not."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "Experiment":
        if self.counts and self.loss is not None:
            raise ValueError(
                f"loss: the model {self.model.name!r} counts and has no loss; remove the key or set it to null"
            )
        if not self.counts and self.loss is None:
            raise ValueError(f"loss: this key is missing; the model {self.model.name!r} is trained by a loss")
        if self.counts and self.balance is not None:
            raise ValueError(f"balance: the model {self.model.name!r} counts and has no loss; set the key to null")
        if self.alignment_penalty is not None and getattr(self.model, "cross", None) is None:
            raise ValueError(
                f"alignment_penalty: this {self.model.name!r} has no exchange to press on; "
                "give it a `cross` or set the key to null"
            )
        if self.alignment_penalty is not None and self.trainer.compile is not None:
            raise ValueError(
                "trainer.compile: alignment_penalty reads inside the model's pass; set one of them to null"
            )
        needs = self.loss is not None and self.loss.needs_negatives
        if needs and self.negatives is None:
            assert self.loss is not None
            raise ValueError(f"negatives: this key is missing; the loss {self.loss.name!r} draws negatives")
        if not needs and self.negatives is not None:
            raise ValueError("negatives: nothing here draws negatives; remove the key or set it to null")
        if isinstance(self.loss, GBCEConfig) and self.negatives is not None:
            scope = "target_domain" if self.loss.catalogue == "domain" else "all"
            if self.negatives.scope != scope:
                raise ValueError(
                    f"negatives.scope is {self.negatives.scope!r}, but gbce takes its rate from loss.catalogue "
                    f"{self.loss.catalogue!r}; set negatives.scope to {scope!r} or change loss.catalogue"
                )
        for name in self.eval.protocols:
            if PROTOCOLS[name].by_thread and not isinstance(self.model, LLM4CDSRConfig):
                raise ValueError(
                    f"eval.protocols: {name} draws other candidates for each thread of a model, and the model "
                    f"{self.model.name!r} has a single one; use uni_100"
                )
        return self

    @property
    def counts(self) -> bool:
        """Whether the model counts training events instead of descending a gradient."""
        return isinstance(self.model, PopularityConfig | MarkovConfig | ItemKNNConfig)

    def yaml(self) -> str:
        """The resolved experiment, every default written out."""
        return dump_yaml(self)


@dataclass(frozen=True)
class Data:
    """The events of an experiment, divided."""

    sequences: Sequences
    split: Split
    catalog: Catalog
    text: ItemText | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with any event and any role, and with any title where titles are used."""
        return fingerprint(self.sequences.fingerprint, self.split.hash, *([self.text.fingerprint] if self.text else []))


def load_data(config: DataConfig, data_root: Path | None) -> Data:
    """The events of an experiment. Raises DataError, with the command to run, where a dataset is not there."""
    sequences = config.source.sequences(data_root)
    if config.domain is not None and config.domain not in sequences.domain_names:
        raise unknown_domain(config.domain, sequences.domain_names)
    split = make_split(sequences, config.split, config.train_users)
    _require_targets(sequences, split, config.domain)
    catalog = make_catalog(sequences, split)
    text = None
    if config.text is not None:
        named: tuple[NamedItem, ...] = ()
        directory = None
        if isinstance(config.source, DatasetSource):
            named, directory = config.source.items(data_root), config.source.directory(data_root)
        titles = item_titles(named, catalog.num_items, config.text.titles)
        events = training_events(sequences, split, config.domain)
        text = encode_items(config.text, titles, catalog, events, directory)
    return Data(sequences, split, catalog, text)


def _require_targets(sequences: Sequences, split: Split, domain: str | None) -> None:
    """Raises DataError where training would end with nothing to choose a checkpoint by, or to report."""
    role = split.role
    if domain is not None:
        role = role[np.asarray(sequences.domains == sequences.domain_names.index(domain))]
    for stage, wanted in (("validation", VALID), ("test", TEST)):
        if not (role == wanted).any():
            where = "" if domain is None else f" in {domain}"
            raise DataError(f"the split {split.name} has no {stage} target{where}; choose another split or more data")


def build_model(experiment: Experiment, data: Data) -> nn.Module:
    """The model before training, fitted to the training events where it reads them.

    Its weights are a function of the experiment's seed.
    """
    generator = torch.Generator().manual_seed(experiment.seed)
    model = experiment.model.build(data.catalog, experiment.data.max_len, generator)
    if isinstance(model, Fitted):
        events = training_events(data.sequences, data.split, experiment.data.domain)
        model.fit(events if data.text is None else replace(events, text=data.text.vectors))
    return model


def parameter_counts(experiment: Experiment, catalog: Catalog) -> dict[str, int]:
    """Parameters by group and in total, counted on the meta device, without memory for the weights."""
    with torch.device("meta"):
        return count_parameters(experiment.model.build(catalog, experiment.data.max_len))
