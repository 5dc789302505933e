"""LLM4CDSR (Liu et al., SIGIR 2025, arXiv 2504.18383): frozen vectors of the items' texts behind small adapters."""

import math
from collections.abc import Iterable
from itertools import combinations, zip_longest
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.attention import CrossConfig, check_heads
from recsys.models.dropout import Dropout
from recsys.models.embeddings import check_length, event_positions
from recsys.models.encoders import EncoderBlock, causal_mask
from recsys.models.exchange import check_cross, exchange, look, make_units
from recsys.models.initialization import initialize
from recsys.models.streams import cut_streams
from recsys.types import Batch, Catalog, Objective, TrainingEvents


class LLM4CDSRConfig(Config):
    """The defaults are the published ones, the weights of the alignments in this project's units."""

    name: Literal["llm4cdsr"] = "llm4cdsr"
    d_model: Annotated[int, Field(ge=1)] = 128
    """Width of each thread; states and item vectors are twice as wide, a mixed part and one of the domain."""
    d_text: Annotated[int, Field(ge=2)] = 1024
    """Width of the text vectors (`data.text`)."""
    d_ff: Annotated[int, Field(ge=1)] = 128
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Blocks of each thread."""
    num_heads: Annotated[int, Field(ge=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    alpha: Annotated[float, Field(ge=0)] = 0.025
    """Weight of the alignment of items. Published: 0.1 (Amazon Cloth–Sport), 1 (Electronics–Phone), 0.1 (Douban),
    beside a BCE that adds up the target, the negative and both domains: four times the mean that BCE is here."""
    beta: Annotated[float, Field(ge=0)] = 0.025
    """Weight of the alignment of users with their profiles; published as `alpha` is."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of both alignments (published as tau)."""
    num_clusters: Annotated[int, Field(ge=1)] = 10
    """Clusters of items that a user's history is divided into for the profile."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: LLM4CDSR as published, which has none."""

    @model_validator(mode="after")
    def _check(self) -> "LLM4CDSRConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, self.num_layers)
        if self.d_model > self.d_text:
            raise ValueError(
                f"d_model = {self.d_model} exceeds d_text = {self.d_text}, of which it is a projection; lower d_model"
            )
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "LLM4CDSR":
        return LLM4CDSR(self, catalog, max_len, generator)


