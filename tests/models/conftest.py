"""Batches written out by hand, catalogues, and models whose weights are large enough to show every path."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog

Event = tuple[int, int, int]  # item, domain, time


def _make_batch(
    histories: list[list[Event]], asked: list[list[int | None]], pad: int = 0, dtype: torch.dtype = torch.int64
) -> Batch:
    """One row per history, left padded to the longest plus `pad`; `asked` holds each event's question or None."""
    length = max(len(history) for history in histories) + pad

    def column(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (length - len(row)) + row for row in rows], dtype=dtype)

    questions = [[NO_DOMAIN if domain is None else domain for domain in row] for row in asked]
    return Batch(
        user=torch.arange(len(histories), dtype=dtype),
        items=column([[event[0] for event in row] for row in histories], PAD_ID),
        domains=column([[event[1] for event in row] for row in histories], NO_DOMAIN),
        times=column([[event[2] for event in row] for row in histories], 0),
        targets=column([[1 if domain >= 0 else PAD_ID for domain in row] for row in questions], PAD_ID),
        target_domains=column(questions, NO_DOMAIN),
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return _make_batch


@pytest.fixture(scope="session")
def make_catalog() -> Callable[..., Catalog]:
    def make(num_domains: int, num_items: int = 60) -> Catalog:
        domain = torch.arange(num_items + 1) % num_domains
        domain[PAD_ID] = NO_DOMAIN
        return Catalog(tuple(f"d{k}" for k in range(num_domains)), domain, torch.zeros_like(domain))

    return make


@pytest.fixture(scope="session")
def stir() -> Callable[[nn.Module], nn.Module]:
    """The model in double precision and evaluation mode, every parameter drawn anew with a spread of 0.4.

    As it starts, a model hardly mixes its positions and its biases are zero; a leak would pass unseen.
    """

    def apply(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.4, generator=generator)
            model.item_embeddings()[PAD_ID] = 0
        return model

    return apply
