"""Synthetic behaviour with a planted truth: how much one domain's history tells about the next item of another.

A user has one interest per domain at a time. Interests are the dimensions of the items' latent vectors: the first
`shared_interests` mean the same in every domain, the others are private to their domain. At each event in domain k

1. with probability `drift` the user's interest in k becomes a new one, uniformly over all interests;
2. else, with probability `transfer`, it becomes the interest last shown in another domain, if both that one and the
   one held in k are shared (a private interest neither leaves its domain nor gives way to another one's);
3. else it stays;

and the user takes an item i of k not taken before with probability proportional to appeal(i | interest), where
appeal = a · b_i · exp(vector_i[interest] / temperature), scaled so that its mean over the interests is Zipf's law.

When the user acts, and in which domain, is drawn apart from all this. So at `transfer` 0 the domains are independent
processes: given the own domain's history, the other domains' history tells exactly nothing about the next item. At
every dial the interest of an event is uniform and held against as much drift, so neither popularity nor how well the
whole history tells the next item changes much. And this is a hidden Markov model: the best predictor from what can be
observed is known exactly, with the other domains' items and without them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator

from recsys.data.schema import MAX_DOMAINS
from recsys.data.sequences import Sequences
from recsys.loading import Config

_START = 1_388_534_400
"""2014-01-01 in UTC."""
_YEAR = 31_536_000

_CELLS = 1 << 22
"""Numbers held at once where a step works on whole rows."""

_LEFT = 1e-9
"""Least appeal that is taken to be left: below it the difference that gives it is rounding."""

Share = Annotated[float, Field(ge=0, le=1)]


class SyntheticConfig(Config):
    """The size of the data and the law they follow (see the module)."""

    name: Literal["synthetic"] = "synthetic"
    num_users: int = Field(2000, ge=1)
    num_domains: int = Field(2, ge=1, le=MAX_DOMAINS)
    items_per_domain: int = Field(500, ge=2)
    min_events: int = Field(10, ge=1)
    """Fewest events of a user, all domains together."""
    mean_events: float = Field(30, ge=1)
    max_events: int = Field(100, ge=1)
    overlap: Share = 0.8
    """Share of users who are active in more than one domain (2 to all of them); nobody is where there is only one."""
    zipf: float = Field(0.8, ge=0)
    """Within a domain the r-th most popular item is drawn in proportion to 1 / r^zipf."""
    shared_interests: int = Field(20, ge=1)
    private_interests: int = Field(4, ge=0)
    """Per domain."""
    temperature: float = Field(0.2, ge=0.05)
    """Lower makes an interest choose among fewer items."""
    drift: Share = 0.25
    """Chance of a new interest at an event."""
    transfer: Share = 0.8
    """The dial: 0 and the other domains tell nothing, 1 and a shared interest follows the other domains."""
    tied: Share = 0.0
    """Share of events with the timestamp of the user's event before, a user's first event aside."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "SyntheticConfig":
        if not self.min_events <= self.mean_events <= self.max_events:
            raise ValueError(
                f"min_events, mean_events and max_events are {self.min_events}, {self.mean_events:g} and "
                f"{self.max_events}; put them in ascending order"
            )
        if self.items_per_domain <= self.max_events:
            raise ValueError(
                f"items_per_domain is {self.items_per_domain}, but nobody takes an item twice and a user may have "
                f"{self.max_events} events; raise items_per_domain above max_events"
            )
        if self.num_domains > 1 and self.overlap > 0 and self.min_events < 2:
            raise ValueError("min_events is 1, but a user who is active in two domains has two events; raise it to 2")
        return self

    @property
    def num_interests(self) -> int:
        """Interests that a domain knows: dimensions of the item vectors."""
        return self.shared_interests + self.private_interests

    def sequences(self, data_root: Path | None) -> Sequences:
        """The data alone; `data_root` is not used, since nothing is read."""
        return generate(self).sequences


