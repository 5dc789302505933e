"""Random batches of several users and domains, models whose every path shows, and clouds of vectors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recsys.evaluation.targets import Targets
from recsys.models import CrossDomainConfig
from recsys.models.attention import CrossConfig
from recsys.types import NO_DOMAIN, PAD_ID, Batch, Catalog

ITEMS, LENGTH = 60, 12


def _catalog(num_domains: int) -> Catalog:
    domain = torch.arange(ITEMS + 1) % num_domains
    domain[PAD_ID] = NO_DOMAIN
    return Catalog(tuple("abcd"[:num_domains]), domain, torch.zeros_like(domain))


def _batch(rows: int, num_domains: int = 2, seed: int = 0, first_user: int = 0) -> Batch:
    """Left-padded histories of 1 to 12 events; every real position asks for some domain."""
    generator = torch.Generator().manual_seed(seed)
    events = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    real = torch.arange(LENGTH) >= LENGTH - events
    items = torch.randint(1, ITEMS + 1, (rows, LENGTH), generator=generator)
    times = torch.randint(0, 3, (rows, LENGTH), generator=generator).cumsum(1)
    asked = torch.randint(0, num_domains, (rows, LENGTH), generator=generator)
    return Batch(
        user=torch.arange(first_user, first_user + rows),
        items=items * real,
        domains=torch.where(real, items % num_domains, NO_DOMAIN),
        times=times * real,
        targets=items.roll(1, 1) * real,
        target_domains=torch.where(real, asked, NO_DOMAIN),
    )


def _model(num_domains: int = 2, seed: int = 0, stir: float | None = 0.4, **cross: object) -> nn.Module:
    """In evaluation mode; parameters drawn with the given spread, or left as a model starts for None."""
    config = CrossDomainConfig(d_model=8, d_ff=12, num_layers=2, num_heads=2, cross=CrossConfig(**cross))
    generator = torch.Generator().manual_seed(seed)
    model = config.build(_catalog(num_domains), LENGTH, generator).eval()
    if stir is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, stir, generator=generator)
            model.item_embeddings()[PAD_ID] = 0
    return model


def _targets(batch: Batch) -> Targets:
    return Targets(batch, batch.items, batch.mask.sum(1))


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return _batch


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    return _model


@pytest.fixture(scope="session")
def make_targets() -> Callable[[Batch], Targets]:
    return _targets


@pytest.fixture(scope="session")
def cloud() -> Callable[..., torch.Tensor]:
    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return make


@pytest.fixture(scope="session")
def rotation() -> Callable[[int], torch.Tensor]:
    """Turns every plane of coordinates 2i, 2i + 1 by a quarter: x and xR are orthogonal for every x."""

    def make(width: int) -> torch.Tensor:
        quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        return torch.block_diag(*[quarter] * (width // 2))

    return make
