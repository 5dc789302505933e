"""The exchange between the domains of a host: units of gated cross-attention, and what each may look at."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from recsys.models.attention import Context, CrossConfig, GatedCrossAttention, check_heads
from recsys.models.initialization import initialize
from recsys.models.streams import Streams
from recsys.types import Batch


def make_units(
    cross: CrossConfig | None, num_domains: int, d_model: int, generator: torch.Generator | None
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The units of placement `early` and of placement `stack`; at least one of the lists is empty.

    `units[u][k]` is what domain k asks with. A host registers the lists as `early` and `stack`, after all its other
    weights are drawn, so that those start the same with and without an exchange.
    """
    early, stack = nn.ModuleList(), nn.ModuleList()
    if cross is not None:
        if num_domains < 2:
            raise ValueError("an exchange needs at least two domains and the data has one; set `cross: null`")
        units = early if cross.placement == "early" else stack
        for _ in range(cross.num_units):
            units.append(nn.ModuleList(cross.build(d_model) for _ in range(num_domains)))
        initialize(units, generator)
    return early, stack


def check_cross(cross: CrossConfig | None, d_model: int, num_layers: int) -> None:
    """Raises ValueError, naming the key, where an exchange does not fit a host of `num_layers` encoder blocks."""
    if cross is None:
        return
    check_heads(d_model, cross.num_heads, key="cross.num_heads")
    if cross.placement == "stack" and cross.num_units > num_layers:
        raise ValueError(
            f"cross.num_units is {cross.num_units}, but placement `stack` puts one unit after each of "
            f"the first encoder blocks and there are only num_layers = {num_layers}; lower "
            "cross.num_units, raise num_layers, or use placement `early`"
        )


@dataclass(frozen=True)
class View:
    """What the states of every domain may look at."""

    rows: Int[Tensor, " batch"]
    """Row of the batch whose history is read, for each row."""
    masks: list[Tensor]
    """Per domain `rows length context`: True where a state may attend to an event of that history."""


def look(batch: Batch, streams: Streams, units: nn.ModuleList) -> View | None:
    """The view that the units of an exchange ask for; None without units.

    `others`: the events of the other domains in the user's own history, at or before the state in the history and no
    later in time; the order of the history settles ties in time.

    `own`: the events of the state's own domain under the same rule, the latest one included. Nothing crosses.

    `shuffled`: the events of the other domains in the history of another user, no later in time than the state
    (positions of two histories do not compare). It is the next row of the batch, from the last on to the first, that
    belongs to another user and is not padding alone, so nothing is drawn: in training the order of the rows changes
    with the epoch and follows from the run's seed, in an evaluation it is that of the targets, and a value depends on
    how they are batched. A batch of one user has nothing to read.
    """
    if not len(units):
        return None
    kind = context_of(units)
    rows, there = context_rows(batch, kind)
    mine = batch.domains[rows]
    real = batch.mask[rows] & there[:, None]
    steps = torch.arange(batch.items.shape[1], device=batch.items.device)
    masks = []
    blocks = zip(streams.users(), streams.split(streams.position), streams.split(streams.real), strict=True)
    for domain, (users, position, asking) in enumerate(blocks):
        chosen = real & ((mine == domain) if kind == "own" else (mine != domain))
        now = batch.times[users].gather(1, position)
        before = batch.times[rows][users][:, None, :] <= now[..., None]
        if kind != "shuffled":
            before &= steps <= position[..., None]
        masks.append(before & chosen[users][:, None, :] & asking[..., None])
    return View(rows, masks)


def context_of(units: nn.ModuleList) -> Context:
    """All units of an exchange read the same kind of context."""
    [kind] = {module.context for module in units.modules() if isinstance(module, GatedCrossAttention)}
    return kind


def context_rows(batch: Batch, kind: Context) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The row of the batch whose history each row reads, and whether there is one."""
    own = torch.arange(len(batch.user), device=batch.user.device)
    if kind != "shuffled":
        return own, torch.ones_like(own, dtype=torch.bool)
    steps = (own - own[:, None]) % max(len(own), 1)  # from a row (down) on to a row (across)
    steps = steps.masked_fill((batch.user == batch.user[:, None]) | ~batch.mask.any(dim=1), len(own))
    nearest, rows = steps.min(dim=1) if len(own) else (own, own)
    return rows, nearest < len(own)


def exchange(units: nn.ModuleList, states: list[Tensor], streams: Streams, view: View | None) -> list[Tensor]:
    """Every domain's states after its unit, all from the states before.

    `states` hold one `rows length d_model` tensor per domain, as `Streams.split` gives them; the context of each is
    a merged history, each event as the state of its own domain. `view` is what `look` gives.
    """
    assert view is not None, "an exchange has units"
    merged = streams.gather(states, streams.event_slot)
    return [
        unit(x, merged.index_select(0, view.rows[users]), mask) if len(x) else x
        for unit, x, users, mask in zip(units, states, streams.users(), view.masks, strict=True)
    ]
