"""The published points, where they are, and catalogues."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from recsys.types import NO_DOMAIN, PAD_ID, Catalog


@pytest.fixture(scope="session")
def published() -> Callable[[str], pd.DataFrame]:
    """A table of published points below RECSYS_DATA; they are not part of the project."""

    def read(name: str) -> pd.DataFrame:
        given = os.environ.get("RECSYS_DATA")
        if given is None:
            pytest.skip("RECSYS_DATA is not set")
        path = Path(given) / "scaling_fixtures" / name
        if not path.is_file():
            pytest.skip(f"scaling_fixtures/{name} is not below RECSYS_DATA ({given})")
        return pd.read_csv(path)

    return read


@pytest.fixture(scope="session")
def make_catalog() -> Callable[..., Catalog]:
    def make(num_domains: int = 2, num_items: int = 60) -> Catalog:
        domain = torch.arange(num_items + 1) % num_domains
        domain[PAD_ID] = NO_DOMAIN
        return Catalog(tuple(f"d{k}" for k in range(num_domains)), domain, torch.zeros_like(domain))

    return make
