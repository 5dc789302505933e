"""Where logs and scores come from, as configs: files, finished runs, tables."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from recsys.data.schema import DataError
from recsys.experiment import Data, DataConfig, Experiment, load_data
from recsys.loading import Config, parse_config
from recsys.offpolicy.candidates import Candidate, HistoryScores, ItemScores, Requests, Scores
from recsys.offpolicy.feedback import FeedbackSource, LoggedFeedback
from recsys.offpolicy.kuairand import read_kuairand
from recsys.offpolicy.open_bandit import read_open_bandit
from recsys.offpolicy.policies import PlackettLuce, PolicyConfig
from recsys.offpolicy.propensity import ItemFrequency
from recsys.offpolicy.simulator import SimulatorConfig, UserSimulator, make_requests, offer
from recsys.results import RunError, atomic
from recsys.types import NO_DOMAIN, Catalog

_MADE_BY = b"recsys.offpolicy.log"


@dataclass(frozen=True)
class Standing:
    """Scores by rank alone: -log of an item's rank among the candidates, ties sharing their mean.

    At temperature 1 the item of rank r is then shown in proportion to 1 / r, whatever the scale of the scores: a
    policy of counts is as bold as one of logits.
    """

    scores: Scores

    def __call__(
        self, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        scores = self.scores(requests, items)
        ascending = scores.sort(dim=1).values
        below = torch.searchsorted(ascending, scores.contiguous())
        upto = torch.searchsorted(ascending, scores.contiguous(), right=True)
        rank = scores.shape[1] - (below + upto - 1).double() / 2
        return torch.where(scores.isfinite(), -rank.log(), scores.double())


class RunScores(Config):
    """The scores of a finished run, given each user's history before the request."""

    name: Literal["run"] = "run"
    path: str
    """A run directory, or a pattern such as `runs/afk-*`, which stands for a candidate per run."""
    scale: Literal["rank", "raw"] = "rank"
    """`rank`: -log of the rank; `raw`: the scores as they are, as for a policy that was learnt."""


class UniformScores(Config):
    """The same score for every item: at any temperature each is as likely as another."""

    name: Literal["uniform"] = "uniform"


class TableScores(Config):
    """A score per item from a CSV file with the columns `item` (id of the source) and `score`."""

    name: Literal["table"] = "table"
    path: str


class CandidateConfig(Config):
    """A policy over scores."""

    name: str | None = None
    """In tables and figures. Default: the name of the run or the file."""
    scores: Annotated[RunScores | UniformScores | TableScores, Field(discriminator="name")]
    policy: PolicyConfig = PlackettLuce()


class LogConfig(Config):
    """A log that a policy makes with simulated users."""

    data: DataConfig
    logging: CandidateConfig
    simulator: SimulatorConfig = SimulatorConfig()
    requests: int = Field(50_000, ge=2)
    slots: int = Field(1, ge=1)
    """Items in a slate."""
    offer: int | None = Field(None, ge=1)
    """Items that each domain has to show, those seen most often in training; null: all."""
    marginal_draws: int | None = Field(None, ge=1)
    """Slates drawn per request for the probability of an item at its position, which `independent` needs."""
    seed: int = Field(0, ge=0)


class ParquetLog(Config):
    """A file that `recsys offpolicy log` wrote, or any of its layout."""

    name: Literal["parquet"] = "parquet"
    path: str
    propensity_model: ItemFrequency | None = None
    """Fills in propensities that are missing; estimates then have no interval."""


class OpenBanditLog(Config):
    """A folder of the Open Bandit Dataset: `open_bandit/<policy>/<campaign>`."""

    name: Literal["open_bandit"] = "open_bandit"
    path: str


class KuaiRandLog(Config):
    """Files `log_*.csv` of KuaiRand."""

    name: Literal["kuairand"] = "kuairand"
    paths: tuple[str, ...] = Field(min_length=1)
    random_pool: int | None = Field(None, ge=1)
    """Videos that could be inserted at random; null: as many as were."""
    propensity_model: ItemFrequency | None = None


