"""The exchange between the domains of a host: units of gated cross-attention, and what each may look at."""

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from recsys.models.attention import CrossConfig, check_heads
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


def exchange(units: nn.ModuleList, states: list[Tensor], streams: Streams, others: list[Tensor]) -> list[Tensor]:
    """Every domain's states after its unit, all from the states before.

    `states` hold one `rows length d_model` tensor per domain, as `Streams.split` gives them; the context of each is
    the merged history, each event as the state of its own domain. `others` is what `other_events` gives.
    """
    merged = streams.gather(states, streams.event_slot)
    return [
        unit(x, merged[users], mask) if len(x) else x
        for unit, x, users, mask in zip(units, states, streams.users(), others, strict=True)
    ]


def other_events(batch: Batch, streams: Streams) -> list[Bool[Tensor, "rows length context"]]:
    """Per domain `rows length context`: True where a slot may attend to an event of the merged history.

    Those of another domain, at or before the slot in the history, and no later in time. The order of the history
    settles ties in time: what stands after the slot is not seen.
    """
    steps = torch.arange(batch.items.shape[1], device=batch.items.device)
    masks = []
    blocks = zip(streams.users(), streams.split(streams.position), streams.split(streams.real), strict=True)
    for domain, (users, position, real) in enumerate(blocks):
        times = batch.times[users]
        now = times.gather(1, position)
        other = (batch.mask & (batch.domains != domain))[users]
        before = (steps <= position[..., None]) & (times[:, None, :] <= now[..., None])
        masks.append(before & other[:, None, :] & real[..., None])
    return masks