@dataclass(frozen=True)
class Truth:
    """What the data do not show, and the best predictions that can be made from what they do show."""

    config: SyntheticConfig
    sequences: Sequences
    item_vectors: Float[np.ndarray, "items interests"]
    """Row per item id (zeros at padding). The private dimensions of two domains have nothing to do with each other."""
    appeal: Float[np.ndarray, "items interests"]
    """P(item | interest) for a user who has taken nothing yet: columns sum to 1 over the items of each domain."""
    interests: Int[np.ndarray, " events"]
    """The interest behind each event."""

    def log_probs(self, positions: Int[np.ndarray, " rows"], *, others: bool) -> Float[np.ndarray, "rows items"]:
        """log P(item of the event | everything before it) for the events at the given packed positions.

        With `others` this is the law of the data. `others=False` hides which items were taken in other domains than
        the event's own, and sums over them: the best that can be done with the own domain's history (that the user
        acted elsewhere, and when, is known in both cases). A column per item id; -inf outside the event's domain and
        for what the user has taken. Raises ValueError for users active in so many domains that the joint
        distribution of their interests cannot be held.
        """
        belief, left = self._predict(positions, others)
        probs = (belief / left) @ self.appeal.T
        probs[self.sequences.item_domain != self.sequences.domains[positions][:, None]] = 0
        row, past = _earlier(self.sequences, positions)
        probs[row, self.sequences.items[past]] = 0
        with np.errstate(divide="ignore"):
            return np.log(probs)

    def _predict(
        self, positions: Int[np.ndarray, " rows"], others: bool
    ) -> tuple[Float[np.ndarray, "rows interests"], Float[np.ndarray, "rows interests"]]:
        """The belief about each event's interest, and the appeal (per interest) of what the user has not taken yet."""
        domains = self.sequences.domains
        belief, left = np.empty((2, len(positions), self.config.num_interests))
        if others:
            runs = [(np.arange(len(positions)), np.ones(len(domains), dtype=bool))]
        else:
            asked = domains[positions]
            runs = [(np.flatnonzero(asked == domain), domains == domain) for domain in np.unique(asked)]
        for rows, heard in runs:
            belief[rows], left[rows] = self._filter(positions[rows], heard)
        return belief, left

    def _filter(
        self, positions: Int[np.ndarray, " rows"], heard: Bool[np.ndarray, " events"]
    ) -> tuple[Float[np.ndarray, "rows interests"], Float[np.ndarray, "rows interests"]]:
        """The forward algorithm over the joint interests of a user's domains; events not `heard` hide their item."""
        sequences = self.sequences
        wanted, inverse = np.unique(positions, return_inverse=True)
        stop = np.zeros(sequences.num_users, dtype=np.int64)
        np.maximum.at(stop, np.searchsorted(sequences.offsets, wanted, side="right") - 1, wanted + 1)
        active = np.zeros((sequences.num_users, sequences.num_domains), dtype=bool)
        active[sequences.event_users(), sequences.domains] = True
        users = np.flatnonzero(stop)
        elsewhere = _last_elsewhere(sequences.offsets, sequences.domains)
        belief, left = np.empty((2, len(wanted), self.config.num_interests))
        for pattern in np.unique(active[users], axis=0):
            axes = np.flatnonzero(pattern)
            cells = self.config.num_interests ** len(axes)
            if cells > _CELLS:
                raise ValueError(
                    f"a user is active in {len(axes)} domains, and {self.config.num_interests} interests in each make "
                    f"{cells:,} joint states; the truth can be asked for where they are up to {_CELLS:,}"
                )
            same = users[(active[users] == pattern).all(axis=1)]
            for group in np.array_split(same, -(-len(same) * cells // _CELLS)):
                for at, prior, rest in self._forward(group, stop[group], axes, elsewhere, heard):
                    slot = np.searchsorted(wanted, at)
                    hit = wanted[np.minimum(slot, len(wanted) - 1)] == at
                    belief[slot[hit]], left[slot[hit]] = prior[hit], rest[hit]
        return belief[inverse], left[inverse]

    def _forward(
        self,
        users: Int[np.ndarray, " users"],
        stop: Int[np.ndarray, " users"],
        axes: Int[np.ndarray, " axes"],
        elsewhere: Int[np.ndarray, " events"],
        heard: Bool[np.ndarray, " events"],
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Event by event up to `stop`: positions, the beliefs before their items are known, and the appeal left.

        `axes` are the domains the users are active in; the joint belief has an axis of interests for each.
        """
        sequences, size = self.sequences, self.config.num_interests
        axis_of = {domain: axis for axis, domain in enumerate(axes.tolist())}
        joint = np.full((len(users), *[size] * len(axes)), float(size) ** -len(axes))
        taken = np.zeros((len(users), len(axes), size))
        start = sequences.offsets[users]
        for step in range(int((stop - start).max())):
            live = np.flatnonzero(start + step < stop)
            at = start[live] + step
            kinds = np.stack([sequences.domains[at], elsewhere[at]], axis=1)
            for kind in np.unique(kinds, axis=0):
                chosen = (kinds == kind).all(axis=1)
                rows, position = live[chosen], at[chosen]
                involved = [axis_of[domain] for domain in kind.tolist() if domain >= 0]  # own, and the one to adopt
                source, front = [axis + 1 for axis in involved], list(range(1, 1 + len(involved)))
                moved = np.moveaxis(joint[rows], source, front)
                after = self._change(moved.reshape(len(rows), size, -1), adopts=len(involved) == 2)
                prior = after.sum(axis=2)
                rest = np.maximum(1 - taken[rows, involved[0]], _LEFT)
                yield position, prior, rest

                known = heard[position]
                appeal = self.appeal[sequences.items[position]]
                after *= np.where(known[:, None], appeal / rest, 1.0)[:, :, None]
                after /= after.sum(axis=(1, 2), keepdims=True)
                taken[rows[known], involved[0]] += appeal[known]
                joint[rows] = np.moveaxis(after.reshape(moved.shape), front, source)

    def _change(self, joint: Float[np.ndarray, "users interests rest"], adopts: bool) -> np.ndarray:
        """The belief after the change that precedes an event; with `adopts`, `rest` begins with the other's axis."""
        config = self.config
        kept = joint.copy()
        if adopts:
            users, size, _ = joint.shape
            shared = config.shared_interests
            pair = kept.reshape(users, size, size, -1)[:, :shared, :shared]
            moved = pair.sum(axis=1)
            pair *= 1 - config.transfer
            both = np.arange(shared)
            pair[:, both, both] += config.transfer * moved
        kept *= 1 - config.drift
        kept += config.drift * joint.mean(axis=1, keepdims=True)
        return kept


@dataclass(frozen=True)
class Synthetic:
    """Generated data, and the truth behind them."""

    sequences: Sequences
    truth: Truth


def generate(config: SyntheticConfig) -> Synthetic:
    """Data of a config: a pure function of it. Two dials share all their random numbers, times and domains."""
    seeds = np.random.SeedSequence(config.seed).spawn(3)
    catalog, activity, behaviour = (np.random.default_rng(seed) for seed in seeds)
    vectors, appeal = _draw_items(config, catalog)
    offsets, domains, times = _draw_activity(config, activity)
    items, interests = _draw_choices(config, behaviour, appeal, offsets, domains)
    sequences = Sequences.pack(
        items=items,
        domains=domains,
        times=times,
        offsets=offsets,
        domain_names=tuple(f"domain_{index + 1}" for index in range(config.num_domains)),
        item_domain=np.concatenate([[-1], np.repeat(np.arange(config.num_domains), config.items_per_domain)]),
    )
    return Synthetic(sequences, Truth(config, sequences, vectors, appeal, interests))


def _draw_items(config: SyntheticConfig, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and appeal per item id. Popularity has nothing to do with the id or the vector."""
    count = config.items_per_domain
    vectors = np.zeros((1 + config.num_domains * count, config.num_interests))
    vectors[1:] = generator.standard_normal(vectors[1:].shape)
    zipf = np.arange(1, count + 1) ** -config.zipf
    appeal = np.zeros_like(vectors)
    for domain in range(config.num_domains):
        block = slice(1 + domain * count, 1 + (domain + 1) * count)
        popularity = generator.permutation(zipf / zipf.sum())
        appeal[block] = _scaled(np.exp(vectors[block] / config.temperature), popularity)
    return vectors, appeal


def _scaled(
    weights: Float[np.ndarray, "items interests"], popularity: Float[np.ndarray, " items"]
) -> Float[np.ndarray, "items interests"]:
    """Rows and columns scaled until columns sum to 1 and rows have the mean `popularity` (Sinkhorn)."""
    for _ in range(1000):
        weights = weights * (popularity / weights.mean(axis=1))[:, None]
        totals = weights.sum(axis=0)
        weights /= totals
        if np.abs(totals - 1).max() < 1e-12:
            break
    return weights


def _draw_activity(
    config: SyntheticConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who acts when, and in which domain: offsets, domains, times."""
    users = config.num_users
    spread = config.max_events - config.min_events
    extra = np.full(users, config.mean_events - config.min_events)
    if 0 < extra[0] < spread:
        middle = extra[0] / spread
        extra = spread * generator.beta(4 * middle, 4 * (1 - middle), users)
    length = np.rint(config.min_events + extra).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(length)])
    owner = np.repeat(np.arange(users), length)

    ranked = generator.random((users, config.num_domains)).argsort(axis=1)  # the domains of a user come first
    active = np.ones(users, dtype=np.int64)
    if config.num_domains > 1:
        several = generator.permutation(users)[: round(config.overlap * users)]
        active[several] = generator.integers(2, config.num_domains, len(several), endpoint=True)
    active = np.minimum(active, length)
    liking = generator.gamma(2.0, size=ranked.shape)
    liking[np.arange(config.num_domains) >= active[:, None]] = 0
    share = np.cumsum(liking, axis=1)
    share /= share[:, -1:]
    which = (generator.random(len(owner))[:, None] >= share[owner, :-1]).sum(axis=1)
    shuffled = np.lexsort((generator.random(len(owner)), owner))  # each of a user's domains gets an event at least
    order = np.arange(len(owner)) - offsets[owner]
    which[shuffled] = np.where(order < active[owner], order, which[shuffled])
    domains = ranked[owner, which]

    start = _START + generator.integers(0, 2 * _YEAR, users)
    gap = generator.uniform(0.5, 3.0, users)[owner] * _YEAR / length[owner]
    gaps = 1 + np.floor(generator.exponential(gap)).astype(np.int64)
    gaps[generator.random(len(owner)) < config.tied] = 0
    gaps[offsets[:-1]] = 0
    elapsed = np.cumsum(gaps)
    return offsets, domains, start[owner] + elapsed - elapsed[offsets[:-1]][owner]


def _draw_choices(
    config: SyntheticConfig,
    generator: np.random.Generator,
    appeal: Float[np.ndarray, "items interests"],
    offsets: Int[np.ndarray, " boundaries"],
    domains: Int[np.ndarray, " events"],
) -> tuple[np.ndarray, np.ndarray]:
    """Item and interest of every event, step by step over all users at once."""
    events, count, size = len(domains), config.items_per_domain, config.num_interests
    change, choice, second_choice = generator.random((3, events))
    fresh = generator.integers(0, size, events)
    held = generator.integers(0, size, (len(offsets) - 1, config.num_domains))
    elsewhere = _last_elsewhere(offsets, domains)
    # Row `domain * size + interest`: what the interest makes of the domain's items.
    table = appeal[1:].reshape(-1, count, size).swapaxes(1, 2).reshape(-1, count)
    bounds = np.cumsum(table, axis=1)
    bounds = (bounds / bounds[:, -1:] + np.arange(len(bounds))[:, None]).ravel()

    items = np.zeros(events, dtype=np.int32)
    interests = np.zeros(events, dtype=np.int16)
    length = np.diff(offsets)
    longest_first = np.argsort(-length, kind="stable")
    for step in range(int(length.max())):
        users = longest_first[: np.count_nonzero(length > step)]
        at = offsets[users] + step
        domain, other = domains[at], elsewhere[at]
        own, theirs = held[users, domain], held[users, other]
        adopts = (other >= 0) & (np.maximum(own, theirs) < config.shared_interests)
        adopts &= change[at] >= 1 - (1 - config.drift) * config.transfer
        interest = np.where(change[at] < config.drift, fresh[at], np.where(adopts, theirs, own))
        held[users, domain] = interest
        interests[at] = interest

        cell = domain * size + interest
        column = np.searchsorted(bounds, cell + choice[at], side="right") - cell * count
        items[at] = domain * count + np.clip(column, 0, count - 1) + 1
        past = items[offsets[users][:, None] + np.arange(step)]
        again = np.flatnonzero((past == items[at][:, None]).any(axis=1))
        for rows in np.array_split(again, 1 + len(again) * count // _CELLS):
            first = domain[rows] * count + 1
            column = past[rows] - first[:, None]
            column[(column < 0) | (column >= count)] = count
            weights = np.zeros((len(rows), count + 1))
            weights[:, :count] = table[cell[rows]]
            np.put_along_axis(weights, column, 0.0, axis=1)
            reach = np.cumsum(weights[:, :count], axis=1)
            column = (reach <= second_choice[at[rows]][:, None] * reach[:, -1:]).sum(axis=1)
            items[at[rows]] = first + np.minimum(column, count - 1)
    return items, interests


def _last_elsewhere(offsets: Int[np.ndarray, " boundaries"], domains: Int[np.ndarray, " events"]) -> np.ndarray:
    """For each event, the domain of the user's latest earlier event in another domain; -1 where there is none."""
    index = np.arange(len(domains))
    begins = np.zeros(len(domains), dtype=bool)
    begins[offsets[:-1]] = True
    first = np.maximum.accumulate(np.where(begins, index, 0))
    begins[1:] |= domains[1:] != domains[:-1]
    run = np.maximum.accumulate(np.where(begins, index, 0))
    return np.where(run > first, domains[run - 1], -1)


def _earlier(sequences: Sequences, positions: Int[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
    """Row and packed position of every event before each of the given events of its user."""
    start = sequences.offsets[np.searchsorted(sequences.offsets, positions, side="right") - 1]
    length = positions - start
    row = np.repeat(np.arange(len(positions)), length)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length) + start[row]
