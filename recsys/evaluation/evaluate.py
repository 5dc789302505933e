"""From a scorer and the targets of a split to a table of ranks."""

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from recsys.evaluation.coverage import Coverage
from recsys.evaluation.draws import NegativesHash, draw_negatives
from recsys.evaluation.metrics import metric_key
from recsys.evaluation.protocols import PROTOCOLS, ProtocolName, RankingProtocol, positions
from recsys.evaluation.rank import RankInterval, Ties, cross_entropy, hide, rank, rank_sampled
from recsys.evaluation.ranks import RANKS_SCHEMA, RanksInfo, Seen, Split, ranks_table
from recsys.evaluation.scorer import DotScorer
from recsys.evaluation.search import cached_rows
from recsys.evaluation.targets import EvalBatch, Targets
from recsys.loading import Config, ConfigError
from recsys.types import Catalog, HasThreads, Scorer

_ROWS = 512
"""Targets scored at a time: more make no product faster, and need more memory."""


class EvalConfig(Config):
    """How a run is ranked and how sure its numbers are."""

    protocols: Annotated[tuple[ProtocolName, ...], Field(min_length=1)] = ("full",)
    ks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (5, 10, 20)
    seen: Seen = "history"
    """Items of the user's history leave the full rankings (`history`) or stay (`none`). The target always stays."""
    ties: Ties = "average"
    scores: Literal["fp32", "bf16"] = "fp32"
    """bf16 rounds the scores before they are ranked: what ranking in that precision would make of the numbers."""
    bootstrap_samples: Annotated[int, Field(ge=1)] = 1000
    permutations: Annotated[int, Field(ge=1)] = 10_000
    """Sign flips of a permutation test; few users are enumerated instead."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of negatives, bootstrap and permutations; not the run's seed, so that runs meet the same negatives."""
    batch_size: Annotated[int, Field(ge=1)] = 512

    @field_validator("protocols", "ks")
    @classmethod
    def _no_repeats(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values):
            raise ValueError("an entry stands twice; keep one of them")
        return values


@dataclass(frozen=True)
class DomainCounts:
    """What was evaluated in one domain."""

    candidates: int
    cold_candidates: int
    """Items of the domain without a training event; they are candidates all the same."""
    users: int
    targets: int
    cold_targets: int
    repeated_targets: int
    """Targets that occur in their user's own history."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`. Values and intervals come from `summarize(evaluation.ranks, config)`."""

    ranks: pa.Table
    """As `RANKS_SCHEMA`; its `RanksInfo` holds the hashes of split and negatives."""
    coverage: dict[str, float]
    """Per domain and macro, for the protocols that rank a whole pool; keys as in `metric_key`."""
    counts: dict[str, DomainCounts]


