"""A batch of merged histories cut into one stream per domain."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recsys.sizes import Block, Sizes, places
from recsys.types import PAD_ID, Batch


@dataclass(frozen=True, slots=True)
class Streams:
    """Where every domain's states lie, and what each of them may know.

    The stream of domain k has a slot at each merged position t whose event is of domain k (an event slot) or that
    asks for domain k (a question slot; one slot can be both). A slot stands for "the state of domain k as of t".
    The streams of all domains lie end to end on one axis of `slots`; domain k's part is `blocks[k]`: a row per user who
    has a slot in k, left padded to the longest of them. So the work grows with the events there are, not with the
    number of domains.
    """

    sizes: Sizes
    """Of the batch."""
    blocks: tuple[Block, ...]
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
        parts = values.split([block.rows * block.length for block in self.blocks])
        shapes = ((block.rows, block.length) for block in self.blocks)
        return [part.view(*shape, *part.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]

    def users(self) -> list[Tensor]:
        """The rows of the batch behind the rows of each domain's block."""
        return [row[:, -1:].flatten() for row in self.split(self.row)]  # left padded: the last column is never padding

    @staticmethod
    def gather(states: list[Tensor], slot: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        """States per domain, as `split` gives them, at the slots asked for; zeros one past the end."""
        flat = [state.flatten(0, 1) for state in states]
        # Indexing by `[slot]` would be the same, with a gradient that takes ten times as long on a CPU.
        every = torch.cat([*flat, flat[0].new_zeros(1, flat[0].shape[1])])
        return every.index_select(0, slot.flatten()).unflatten(0, slot.shape)


def cut_streams(batch: Batch, num_domains: int, question_slots: bool = True) -> Streams:
    """Reads the history and which domain each of its positions asks for.

    Without `question_slots` there are event slots only, and a question is answered by the slot of the latest event of
    its domain, if any: the same states at less work where nothing but the domain's own events goes into them.
    """
    device = batch.items.device
    real = batch.mask
    domain = torch.arange(num_domains, device=device)[:, None, None]
    event = (batch.domains == domain) & real  # domain batch length, like everything up to `found`
    asked = (batch.target_domains == domain) & real
    slot = event | asked if question_slots else event
    steps = torch.arange(batch.items.shape[1], device=device)
    latest = torch.where(event, steps, -1).cummax(dim=2).values
    sizes = batch.sizes or _count(event, asked, latest)
    blocks = sizes.blocks if question_slots else sizes.event_blocks

    used = slot.sum(dim=2)
    present = used > 0
    *starts, total = accumulate((block.rows * block.length for block in blocks), initial=0)
    start, length = (_column(values, device) for values in (starts, [block.length for block in blocks]))
    line = start + (present.cumsum(dim=1) - 1) * length
    place = (line + length - used)[:, :, None] + slot.cumsum(dim=2) - 1

    found = places(slot, sum(block.slots for block in blocks))
    domain_of, cell = found // real.numel(), found % real.numel()
    row, position = cell // len(steps), cell % len(steps)
    target = torch.where(slot.flatten()[found], place.flatten()[found], total)  # what fills up goes past the end
    newest = latest.flatten()[found]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(total + 1).scatter(0, target, values)[:total]

    def slot_of(
        chosen: Bool[Tensor, "domains batch length"], at: Int[Tensor, "domains batch length"]
    ) -> Int[Tensor, "batch length"]:
        at = torch.where(chosen, at, 0).sum(dim=0)  # at most one domain is chosen at a position
        return torch.where(chosen.any(dim=0), at, total)

    answered, answers = asked, place
    if not question_slots:
        answered, answers = asked & (latest >= 0), place.gather(2, latest.clamp(min=0))

    return Streams(
        sizes=sizes,
        blocks=blocks,
        row=spread(row),
        position=spread(position),
        domain=spread(domain_of),
        item=spread(torch.where(newest >= 0, batch.items[row, newest.clamp(min=0)], PAD_ID)),
        count=spread(event.cumsum(dim=2).flatten()[found]),
        event=spread(event.flatten()[found]),
        real=spread(slot.flatten()[found]),
        event_slot=slot_of(event, place),
        question_slot=slot_of(answered, answers),
    )


def _count(
    event: Bool[Tensor, "domains batch length"],
    asked: Bool[Tensor, "domains batch length"],
    latest: Int[Tensor, "domains batch length"],
) -> Sizes:
    """The sizes of a batch that does not bring them; waits for the device, once."""
    columns = [mask.sum(dim=(1, 2)) for mask in (asked, asked & (latest >= 0))]
    for slot in (event | asked, event):
        used = slot.sum(dim=2)
        columns += [(used > 0).sum(dim=1), used.amax(dim=1), used.sum(dim=1)]
    counted = torch.stack(columns, dim=1).tolist()
    events = tuple(Block(*line[5:]) for line in counted)
    questions = tuple(line[0] for line in counted)
    return Sizes(
        targets=questions,
        events=sum(block.slots for block in events),
        questions=questions,
        known=tuple(line[1] for line in counted),
        blocks=tuple(Block(*line[2:5]) for line in counted),
        event_blocks=events,
    )


def _column(values: list[int], device: torch.device) -> Int[Tensor, "domains one"]:
    """Numbers of the host made on the device: to copy them would wait for it."""
    return torch.stack([torch.full((1,), value, device=device) for value in values])
