"""Tables of vectors: items, positions, domains."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys.models.dropout import Dropout
from recsys.types import NO_DOMAIN, PAD_ID, Batch


class ItemEmbedding(nn.Module):
    """A vector per item id, `num_items + 1` rows; the row of padding is zero and stays so, whatever the loss does.

    All rows are zero until `initialize` draws them.
    """

    def __init__(self, num_items: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items + 1, d_model))
        # A loss that multiplies with the whole table reaches the padding row too. With a gradient of zero neither
        # Adam nor weight decay moves a row that is zero.
        self.weight.register_post_accumulate_grad_hook(_clear_padding)

    def forward(self, items: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        return F.embedding(items, self.weight, padding_idx=PAD_ID)


def _clear_padding(weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad[PAD_ID] = 0


class HistoryEmbedding(nn.Module):
    """Item (+ position) (+ domain) embedding with dropout; zeros at padding."""

    def __init__(
        self, *, num_items: int, num_positions: int | None, num_domains: int | None, d_model: int, dropout: float
    ) -> None:
        """None leaves the embedding of positions or of domains out."""
        super().__init__()
        self.items = ItemEmbedding(num_items, d_model)
        self.positions = None if num_positions is None else nn.Embedding(num_positions, d_model)
        self.domains = None if num_domains is None else nn.Embedding(num_domains, d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        items: Int[Tensor, "*shape"],
        positions: Int[Tensor, "*shape"] | None,
        domains: Int[Tensor, "*shape"],
        real: Bool[Tensor, "*shape"],
    ) -> Float[Tensor, "*shape d_model"]:
        x = self.items(items)
        if self.positions is not None:
            x = x.add_(self.positions(positions))
        if self.domains is not None:
            x = x.add_(self.domains(domains.clamp(min=0).long()))  # the clamp is for padding, whose domain is negative
        return self.dropout(x).mul_(real[..., None])


def asked_vectors(questions: nn.Embedding, batch: Batch) -> Float[Tensor, "batch length d_model"]:
    """The vector of the domain that each position asks for; zeros where nothing is asked."""
    domains = batch.target_domains
    return questions(domains.clamp(min=0).long()) * (domains != NO_DOMAIN)[..., None]


def event_positions(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """0, 1, 2, … counted from the first event of each row, 0 at padding.

    Counted from the start, so that neither padding nor what comes later changes the position of an event.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def check_length(batch: Batch, max_len: int) -> None:
    """Raises ValueError if the histories are longer than the position table."""
    length = batch.items.shape[1]
    if length > max_len:
        raise ValueError(
            f"the batch holds histories of up to {length} events and the model was built for max_len = {max_len}; "
            "cut the histories to their last max_len events or build the model with a larger max_len"
        )
