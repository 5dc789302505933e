"""GRU4Rec (Hidasi et al., ICLR 2016; Hidasi & Karatzoglou, CIKM 2018): a recurrent network over the merged history."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from recsys.loading import Config
from recsys.models.dropout import Dropout
from recsys.models.embeddings import HistoryEmbedding, asked_vectors, check_length
from recsys.models.initialization import initialize
from recsys.types import Batch, Catalog


class GRU4RecConfig(Config):
    name: Literal["gru4rec"] = "gru4rec"
    d_model: Annotated[int, Field(ge=1)] = 64
    """Width of the item vectors and of every layer."""
    num_layers: Annotated[int, Field(ge=1)] = 1
    dropout_embedding: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """On what enters the first layer."""
    dropout_hidden: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """On what leaves each layer; what a layer hands to its own next step is left alone."""
    domain_embedding: bool = True
    """Add a vector of the event's domain to its embedding."""
    target_query: Literal["none", "domain"] = "none"
    """`domain`: a feed-forward layer after the recurrence reads a learned vector of the domain asked for."""
    init_std: Annotated[float, Field(gt=0)] = 0.125
    """Spread of maps and tables at the start. No LayerNorm lifts short vectors here: from much less than
    1 / sqrt(d_model), training hardly leaves the popularity of the items."""

    def build(self, catalog: Catalog, max_len: int, generator: torch.Generator | None = None) -> "GRU4Rec":
        return GRU4Rec(self, catalog.num_items, catalog.num_domains, max_len, generator)


class GRU4Rec(nn.Module):
    """The state at t sums up all events up to t. In every layer, x being the item vectors or the layer below,

        z = sigmoid(W_z x + U_z h),  r = sigmoid(W_r x + U_r h),  c = tanh(W_c x + r * U_c h),  h' = (1 - z) * c + z * h

    with biases, from h = 0. The scores are dot products with the very vectors that items enter with (the "constrained
    embedding" of the released code), without a bias per item.

    Not as in the papers: r acts after U_c, as in torch and cuDNN, where the paper of 2016 lets it act before, and z is
    the share that is kept, there the share that is new; items enter as vectors, not one-hot; a row of a batch is a
    whole history, from h = 0, and learns at every position, where the papers run sessions in parallel and cut the
    gradient after each step; and their losses (TOP1, BPR and the max versions of both) are not among `recsys.losses`.

    With `target_query: domain` (not in the papers) hidden = tanh(W (h + q_k) + b), one of the feed-forward layers that
    the paper allows between recurrence and output: q_k stays at the position that asks for k, and is more than a bias
    per item.
    """

    def __init__(
        self,
        config: GRU4RecConfig,
        num_items: int,
        num_domains: int,
        max_len: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d_model = config.d_model
        self.max_len = max_len
        self.embedding = HistoryEmbedding(
            num_items=num_items,
            num_positions=None,
            num_domains=num_domains if config.domain_embedding else None,
            d_model=d_model,
            dropout=config.dropout_embedding,
        )
        between = config.dropout_hidden if config.num_layers > 1 else 0.0  # torch warns of what one layer leaves unused
        self.recurrence = nn.GRU(d_model, d_model, config.num_layers, batch_first=True, dropout=between)
        self.dropout = Dropout(config.dropout_hidden)
        asks = config.target_query == "domain"
        self.question = nn.Embedding(num_domains, d_model) if asks else None
        self.feed_forward = nn.Linear(d_model, d_model) if asks else None
        initialize(self, generator, config.init_std)

    def forward(self, batch: Batch) -> Float[Tensor, "batch length d_model"]:
        check_length(batch, self.max_len)
        real = batch.mask
        x = self.embedding(batch.items, None, batch.domains, real)
        # Left padding would move the state away from zero before the first event: the events go first instead.
        steps = torch.arange(real.shape[1], device=real.device)
        first = real.shape[1] - real.sum(dim=1, keepdim=True)
        h, _ = self.recurrence(torch.take_along_dim(x, (steps + first).clamp(max=len(steps) - 1)[..., None], dim=1))
        h = self.dropout(torch.take_along_dim(h, (steps - first).clamp(min=0)[..., None], dim=1))
        if self.question is not None and self.feed_forward is not None:
            h = torch.tanh(self.feed_forward(h + asked_vectors(self.question, batch)))
        return h * real[..., None]

    def item_embeddings(self) -> Float[Tensor, "items d_model"]:
        return self.embedding.items.weight
