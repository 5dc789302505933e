"""What a model costs: parameters by class and floating-point operations, exact and without memory for either."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from recsys.models import ModelConfig, count_parameters
from recsys.types import PAD_ID, Batch, Catalog


@dataclass(frozen=True)
class Parameters:
    """Parameters by class. The item table's row of padding is counted, as it is stored."""

    item_table: int
    other_embeddings: int
    """Positions, domains, questions."""
    encoder: int
    """All that follows no other name here."""
    cross_attention: int
    gate: int
    output_head: int
    """What stands between the last block and the scores. The scores themselves reuse the item table."""
    trainable: int
    active: int
    """Read for one history of full length: all but the item vectors of other items. Scoring is left out."""

    @property
    def dense(self) -> int:
        """All but embeddings."""
        return self.encoder + self.cross_attention + self.gate + self.output_head

    @property
    def total(self) -> int:
        return self.item_table + self.other_embeddings + self.dense


def count_model(config: ModelConfig, catalog: Catalog, max_len: int) -> Parameters:
    """Counted on the meta device; nothing is drawn."""
    with torch.device("meta"):
        model = config.build(catalog, max_len)
    groups = count_parameters(model)
    total, table = groups.pop("total"), groups.pop("item_table")
    named = {name: groups.pop(name) for name in ("other_embeddings", "cross_attention", "gate")}
    head = groups.pop("output")
    used = table // (catalog.num_items + 1) * min(max_len, catalog.num_items)
    counted = Parameters(
        item_table=table,
        encoder=sum(groups.values()),
        output_head=head,
        **named,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        active=total - table + used,
    )
    assert counted.total == total
    return counted


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, two per multiply-add; lookups, norms and softmaxes are none.

    The logits stand apart: over a large catalogue they outweigh the model, and they are the same for all models of
    one width.
    """

    forward: int
    step: int
    """Forward and backward, as they would be without recomputation. The optimizer is not in it."""
    logits_forward: int
    logits_step: int


def count_flops(config: ModelConfig, catalog: Catalog, batch: Batch, candidates: int | None = None) -> Flops:
    """Of one training step on `batch`: the model on the meta device, the batch on the CPU.

    Every target is scored against its whole domain, or against `candidates` items where that is given (all items, or
    the negatives and the target).
    """
    with torch.device("meta"):
        model = config.build(catalog, batch.items.shape[1])
    model.train()
    widths: list[int] = []

    def run() -> Tensor:
        hidden = model(batch)
        widths.append(hidden.shape[-1])
        return hidden

    forward, step = measure_flops(run)
    if candidates is None:
        domains = batch.target_domains[batch.targets != PAD_ID]
        scored = sum(len(catalog.items_of(domain)) for domain in domains.tolist())
    else:
        scored = candidates * int((batch.targets != PAD_ID).sum())
    logits = 2 * widths[0] * scored
    return Flops(forward, step, logits, 3 * logits)


def measure_flops(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of `run` alone, and with the gradient of the sum of its result.

    `run` should use a module on the meta device in train mode: what it computes on the CPU is taken over by shape.
    Attention goes by its definition, because the counter knows no fused kernel of the CPU and would call it free.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _ToMeta(), FlopCounterMode(display=False) as counter:
            result = run()
            forward = counter.get_total_flops()
            result.sum().backward()
            return forward, counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _ToMeta(TorchFunctionMode):
    """Where a call mixes tensors on the CPU with those on the meta device, their shapes are all that is left.

    A model may read sizes off the batch, so the batch is real; its weights are not.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(arguments)):
            arguments = tree_map_only(Tensor, _shape_of, arguments)
        return func(*arguments[0], **arguments[1])


def _shape_of(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def full_batch(catalog: Catalog, max_len: int, batch_size: int = 1) -> Batch:
    """Histories of full length that go through the domains in turn, each event asking for the next."""
    order = torch.arange(max_len + 1) % catalog.num_domains
    pools = [catalog.items_of(domain) for domain in range(catalog.num_domains)]
    items = torch.stack([pools[domain][turn % len(pools[domain])] for turn, domain in enumerate(order.tolist())])
    items, domains = items.repeat(batch_size, 1), order.repeat(batch_size, 1)
    return Batch(
        user=torch.arange(batch_size),
        items=items[:, :-1],
        domains=domains[:, :-1],
        times=torch.arange(max_len).repeat(batch_size, 1),
        targets=items[:, 1:],
        target_domains=domains[:, 1:],
    )
