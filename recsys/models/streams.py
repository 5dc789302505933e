"""A batch of merged histories cut into one stream per domain."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.types import PAD_ID, Batch


@dataclass(frozen=True, slots=True)
class Streams:
    """Where every domain's states lie, and what each of them may know.

    The stream of domain k has a slot at each merged position t whose event is of domain k (an event slot) or that
    asks for domain k (a question slot; one slot can be both). A slot stands for "the state of domain k as of t".
    The streams of all domains lie end to end on one axis of `slots`; domain k's part is a block of
    `shapes[k] = (rows, length)`: a row per user who has a slot in k, left padded to the longest of them. So the work
    grows with the events there are, not with the number of domains.
    """

    shapes: tuple[tuple[int, int], ...]
    row: Int[Tensor, " slots"]
    """Row of the batch; at padding 0, like every index here."""
    position: Int[Tensor, " slots"]
    """Merged position."""
    domain: Int[Tensor, " slots"]
    """The stream's domain."""
    item: Int[Tensor, " slots"]
    """The latest item of the domain at or before the slot; `PAD_ID` before its first."""
    count: Int[Tensor, " slots"]
    """Events of the domain at or before the slot."""
    event: Bool[Tensor, " slots"]
    """True at event slots."""
    real: Bool[Tensor, " slots"]
    """False at padding."""
    event_slot: Int[Tensor, "batch length"]
    """The slot of each event; `slots`, one past the end, at padding."""
    question_slot: Int[Tensor, "batch length"]
    """The slot that answers each question; `slots`, one past the end, where there is none."""

    def split(self, values: Tensor) -> list[Tensor]:
        """Values per slot as one `rows, length, …` tensor for each domain (views)."""
        parts = values.split([rows * length for rows, length in self.shapes])
        return [part.view(*shape, *part.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def users(self) -> list[Tensor]:
        """The rows of the batch behind the rows of each domain's block."""
        return [row[:, -1:].flatten() for row in self.split(self.row)]  # left padded: the last column is never padding

    @staticmethod
    def gather(states: list[Tensor], slot: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        """States per domain, as `split` gives them, at the slots asked for; zeros one past the end."""
        flat = [state.flatten(0, 1) for state in states]
        return torch.cat([*flat, flat[0].new_zeros(1, flat[0].shape[1])])[slot]


def cut_streams(batch: Batch, num_domains: int, question_slots: bool = True) -> Streams:
    """Reads the history and which domain each of its positions asks for; waits twice for the device, for sizes.

    Without `question_slots` there are event slots only, and a question is answered by the slot of the latest event of
    its domain, if any: the same states at less work where nothing but the domain's own events goes into them.
    """
    device = batch.items.device
    real = batch.mask
    domain = torch.arange(num_domains, device=device)[:, None, None]
    event = (batch.domains == domain) & real  # domain batch length, like everything up to `where`
    asked = (batch.target_domains == domain) & real
    slot = event | asked if question_slots else event

    used = slot.sum(dim=2)
    present = used > 0
    longest = used.amax(dim=1)
    rows = present.sum(dim=1)
    shapes = torch.stack([rows, longest], dim=1).tolist()
    total = sum(row_count * length for row_count, length in shapes)

    start = (rows * longest).cumsum(0) - rows * longest
    line = start[:, None] + (present.cumsum(dim=1) - 1) * longest[:, None]
    place = (line + longest[:, None] - used)[:, :, None] + slot.cumsum(dim=2) - 1

    steps = torch.arange(batch.items.shape[1], device=device)
    latest = torch.where(event, steps, -1).cummax(dim=2).values
    where = slot.nonzero(as_tuple=True)
    domain_of, row, position = where
    target = place[where]
    newest = latest[where]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(total).index_copy_(0, target, values)

    def slot_of(
        chosen: Bool[Tensor, "domains batch length"], places: Int[Tensor, "domains batch length"]
    ) -> Int[Tensor, "batch length"]:
        found = torch.where(chosen, places, 0).sum(dim=0)  # at most one domain is chosen at a position
        return torch.where(chosen.any(dim=0), found, total)

    answered, answers = asked, place
    if not question_slots:
        answered, answers = asked & (latest >= 0), place.gather(2, latest.clamp(min=0))

    return Streams(
        shapes=tuple((row_count, length) for row_count, length in shapes),
        row=spread(row),
        position=spread(position),
        domain=spread(domain_of),
        item=spread(torch.where(newest >= 0, batch.items[row, newest.clamp(min=0)], PAD_ID)),
        count=spread(event.cumsum(dim=2)[where]),
        event=spread(event[where]),
        real=spread(torch.ones_like(target, dtype=torch.bool)),
        event_slot=slot_of(event, place),
        question_slot=slot_of(answered, answers),
    )