class LLM4CDSR(nn.Module):
    """Threads s: the merged history and one per domain, each with its own encoder and positions. With the text vector
    v_i of an item i, which is never trained,

        e(i)   = W2 (W1 v_i + b1) + b2                   no nonlinearity; d_text -> d_text / 2 -> d_model
        e_k(i) = the first d_model principal coordinates of v_i among the items of its domain k, not trained
        f      = Encoder(sqrt(d_model) e(i_t) + position)            over the merged history
        f_k    = Encoder_k(sqrt(d_model) e_k(i_t) + position_k)      over the events of k
        score(i) = f e(i) + f_k e_k(i)

    where k is asked for: hidden = [f; f_k] and the item's vector is [e(i); e_k(i)], so both threads score the same
    item. f_k is that of k's latest event up to t, 0 where k has none yet. Training adds to the run's loss (BCE with one
    negative as published)

        alpha L(X, Y)      X, Y: e of one random event of each user in one domain, and in another; the mean over pairs
                           of domains, each over the users who have both
        beta  L(F, U)      F: the users' last f;  U = W4 (W3 profile_u + b3) + b4
        L(X, Y) = 1/2 [CE(X Y^T / tau, P) + CE(Y X^T / tau, P)],   P = softmax(tau (X X^T + Y Y^T) / 2)

    with nothing flowing back through the targets P (they are symmetric but for the softmax, whose rows serve both
    directions).

    Apart from the paper: attention is causal and padding is no key (the released code has neither, so that its states
    see their own targets); both threads score the same candidates (`llm4cdsr_100_compat` has the published
    evaluation); and the blocks are the pre-norm ones of this project. The text vectors and the profile are
    reconstructions, as no language model is at hand. Published, one summarises the titles of each of 10 clusters of
    the history, summarises these, and the result is embedded. Here profile_u = sum_c a_c m_c, where m_c is the mean
    text vector of the user's TRAIN events in cluster c of the items (k-means) and a = softmax_c(q m_c / sqrt(d_text)) a
    learned attention over the clusters that the user has events in.

    With an exchange (not part of LLM4CDSR) each domain's states query the other domains' states between embedding and
    encoder (`early`) or after blocks (`stack`) of the domains' threads; a question then has a state of its own, as in
    `CrossDomain`.
    """

    text: Tensor
    local: Tensor
    cluster: Tensor
    history: Tensor
    history_offsets: Tensor
    item_domain: Tensor

    def __init__(
        self, config: LLM4CDSRConfig, catalog: Catalog, max_len: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        d_model, num_domains = config.d_model, catalog.num_domains
        self.max_len = max_len
        self.num_domains = num_domains
        self.d_model = d_model
        self.alpha = config.alpha
        self.beta = config.beta
        self.temperature = config.temperature
        self.num_clusters = config.num_clusters
        self.adapter = Adapter(config.d_text, d_model)
        self.profile = ProfileAttention(config.d_text)
        self.profile_adapter = Adapter(config.d_text, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        self.own_positions = nn.ModuleList(nn.Embedding(max_len + 1, d_model) for _ in range(num_domains))
        self.dropout = Dropout(config.dropout)

        def block() -> EncoderBlock:
            return EncoderBlock(
                d_model=d_model,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                dropout=config.dropout,
                activation="relu",
                norm_first=True,
            )

        self.blocks = nn.ModuleList(block() for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.own_layers = nn.ModuleList(
            nn.ModuleList(block() for _ in range(num_domains)) for _ in range(config.num_layers)
        )
        self.own_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_domains))
        initialize(self, generator)
        self.early, self.stack = make_units(config.cross, num_domains, d_model, generator)

        rows = catalog.num_items + 1
        self.register_buffer("text", torch.zeros(rows, config.d_text), persistent=False)
        self.register_buffer("local", torch.zeros(rows, d_model), persistent=False)
        self.register_buffer("cluster", torch.zeros(rows, dtype=torch.int64), persistent=False)
        self.register_buffer("history", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("history_offsets", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("item_domain", catalog.item_domain, persistent=False)

    @property
    def threads(self) -> tuple[int, int]:
        """Widths of the mixed and of the domain's part of `hidden` and of the item vectors."""
        return self.d_model, self.d_model

    def fit(self, events: TrainingEvents) -> None:
        """Take the text vectors, make the domains' tables and the clusters of them, and remember the training events.

        Raises ValueError where there are no text vectors, or of another width.
        """
        if events.text is None:
            raise ValueError("llm4cdsr reads the items' texts; add `text: {name: tfidf}` to data")
        if events.text.shape != self.text.shape:
            raise ValueError(
                f"model.d_text is {self.text.shape[1]} and the text vectors have {events.text.shape[1]} numbers; "
                f"set model.d_text to {events.text.shape[1]}, or data.text.d_text to {self.text.shape[1]}"
            )
        text = events.text.cpu()
        domain = self.item_domain.cpu()
        known = text.any(dim=1)
        local = torch.zeros(self.local.shape, dtype=text.dtype)
        for index in range(self.num_domains):
            members = known & (domain == index)
            local[members] = _principal_coordinates(text[members], self.d_model)
        cluster = torch.zeros_like(domain)
        if known.any():
            cluster[known] = _k_means(text[known], self.num_clusters, torch.Generator().manual_seed(0))
        self.text = text.to(self.text)
        self.local = local.to(self.local)
        self.cluster = cluster.to(self.cluster.device)
        self.history = events.items.to(self.history.device)
        self.history_offsets = events.offsets.to(self.history_offsets.device)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        return torch.cat([self._mixed(batch), self._own(batch)], dim=-1)

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return torch.cat([self.adapter(self.text), self.local], dim=1)

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        hidden = self(batch)
        terms = {
            "item_alignment": self.alpha * self._item_alignment(batch, generator),
            "user_alignment": self.beta * self._user_alignment(batch, hidden[:, -1, : self.d_model]),
        }
        return Objective(batch, ((1.0, hidden),), terms)

    def _mixed(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        real = batch.mask
        mask = causal_mask(real)
        x = self._start(self.adapter(self.text[batch.items]), self.positions(event_positions(real)), real)
        for block in self.blocks:
            x = block(x, x, mask, real)
        return self.norm(x) * real[..., None]

    def _own(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        """The state of the domain that each position asks for."""
        crosses = bool(self.early or self.stack)
        streams = cut_streams(batch, self.num_domains, question_slots=crosses)
        view = look(batch, streams, self.early or self.stack)
        real = streams.split(streams.real)
        masks = [causal_mask(event) for event in streams.split(streams.event)]

        parts = zip(self.own_positions, streams.split(streams.item), streams.split(streams.count), real, strict=True)
        states = [self._start(self.local[item], table(count), kept) for table, item, count, kept in parts]
        early, layers, stack = (cast("Iterable[nn.ModuleList]", p) for p in (self.early, self.own_layers, self.stack))
        for units in early:
            states = exchange(units, states, streams, view)
        for blocks, units in zip_longest(layers, stack):
            states = [
                block(x, x, mask, kept) if len(x) else x
                for block, x, mask, kept in zip(blocks, states, masks, real, strict=True)
            ]
            if units is not None:
                states = exchange(units, states, streams, view)
        return streams.gather([norm(x) for norm, x in zip(self.own_norms, states, strict=True)], streams.question_slot)

    def _start(
        self,
        vectors: Float[Tensor, "batch length d_model"],
        positions: Float[Tensor, "batch length d_model"],
        real: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length d_model"]:
        return self.dropout(math.sqrt(self.d_model) * vectors + positions) * real[..., None]

    def _item_alignment(self, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        drawn = []
        for domain in range(self.num_domains):
            here = batch.mask & (batch.domains == domain)
            present = here.any(dim=1)
            column = torch.multinomial((here | ~present[:, None]).float(), 1, generator=generator)
            drawn.append((present, self.text[batch.items.gather(1, column)[:, 0]]))
        losses = []
        for (present, x), (other, y) in combinations(drawn, 2):
            both = present & other
            if both.any():
                losses.append(soft_contrast(self.adapter(x[both]), self.adapter(y[both]), self.temperature))
        return torch.stack(losses).mean() if losses else self.text.new_zeros(())

    def _user_alignment(self, batch: Batch, last: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
        users = batch.user[batch.mask[:, -1]]
        if not len(users):
            return last.sum()
        profiles = self.profile_adapter(self.profile(*self._cluster_means(users)))
        return soft_contrast(last[batch.mask[:, -1]], profiles, self.temperature)

    def _cluster_means(
        self, users: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch clusters d_text"], Bool[Tensor, "batch clusters"]]:
        """Mean text vector of each user's training events per cluster, and whether there are any."""
        start = self.history_offsets[users]
        length = self.history_offsets[users + 1] - start
        row = torch.repeat_interleave(length)
        place = torch.arange(len(row), device=row.device) - (length.cumsum(0) - length)[row] + start[row]
        items = self.history[place]
        cell = row * self.num_clusters + self.cluster[items]
        total = self.text.new_zeros(len(users) * self.num_clusters, self.text.shape[1])
        total = total.index_add(0, cell, self.text[items])
        count = torch.bincount(cell, minlength=len(total))
        shape = (len(users), self.num_clusters)
        return (total / count.clamp(min=1)[:, None]).unflatten(0, shape), (count > 0).view(shape)


class Adapter(nn.Module):
    """W2 (W1 x + b1) + b2. The two maps are one matrix of lower rank, and made into it before it meets the rows."""

    def __init__(self, d_text: int, d_model: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_text, d_text // 2)
        self.second = nn.Linear(d_text // 2, d_model)

    def forward(self, x: Float[Tensor, "*shape d_text"]) -> Float[Tensor, "*shape d_model"]:
        return F.linear(x, self.second.weight @ self.first.weight, self.second(self.first.bias))


class ProfileAttention(nn.Module):
    """A weighted mean of the clusters that a user has events in; it starts as their plain mean."""

    def __init__(self, d_text: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d_text))

    def forward(
        self, means: Float[Tensor, "batch clusters d_text"], present: Bool[Tensor, "batch clusters"]
    ) -> Float[Tensor, "batch d_text"]:
        """A row without any cluster gets zeros."""
        logits = (means @ self.query / math.sqrt(len(self.query))).masked_fill(~present, -1e9)
        return (logits.softmax(dim=1) * present)[:, None].bmm(means)[:, 0]


def soft_contrast(
    x: Float[Tensor, "rows d_model"], y: Float[Tensor, "rows d_model"], temperature: float
) -> Float[Tensor, ""]:
    """L(X, Y) of `LLM4CDSR`, for one row or more."""
    logits = x @ y.T / temperature
    targets = ((x @ x.T + y @ y.T) * (temperature / 2)).detach().softmax(dim=1)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _principal_coordinates(vectors: Float[Tensor, "rows d_text"], width: int) -> Float[Tensor, "rows width"]:
    """Centred, and projected on the directions of most variance; each points where its largest entry is positive."""
    centred = vectors.double() - vectors.double().mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return (centred @ (axes * largest.sign())).to(vectors.dtype)


def _k_means(vectors: Float[Tensor, "rows d_text"], count: int, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """The cluster of each row (Lloyd's algorithm from k-means++ starts); fewer clusters where fewer rows differ."""
    first = torch.randint(len(vectors), (1,), generator=generator)
    centres = vectors[first]
    nearest = (vectors - centres).square().sum(dim=1)
    while len(centres) < count and nearest.any():
        chosen = vectors[torch.multinomial(nearest, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, (vectors - chosen).square().sum(dim=1))
    label = torch.cdist(vectors, centres).argmin(dim=1)
    for _ in range(100):
        size = torch.bincount(label, minlength=len(centres))[:, None]
        total = torch.zeros_like(centres).index_add(0, label, vectors)
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)
        before, label = label, torch.cdist(vectors, centres).argmin(dim=1)
        if torch.equal(before, label):
            break
    return label
