"""What estimators read: a few numbers per request, gathered without ever holding the scores of all requests."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from recsys.data.schema import SHOWN, DataError, bad_lines
from recsys.offpolicy.candidates import Candidate
from recsys.offpolicy.feedback import LoggedFeedback
from recsys.offpolicy.policies import marginals
from recsys.offpolicy.rewards import RewardModel
from recsys.types import Catalog

_CELLS = 2_000_000
"""Scores held at a time: so few that what they are turned into is allocated from memory that was in use before."""


@dataclass(frozen=True)
class Smoothed:
    """Sums over all candidates that the bound of exponential smoothing needs, per request."""

    overlap: Float64[np.ndarray, " requests"]
    """Σ_a π(a|x) π0(a|x)^(1-α)."""
    spread: Float64[np.ndarray, " requests"]
    """Σ_a π(a|x) π0(a|x)^(1-2α)."""


@dataclass(frozen=True)
class Evidence:
    """n requests with L slots, seen from one target policy. What was not asked for, or cannot be known, is None."""

    user: Int64[np.ndarray, " requests"]
    reward: Float64[np.ndarray, "requests slots"]
    propensity: Float64[np.ndarray, "requests slots"]
    """Of the logging policy, for each shown item given those above it."""
    target: Float64[np.ndarray, "requests slots"]
    """The same of the target policy; 0 where it would never show the item there."""
    unsupported: Float64[np.ndarray, " requests"]
    """Probability that the target puts on top what the log cannot show (or, without a logging policy, never showed)."""
    support_known: bool
    """Whether `unsupported` comes from the logging policy itself."""
    direct: Float64[np.ndarray, "requests slots"] | None = None
    """Σ_a π(a | those above) q̂(a): the model's value of a slot and those below, under the target policy."""
    predicted: Float64[np.ndarray, "requests slots"] | None = None
    """q̂ of the shown item."""
    marginal: Float64[np.ndarray, "requests slots"] | None = None
    """Probability of the shown item at its position under the logging policy, whatever stands above it."""
    target_marginal: Float64[np.ndarray, "requests slots"] | None = None
    group: Float64[np.ndarray, " requests"] | None = None
    """Probability under the logging policy that an item of the shown item's group is drawn (slates of one)."""
    target_group: Float64[np.ndarray, " requests"] | None = None
    smoothed: Mapping[float, Smoothed] = field(default_factory=dict)
    """By α."""

    def take(self, rows: Int64[np.ndarray, " chosen"]) -> "Evidence":
        """The evidence of some of the requests."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        smoothed = {alpha: Smoothed(sums.overlap[rows], sums.spread[rows]) for alpha, sums in self.smoothed.items()}
        return replace(self, **columns, smoothed=smoothed)

    @property
    def slots(self) -> int:
        return self.reward.shape[1]

    @property
    def weights(self) -> Float64[np.ndarray, " requests"]:
        """Target over logging probability of the whole slate."""
        return self.cascade_weights[:, -1]

    @property
    def cascade_weights(self) -> Float64[np.ndarray, "requests slots"]:
        """The same of the slate down to each slot."""
        return (self.target / self.propensity).cumprod(1)

    @property
    def total(self) -> Float64[np.ndarray, " requests"]:
        """Reward of the whole slate."""
        return self.reward.sum(1)


def gather(
    log: LoggedFeedback,
    candidate: Candidate,
    catalog: Catalog,
    reward: Float64[np.ndarray, "requests slots"],
    *,
    reward_model: RewardModel | None = None,
    logging: Candidate | None = None,
    groups: Int[Tensor, " items"] | None = None,
    alphas: tuple[float, ...] = (),
    marginal_draws: int | None = None,
    generator: torch.Generator | None = None,
) -> Evidence:
    """The evidence of a log about a candidate, some requests at a time.

    `logging` is the policy that made the log, where it is known: it makes the support gap exact, and `groups` (of each
    item id) and `alphas` need it. `marginal_draws` asks for the target's probabilities by position, drawn with
    `generator`. Raises DataError for a shown item that is no candidate and for scores that are not numbers.
    """
    if log.num_items != catalog.num_items or log.domain_names != catalog.domain_names:
        raise DataError(
            f"the log speaks of {log.num_items:,} items in {', '.join(log.domain_names)}, the catalogue of "
            f"{catalog.num_items:,} in {', '.join(catalog.domain_names)}; take the catalogue that the log was made with"
        )
    _refuse_foreign(log, catalog)
    assert logging is not None or (groups is None and not alphas)
    assert marginal_draws is None or generator is not None
    n, slots = log.items.shape
    columns: dict[str, np.ndarray] = {}
    smoothed = {alpha: Smoothed(np.empty(n), np.empty(n)) for alpha in alphas}
    never_shown = [
        ~np.isin(catalog.items_of(d).numpy(), log.items[log.domain == d]) for d in range(catalog.num_domains)
    ]

    def put(name: str, rows: Int64[np.ndarray, " batch"], values: Float[Tensor, "batch *slots"]) -> None:
        if name not in columns:
            columns[name] = np.empty((n, *values.shape[1:]))
        columns[name][rows] = values.numpy()

    for domain, rows in chunks(log.domain, catalog):
        items = catalog.items_of(domain)
        requests = torch.from_numpy(rows)
        shown = torch.from_numpy(log.items[rows])
        slates = catalog.local_index[shown]
        scores = finite_scores(candidate, requests, items)
        top = candidate.policy.next(scores, slates[:, :0])
        target = top.gather(1, slates) if slots == 1 else candidate.policy.log_probs(scores, slates).exp()
        put("target", rows, target)
        if logging is None:
            put("unsupported", rows, top @ torch.from_numpy(never_shown[domain]).double())
        else:
            logged = logging.policy.next(finite_scores(logging, requests, items), slates[:, :0])
            possible = top.masked_fill(logged == 0, 0.0)
            put("unsupported", rows, (top - possible).sum(1))
            for alpha, sums in smoothed.items():
                sums.overlap[rows] = (possible * logged.pow(1 - alpha)).sum(1).numpy()
                # what is possible has a probability, and what has none must not become 0 · ∞
                sums.spread[rows] = (possible * logged.clamp(min=1e-300).pow(1 - 2 * alpha)).sum(1).numpy()
            if groups is not None:
                same = groups[items] == groups[shown[:, :1]]
                put("group", rows, (logged * same).sum(1))
                put("target_group", rows, (top * same).sum(1))
        if reward_model is not None:
            direct, predicted = [], []
            for slot in range(slots):
                following = top if slot == 0 else candidate.policy.next(scores, slates[:, :slot])
                values = reward_model.predict(requests, slot, items).double()
                direct.append((following * values).sum(1))
                predicted.append(values.gather(1, slates[:, [slot]])[:, 0])
            put("direct", rows, torch.stack(direct, dim=1))
            put("predicted", rows, torch.stack(predicted, dim=1))
        if slots == 1:
            put("target_marginal", rows, target)
        elif marginal_draws is not None and generator is not None:
            put("target_marginal", rows, marginals(candidate.policy, scores, slates, marginal_draws, generator))
    return Evidence(
        user=log.user,
        reward=reward,
        propensity=log.propensity,
        marginal=log.marginal,
        support_known=logging is not None,
        smoothed=smoothed,
        **columns,
    )


def chunks(
    asked: Int64[np.ndarray, " requests"], catalog: Catalog
) -> Iterator[tuple[int, Int64[np.ndarray, " batch"]]]:
    """Domain and rows of requests by the domain they ask for, as many at a time as memory allows."""
    for domain in range(catalog.num_domains):
        rows = np.flatnonzero(asked == domain)
        step = max(1, _CELLS // max(1, len(catalog.items_of(domain))))
        for start in range(0, len(rows), step):
            yield domain, rows[start : start + step]


def finite_scores(
    candidate: Candidate, requests: Int[Tensor, " batch"], items: Int[Tensor, " candidates"]
) -> Float[Tensor, "batch candidates"]:
    """Raises DataError for scores that are NaN or ∞; -∞ bars an item."""
    scores = candidate.scores(requests, items).detach()
    wrong: Bool[Tensor, "batch candidates"] = scores.isnan() | (scores == torch.inf)
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0, 0])
        raise DataError(
            f"{candidate.name} gives no finite score to {int(wrong[row].sum()):,} items in row {int(requests[row])} of "
            "the log; evaluate a model that has not diverged"
        )
    return scores


def _refuse_foreign(log: LoggedFeedback, catalog: Catalog) -> None:
    foreign = catalog.item_domain.numpy()[log.items] != log.domain[:, None]
    if foreign.any():
        rows, slots = np.nonzero(foreign)
        lines = [
            f"request {log.request[row]} asks for {log.domain_names[log.domain[row]]} and shows item "
            f"{log.items[row, slot]}, which is not of that domain"
            for row, slot in zip(rows[:SHOWN], slots[:SHOWN], strict=True)
        ]
        raise bad_lines("logged feedback", lines, len(rows), "Correct the domains of the log or of the catalogue.")