def evaluate(
    scorer: Scorer,
    batches: Iterable[EvalBatch],
    catalog: Catalog,
    config: EvalConfig,
    *,
    split: Split,
    split_hash: str,
) -> Evaluation:
    """Rank every target under every protocol of `config`.

    Nothing depends on how the targets are batched or ordered, as far as the scorer's scores do not.
    Raises NonFiniteScores if a candidate's score is NaN or infinite, ValueError if there are no targets, ConfigError
    for a protocol by threads and a model without.
    """
    if reserved := {"macro", "micro"}.intersection(catalog.domain_names):
        raise ValueError(f"a domain cannot be called {reserved.pop()!r}, which names a mean over domains; rename it")
    protocols = [PROTOCOLS[name] for name in config.protocols]
    for protocol in protocols:
        if protocol.by_thread and not _has_threads(scorer):
            raise ConfigError(
                f"protocol {protocol.name}: it draws other candidates for each thread of a model and adds up the "
                "scores of different items, and this model has a single thread; use uni_100, which ranks the same "
                "number of candidates as they are"
            )
    pieces: list[pa.Table] = []
    hashes: dict[tuple[str, int], NegativesHash] = {}
    coverage: dict[tuple[str, int], Coverage] = {}
    repeated: Counter[int] = Counter()
    with torch.no_grad():
        for targets in _chunks(batches):
            catalog = _on_device_of(targets.target, catalog)
            repeated[targets.domain] += int((targets.seen == targets.target[:, None]).any(1).sum())
            pools = _pools(protocols, catalog, targets.domain)
            items = pools[0] if all(pool is pools[0] for pool in pools) else torch.cat(pools).unique()
            scores = scorer.scores(targets.batch, items)  # once for all protocols
            if config.scores == "bf16":
                scores = scores.bfloat16().float()
            for protocol, pool in zip(protocols, pools, strict=True):
                columns = None if len(pool) == len(items) else torch.searchsorted(items, pool)
                key = (protocol.name, targets.domain)
                if protocol.negatives is None:
                    of_pool = scores if columns is None else scores[:, columns]
                    covered = coverage.setdefault(key, Coverage(len(pool), config.ks))
                    ranks, loss = _rank_pool(of_pool, pool, targets, catalog, config.seen, covered)
                elif protocol.by_thread:
                    assert isinstance(scorer, DotScorer)
                    parts = scorer.thread_scores(targets.batch, pool)
                    draws = [
                        draw_negatives(protocol.negatives, pool, catalog, targets, config.seed, thread)
                        for thread in range(len(parts))
                    ]
                    hashes.setdefault(key, NegativesHash()).update(targets, pool[torch.cat(draws, dim=1)])
                    ranks, loss = _rank_by_thread(parts, draws, pool, targets, protocol), None
                else:
                    negatives = draw_negatives(protocol.negatives, pool, catalog, targets, config.seed)
                    hashes.setdefault(key, NegativesHash()).update(targets, pool[negatives])
                    target_column = torch.searchsorted(items, targets.target.contiguous())
                    drawn = negatives if columns is None else columns[negatives]
                    ranks = rank_sampled(scores, target_column, drawn, targets.user, protocol.margin)
                    loss = None
                pieces.append(_piece(protocol.name, targets, catalog, ranks, loss))
    if not pieces:
        raise ValueError(f"the {split} split has no targets to evaluate; choose another split or more data")
    negatives_hashes: dict[str, dict[str, str]] = {}
    for (name, domain), value in sorted(hashes.items(), key=operator.itemgetter(0)):
        negatives_hashes.setdefault(name, {})[catalog.domain_names[domain]] = value.hexdigest()
    table = ranks_table(pieces, RanksInfo(split, split_hash, config.seen, negatives_hashes))
    return Evaluation(table, _coverage(coverage, catalog, config.ks, split), _counts(table, repeated, catalog))


def rank_full(
    scorer: Scorer, targets: EvalBatch, catalog: Catalog, seen: Seen
) -> tuple[RankInterval, Float[Tensor, " batch"]]:
    """Ranks and cross-entropies of one batch under the protocol `full`, for validation during training."""
    found = []
    with torch.no_grad():
        for chunk in _chunks([targets]):
            (pool,) = _pools([PROTOCOLS["full"]], catalog, chunk.domain)
            found.append(_rank_pool(scorer.scores(chunk.batch, pool), pool, chunk, catalog, seen))
    return RankInterval.concatenate([ranks for ranks, _ in found]), torch.cat([loss for _, loss in found])


def _has_threads(scorer: Scorer) -> bool:
    return isinstance(scorer, DotScorer) and isinstance(scorer.model, HasThreads)


def _rank_by_thread(
    parts: Float[Tensor, "threads batch pool"],
    draws: Sequence[Int[Tensor, "batch negatives"]],
    pool: Int[Tensor, " pool"],
    targets: Targets,
    protocol: RankingProtocol,
) -> RankInterval:
    """Ranks among negatives whose score adds up what the threads give to the items that each of them has drawn."""
    target_column = torch.searchsorted(pool, targets.target.contiguous())
    target = parts.sum(0).gather(1, target_column[:, None])
    rivals = torch.stack([part.gather(1, draw) for part, draw in zip(parts, draws, strict=True)]).sum(0)
    columns = torch.arange(1, 1 + rivals.shape[1], device=pool.device)
    negatives = columns.where(draws[0] != target_column[:, None], 0)  # rows with fewer are filled up, in every draw
    return rank_sampled(
        torch.cat([target, rivals], dim=1), torch.zeros_like(target_column), negatives, targets.user, protocol.margin
    )