LogSource = Annotated[ParquetLog | OpenBanditLog | KuaiRandLog, Field(discriminator="name")]


@dataclass(frozen=True)
class World:
    """The data behind a simulated log, and its users."""

    data: Data
    simulator: UserSimulator

    @classmethod
    def of(cls, config: LogConfig, data_root: Path | None) -> "World":
        data = load_data(config.data, data_root)
        generator = np.random.default_rng(config.seed)
        requests, following = make_requests(data.sequences, data.split, config.requests, generator)
        catalog = offer(data.catalog, config.offer)
        return cls(data, UserSimulator(config.simulator, data.sequences, catalog, requests, following))


@dataclass(frozen=True)
class Opened:
    """A log, its catalogue, and what is known of how it was made."""

    log: LoggedFeedback
    catalog: Catalog
    raw_items: tuple[str, ...] | None
    """The source's id of item 1, 2, …; None where the log knows only ours."""
    made_by: LogConfig | None
    """Of a simulated log."""


def write_log(log: LoggedFeedback, config: LogConfig, fingerprint: str, path: Path) -> None:
    """The log with what made it, and the fingerprint of the events behind it, in the metadata of its file."""
    table = log.to_table()
    about = {"config": config.model_dump(mode="json"), "fingerprint": fingerprint}
    table = table.replace_schema_metadata({**table.schema.metadata, _MADE_BY: json.dumps(about).encode()})
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def open_log(source: ParquetLog | OpenBanditLog | KuaiRandLog, data_root: Path | None) -> Opened:
    """Raises DataError where the file is none, or a simulated log's data are no longer those that it was made of."""
    if isinstance(source, OpenBanditLog):
        return _public(read_open_bandit(Path(source.path)))
    if isinstance(source, KuaiRandLog):
        paths = [Path(path) for path in source.paths]
        return _public(read_kuairand(paths, source.random_pool, source.propensity_model))
    path = Path(source.path)
    log = LoggedFeedback.from_parquet(path, source.propensity_model)
    about = (pq.read_schema(path).metadata or {}).get(_MADE_BY)
    if about is None:
        return Opened(log, _catalog_of(log), None, None)
    made = json.loads(about)
    config = parse_config(made["config"], LogConfig, f"{path} (metadata)")
    data = load_data(config.data, data_root)
    if data.sequences.fingerprint != made["fingerprint"]:
        raise DataError(f"{path} was made on other data than are here now; log again, or bring the old data back")
    return Opened(log, offer(data.catalog, config.offer), None, config)


def make_candidates(
    config: CandidateConfig,
    requests: LoggedFeedback | Requests,
    catalog: Catalog,
    raw_items: tuple[str, ...] | None,
    fingerprint: str | None,
    data_root: Path | None,
) -> Iterator[Candidate]:
    """The candidates that a config stands for: one, or one per run of a pattern.

    `fingerprint` is that of the events that the requests' users are from, or None where there are no histories. Raises
    RunError for a run on other events, or on one domain of several.
    """
    match config.scores:
        case UniformScores():
            yield Candidate(config.name or "uniform", config.policy, ItemScores(torch.zeros(catalog.num_items + 1)))
        case TableScores(path=path):
            name = config.name or Path(path).stem
            yield Candidate(name, config.policy, ItemScores(read_scores(Path(path), catalog, raw_items)))
        case RunScores(path=pattern, scale=scale):
            runs = run_paths(pattern)
            for run in runs:
                name = run.name if config.name is None or len(runs) > 1 else config.name
                scores = _run_scores(run, requests, fingerprint, data_root)
                yield Candidate(name, config.policy, Standing(scores) if scale == "rank" else scores)


def run_paths(pattern: str) -> list[Path]:
    """The run directories of a path or a pattern."""
    paths = sorted(Path(found) for found in glob.glob(pattern) if (Path(found) / "config.yaml").is_file())
    if not paths:
        raise RunError(f"there is no run directory {pattern}; runs are made by `recsys train`")
    return paths


