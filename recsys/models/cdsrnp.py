"""CDSRNP (Li et al., arXiv 2410.13588): a neural process over users, some of whom the others learn from."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from recsys.loading import Config
from recsys.models.attention import CrossConfig, MultiHeadAttention, check_heads
from recsys.models.dropout import Dropout
from recsys.models.embeddings import HistoryEmbedding, check_length
from recsys.models.encoders import EncoderBlock, causal_mask
from recsys.models.exchange import check_cross, exchange, look, make_units
from recsys.models.initialization import initialize
from recsys.models.streams import cut_streams
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog, Objective, TrainingEvents


class CDSRNPConfig(Config):
    """The published values are not known; these are a size for two CPU cores."""

    name: Literal["cdsrnp"] = "cdsrnp"
    d_model: Annotated[int, Field(ge=1)] = 64
    d_ff: Annotated[int, Field(ge=1)] = 256
    num_layers: Annotated[int, Field(ge=1)] = 1
    """Encoder blocks per domain."""
    num_heads: Annotated[int, Field(ge=1)] = 2
    """Of the encoders and of the attention over the support users."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    num_support: Annotated[int, Field(ge=1)] = 64
    """Support users, or all users with training events in two domains where there are fewer."""
    support_seed: Annotated[int, Field(ge=0)] = 0
    """Which users they are; apart from the run's seed, so that runs that differ in that alone share them."""
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KL beside a loss that is a mean over questions; the evidence bound has one over their number."""
    cross: CrossConfig | None = None
    """The exchange between the domains; null: CDSRNP without it."""

    @model_validator(mode="after")
    def _check(self) -> "CDSRNPConfig":
        check_heads(self.d_model, self.num_heads)
        check_cross(self.cross, self.d_model, self.num_layers)
        return self

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "CDSRNP":
        if catalog.num_domains < 2:
            raise ValueError("cdsrnp learns from users of several domains and the data has one; use `sasrec` there")
        return CDSRNP(self, catalog, max_len, generator)


class CDSRNP(nn.Module):
    """For a user u who is asked for domain k at t, with K domains and support users S (FFN is linear, GELU, linear)

        f^j = Encoder_j(events of j up to t), or n_j, learned, where there is none;   h = [f^1; …; f^K]
        r   = FFN_r([h; e(i)])                   of a pair (h, i): what a user's history says, and the item after it
        q(z | pairs) = N(mu, sigma²)             mu = W_mu m + b_mu,   sigma = 0.1 + 0.9 sigmoid(W_sigma m + b_sigma),
                                                 m the mean of the pairs' r, 0 where there are no pairs
        c   = MHA(W_h h + b_h, {r_s : s in S, s ≠ u}),   g = sigmoid(W_g [W_h h + b_h; c; z] + b_g)
        hidden = f^k + FFN_o([f^k; g * c; z]),   score(i) = hidden · e(i)

    The pair of a support user is its last TRAIN event and, cut to `max_len`, the TRAIN events before it; that of a
    user in a training batch is the last question of its row and the answer. The pairs are encoded anew in each pass,
    with the weights of the moment.

    `forward` takes z = mu of the prior q(z | S). In training z is one draw for the whole batch from the posterior
    q(z | S and Q), Q being the users of the batch, and KL(posterior || prior) is added to the loss. So `objective`
    reads the targets, as a posterior must; they reach the states by way of z alone, each as one of the pairs in m.

    The support must not tell its own users what is to come: u leaves its pair out of what it attends to and of its
    prior, in evaluation as in training; and where support users are in a batch, the prior is that of the others and
    their pairs count once in the posterior, as part of Q.

    Of the paper is known: overlapping users are sampled as the support set, overlapping and other users are queries,
    the neural-process principle aligns prior and posterior, and a layer adapts what is read of the support to the
    user's interests. Code, equations, sizes and numbers are not public. The rest is a reconstruction after neural
    processes and their use in recommendation (TaNP, CDRNP):
    - the encoders: per domain a causal pre-norm transformer with positions; a learned state for a missing domain;
    - pairs: one per user, without a label, which would be a constant, as every pair is one that happened;
    - aggregation by the mean, the form of sigma, independent coordinates, one z for all users of a batch;
    - the adaptive layer: attention over the support users with r as key and value, and a gate that knows z;
    - the head: a residual map of the asked domain's state, and a dot product;
    - one support set for good, drawn uniformly with a seed, where meta-learning draws one for each task;
    - the weight of the KL; and the loss is the run's.

    With an exchange (not part of CDSRNP) each domain's states query the other domains' states between embedding and
    encoder (`early`) or after blocks (`stack`), for support and query users alike. The state of the asked domain is
    then that of the question, as in `CrossDomain`, and n_k is added to it where k has no events.
    """

    item_domain: Tensor
    support_user: Tensor
    support_items: Tensor
    support_times: Tensor
    support_answer: Tensor

    def __init__(
        self, config: CDSRNPConfig, catalog: Catalog, max_len: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        d_model, num_domains = config.d_model, catalog.num_domains
        self.max_len = max_len
        self.num_domains = num_domains
        self.num_support = config.num_support
        self.support_seed = config.support_seed
        self.kl_weight = config.kl_weight
        self.embedding = HistoryEmbedding(
            num_items=catalog.num_items,
            num_positions=max_len + 1,
            num_domains=None,
            d_model=d_model,
            dropout=config.dropout,
        )
        self.nulls = nn.Embedding(num_domains, d_model)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                EncoderBlock(
                    d_model=d_model,
                    d_ff=config.d_ff,
                    num_heads=config.num_heads,
                    dropout=config.dropout,
                    activation="gelu",
                    norm_first=True,
                )
                for _ in range(num_domains)
            )
            for _ in range(config.num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_domains))
        self.pair = _feed_forward((num_domains + 1) * d_model, config.d_ff, d_model)
        self.mean = nn.Linear(d_model, d_model)
        self.spread = nn.Linear(d_model, d_model)
        self.interest = nn.Linear(num_domains * d_model, d_model)
        self.attention = MultiHeadAttention(d_model, config.num_heads)
        self.gate = nn.Linear(3 * d_model, d_model)
        self.answer = _feed_forward(3 * d_model, config.d_ff, d_model)
        self.dropout = Dropout(config.dropout)
        initialize(self, generator)
        self.early, self.stack = make_units(config.cross, num_domains, d_model, generator)

        self.register_buffer("item_domain", catalog.item_domain, persistent=False)
        self.register_buffer("support_user", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("support_items", torch.zeros(0, 1, dtype=torch.int64), persistent=False)
        self.register_buffer("support_times", torch.zeros(0, 1, dtype=torch.int64), persistent=False)
        self.register_buffer("support_answer", torch.zeros(0, dtype=torch.int64), persistent=False)

    def fit(self, events: TrainingEvents) -> None:
        """Draw the support users among those with events in two domains or more, and keep their events.

        Raises ValueError where there are none.
        """
        users, num_users = torch.repeat_interleave(events.offsets.diff()), len(events.offsets) - 1
        present = torch.zeros(num_users, self.num_domains, dtype=torch.bool)
        present[users, self.item_domain.cpu()[events.items]] = True
        overlapping = (present.sum(dim=1) >= 2).nonzero().flatten()
        if not len(overlapping):
            raise ValueError(
                "cdsrnp draws its support from users with training events in two domains, and there are none; "
                "set data.domain to null if it names one, or use `sasrec`"
            )
        generator = torch.Generator().manual_seed(self.support_seed)
        order = torch.randperm(len(overlapping), generator=generator)
        chosen = overlapping[order[: self.num_support]].sort().values

        answer = events.offsets[chosen + 1] - 1
        first = torch.maximum(events.offsets[chosen], answer - self.max_len)
        place = answer[:, None] - torch.arange(int((answer - first).max()), 0, -1)
        real = place >= first[:, None]
        place = place.clamp(min=0)
        device = self.item_domain.device
        self.support_user = chosen.to(device)
        self.support_items = events.items[place].masked_fill(~real, PAD_ID).to(device)
        self.support_times = events.times[place].masked_fill(~real, 0).to(device)
        self.support_answer = events.items[answer].to(device)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        questions, pairs = self._ask(batch), self._support()
        others = questions.user[:, None] != self.support_user
        return self._answer(batch, questions, pairs, self._latent(pairs, others).mean)

    def objective(self, batch: Batch, generator: torch.Generator) -> Objective:
        questions, pairs = self._ask(batch), self._support()
        last = F.pad(questions.row, (0, 1), value=-1).diff() != 0
        answers = batch.targets[questions.row[last], questions.position[last]]
        asked = self._pairs(questions.states[last], answers)

        others = ~torch.isin(self.support_user, questions.user)
        prior = self._latent(pairs, others)
        posterior = self._latent(torch.cat([pairs, asked]), F.pad(others, (0, len(asked)), value=True))
        mean = posterior.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        z = mean + posterior.stddev * noise
        hidden = self._answer(batch, questions, pairs, z.expand(len(questions.user), -1))
        return Objective(batch, ((1.0, hidden),), {"kl": self.kl_weight * kl_divergence(posterior, prior).sum()})

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight

    def _support(self) -> Float[Tensor, "support d_model"]:
        """r of each support user."""
        if not len(self.support_user):
            return self.nulls.weight.new_zeros(0, self.nulls.weight.shape[1])
        asked = torch.full_like(self.support_items, NO_DOMAIN)
        asked[:, -1] = self.item_domain[self.support_answer]
        nothing = torch.full_like(asked, PAD_ID)
        domains = self.item_domain[self.support_items]
        batch = Batch(self.support_user, self.support_items, domains, self.support_times, nothing, asked)
        return self._pairs(self._ask(batch).states, self.support_answer)

    def _pairs(
        self, states: Float[Tensor, "users domains d_model"], items: Int[Tensor, " users"]
    ) -> Float[Tensor, "users d_model"]:
        """r of pairs of what all domains' states say and the item that follows."""
        return self.pair(torch.cat([states.flatten(1), self.embedding.items(items)], dim=1))

    def _latent(self, pairs: Float[Tensor, "pairs d_model"], chosen: Bool[Tensor, "*rows pairs"]) -> Normal:
        """q(z | the chosen pairs), of the pairs' r."""
        # Prior and posterior differ by less than bf16 can tell. The device is a buffer's: there is no autocast for the
        # weights' where operations are counted.
        with torch.autocast(self.item_domain.device.type, enabled=False):
            r = pairs.to(self.mean.weight.dtype)
            m = chosen.to(r.dtype) @ r / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
            return Normal(self.mean(m), 0.1 + 0.9 * torch.sigmoid(self.spread(m)), validate_args=False)

    def _ask(self, batch: Batch) -> "_Questions":
        """The states of all domains as of each question."""
        check_length(batch, self.max_len)
        crosses = bool(self.early or self.stack)
        streams = cut_streams(batch, self.num_domains, question_slots=crosses)
        view = look(batch, streams, self.early or self.stack)
        real = streams.split(streams.real)
        own = [causal_mask(event) for event in streams.split(streams.event)]

        states = streams.split(self.embedding(streams.item, streams.count, streams.domain, streams.real))
        early, layers, stack = (cast("Iterable[nn.ModuleList]", part) for part in (self.early, self.layers, self.stack))
        for units in early:
            states = exchange(units, states, streams, view)
        for blocks, units in zip_longest(layers, stack):
            states = [
                block(x, x, mask, kept) if len(x) else x
                for block, x, mask, kept in zip(blocks, states, own, real, strict=True)
            ]
            if units is not None:
                states = exchange(units, states, streams, view)
        states = [norm(x) for norm, x in zip(self.norms, states, strict=True)]

        row, position = (batch.mask & (batch.target_domains != NO_DOMAIN)).nonzero(as_tuple=True)
        domain = batch.target_domains[row, position].long()
        steps = torch.arange(batch.items.shape[1], device=row.device)
        domains = torch.arange(self.num_domains, device=row.device)
        event = batch.mask[..., None] & (batch.domains[..., None] == domains)
        latest = torch.where(event, steps[:, None], -1).cummax(dim=1).values[row, position]
        slot = torch.where(latest >= 0, streams.event_slot[row[:, None], latest.clamp(min=0)], len(streams.real))
        if crosses:
            slot = slot.scatter(1, domain[:, None], streams.question_slot[row, position][:, None])
        nulls = self.nulls.weight * (latest < 0)[..., None]
        return _Questions(row, position, batch.user[row], domain, streams.gather(states, slot) + nulls)

    def _answer(
        self,
        batch: Batch,
        questions: "_Questions",
        support: Float[Tensor, "support d_model"],
        z: Float[Tensor, "questions d_model"],
    ) -> Float[Tensor, "batch length d_model"]:
        """hidden, from r of the support users and z."""
        own = questions.states[torch.arange(len(z), device=z.device), questions.domain]
        context = self._adapt(questions, support, z)
        answers = own + self.dropout(self.answer(torch.cat([own, context, z], dim=1)))
        return answers.new_zeros(*batch.items.shape, answers.shape[1]).index_put(
            (questions.row, questions.position), answers
        )

    def _adapt(
        self,
        questions: "_Questions",
        support: Float[Tensor, "support d_model"],
        z: Float[Tensor, "questions d_model"],
    ) -> Float[Tensor, "questions d_model"]:
        """g * c; zeros where there is nobody to attend to."""
        if not len(support):
            return torch.zeros_like(z)
        interest = self.interest(questions.states.flatten(1))
        others = questions.user[:, None] != self.support_user
        context = self.attention(interest[None], support[None], others[None])[0]
        return torch.sigmoid(self.gate(torch.cat([interest, context, z], dim=1))) * context


@dataclass(frozen=True, slots=True)
class _Questions:
    """What a batch asks, in the order of its rows and positions, and what all domains' states say to it."""

    row: Int[Tensor, " questions"]
    position: Int[Tensor, " questions"]
    user: Int[Tensor, " questions"]
    domain: Int[Tensor, " questions"]
    states: Float[Tensor, "questions domains d_model"]


def _feed_forward(d_in: int, d_ff: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_ff), nn.GELU(), nn.Linear(d_ff, d_out))