def _rank_pool(
    scores: Float[Tensor, "batch candidates"],
    pool: Int[Tensor, " candidates"],
    targets: Targets,
    catalog: Catalog,
    seen: Seen,
    coverage: Coverage | None = None,
) -> tuple[RankInterval, Float[Tensor, " batch"]]:
    """Ranks and cross-entropies of some targets among a whole pool; `coverage` gets their lists."""
    target_index = torch.searchsorted(pool, targets.target.contiguous())
    excluded = None
    if seen == "history":
        places = positions(pool, catalog)[targets.seen]
        excluded = places.where(places < len(pool), target_index[:, None])
    found = []
    for rows in cached_rows(scores):
        of_rows = None if excluded is None else excluded[rows]
        visible = hide(scores[rows], target_index[rows], of_rows, targets.user[rows])
        if coverage is not None:
            coverage.update(visible)
        found.append((rank(visible, target_index[rows]), cross_entropy(visible, target_index[rows])))
    return RankInterval.concatenate([ranks for ranks, _ in found]), torch.cat([loss for _, loss in found])


def _pools(protocols: Sequence[RankingProtocol], catalog: Catalog, domain: int) -> list[Int[Tensor, " candidates"]]:
    with torch.inference_mode(False):  # the catalogue keeps what it is asked for, and training uses it too
        return [protocol.pool(catalog, domain) for protocol in protocols]


def _chunks(batches: Iterable[EvalBatch]) -> Iterator[Targets]:
    """The batches cut into at most `_ROWS` rows."""
    for whole in batches:
        for start in range(0, len(whole.history), _ROWS):
            yield _cut(whole, slice(start, start + _ROWS))


def _cut(whole: EvalBatch, rows: slice) -> Targets:
    return Targets(whole.batch.map(lambda tensor: tensor[rows]), whole.seen[rows], whole.history[rows])


def _on_device_of(tensor: Tensor, catalog: Catalog) -> Catalog:
    return catalog if catalog.item_domain.device == tensor.device else catalog.to(tensor.device)


def _piece(
    protocol: str, targets: Targets, catalog: Catalog, ranks: RankInterval, loss: Float[Tensor, " batch"] | None
) -> pa.Table:
    count = len(targets.history)
    columns: list[str | Tensor | None] = [
        protocol,
        targets.user,
        catalog.domain_names[targets.domain],
        targets.target,
        targets.history,
        ranks.greater,
        ranks.ties,
        ranks.candidates,
        loss,
    ]
    arrays = [
        pa.array(column.cpu().numpy()).cast(field.type)
        if isinstance(column, Tensor)
        else pa.repeat(pa.scalar(column, field.type), count)
        for column, field in zip(columns, RANKS_SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=RANKS_SCHEMA)


def _coverage(
    coverage: Mapping[tuple[str, int], Coverage], catalog: Catalog, ks: Sequence[int], split: Split
) -> dict[str, float]:
    values: dict[str, float] = {}
    for protocol in dict.fromkeys(name for name, _ in coverage):
        shares = {domain: coverage[name, domain].shares() for name, domain in sorted(coverage) if name == protocol}
        for place, k in enumerate(ks):
            at_k = {domain: share[place] for domain, share in shares.items()}
            for domain, share in at_k.items():
                values[metric_key(split, catalog.domain_names[domain], f"coverage@{k}", protocol)] = share
            macro = sum(at_k.values()) / len(at_k)
            values[metric_key(split, "macro", f"coverage@{k}", protocol)] = macro
    return values


def _counts(ranks: pa.Table, repeated: Counter[int], catalog: Catalog) -> dict[str, DomainCounts]:
    first = ranks.filter(pc.equal(ranks["protocol"], ranks["protocol"][0]))
    cold = catalog.train_counts.cpu() == 0
    counts = {}
    for domain in sorted(repeated):
        name = catalog.domain_names[domain]
        rows = first.filter(pc.equal(first["domain"], name))
        items = catalog.items_of(domain).cpu()
        counts[name] = DomainCounts(
            candidates=len(items),
            cold_candidates=int(cold[items].sum()),
            users=pc.count_distinct(rows["user"]).as_py(),
            targets=len(rows),
            cold_targets=int(cold[torch.tensor(rows["target"].to_pylist())].sum()),
            repeated_targets=repeated[domain],
        )
    return counts