def history_reader(
    experiment: Experiment, data: Data, model: torch.nn.Module, requests: LoggedFeedback | Requests
) -> HistoryScores:
    """A run's scores for the users of a log."""
    from recsys.training.run import make_scorer  # brings Lightning

    return HistoryScores(make_scorer(model.eval(), experiment), data.sequences, requests, experiment.data.max_len)


def open_for(path: Path, fingerprint: str | None, data_root: Path | None) -> tuple[Experiment, Data, torch.nn.Module]:
    """A run whose data are those behind a log."""
    from recsys.training.run import open_run

    if fingerprint is None:
        raise RunError(f"{path} reads histories, and this log does not say what its users did before; give a table")
    _, experiment, data, model = open_run(path, data_root)
    if data.sequences.fingerprint != fingerprint:
        raise RunError(f"{path} was trained on other events than the log was made of; log with the data of the run")
    if experiment.data.domain is not None:
        raise RunError(f"{path} was trained on {experiment.data.domain} alone, and the log asks for other domains too")
    return experiment, data, model


def read_scores(path: Path, catalog: Catalog, raw_items: tuple[str, ...] | None) -> Float[Tensor, " items"]:
    """Scores by item id; every item of the catalogue has one."""
    try:
        frame = pd.read_csv(path, usecols=["item", "score"], dtype={"item": str, "score": np.float64})
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except ValueError as error:
        raise DataError(f"{path} is no table of scores (columns item and score): {error}") from None
    names = raw_items or tuple(str(item) for item in range(1, catalog.num_items + 1))
    ids = {name: item for item, name in enumerate(names, 1)}
    unknown = [item for item in frame["item"] if item not in ids]
    if unknown:
        raise DataError(f"{path}: there is no item {unknown[0]!r} in the log's catalogue")
    table = torch.full((catalog.num_items + 1,), torch.nan, dtype=torch.float64)
    table[[ids[item] for item in frame["item"]]] = torch.tensor(frame["score"].to_list(), dtype=torch.float64)
    missing = int((table.isnan() & (catalog.item_domain != NO_DOMAIN)).sum())
    if missing:
        raise DataError(f"{path}: {missing} items of the catalogue have no score; -inf bars an item")
    return table


def write_scores(
    table: Float[Tensor, " items"], catalog: Catalog, raw_items: tuple[str, ...] | None, path: Path
) -> None:
    """The scores of the items on offer, as `read_scores` reads them."""
    names = raw_items or tuple(str(item) for item in range(1, catalog.num_items + 1))
    offered = (catalog.item_domain != NO_DOMAIN).nonzero()[:, 0].tolist()
    frame = pd.DataFrame({"item": [names[item - 1] for item in offered], "score": table[offered].double().numpy()})
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False)


def _run_scores(
    path: Path, requests: LoggedFeedback | Requests, fingerprint: str | None, data_root: Path | None
) -> HistoryScores:
    experiment, data, model = open_for(path, fingerprint, data_root)
    return history_reader(experiment, data, model, requests)


def _public(source: FeedbackSource) -> Opened:
    return Opened(source.log, source.catalog, source.raw_items, None)


def _catalog_of(log: LoggedFeedback) -> Catalog:
    """The catalogue of a file without one: an item belongs to the domain that it was shown in.

    An item that was never shown belongs to none. Raises DataError for an item that was shown in two.
    """
    domain = torch.full((log.num_items + 1,), NO_DOMAIN, dtype=torch.int64)
    items, asked = torch.from_numpy(log.items), torch.from_numpy(log.domain)[:, None]
    domain[items] = asked.expand_as(items)
    if (domain[items] != asked).any():
        item = int(items[domain[items] != asked][0])
        raise DataError(f"item {item} was shown in two domains; give items of different domains ids of their own")
    return Catalog(log.domain_names, domain, torch.zeros(log.num_items + 1, dtype=torch.int64))
