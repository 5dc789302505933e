"""Recommenders: each file holds a config and its module; the union of the configs is the list of models."""

from typing import Annotated

from pydantic import Field

from recsys.models.abxi import ABXIConfig
from recsys.models.count import count_parameters
from recsys.models.cross_domain import CrossDomainConfig
from recsys.models.item_knn import ItemKNNConfig
from recsys.models.markov import MarkovConfig
from recsys.models.popularity import PopularityConfig
from recsys.models.sasrec import SASRecConfig

ModelConfig = Annotated[
    PopularityConfig  # one per line, in the order of the README
    | MarkovConfig
    | ItemKNNConfig
    | SASRecConfig
    | CrossDomainConfig
    | ABXIConfig,
    Field(discriminator="name"),
]

__all__ = [
    "ABXIConfig",
    "CrossDomainConfig",
    "ItemKNNConfig",
    "MarkovConfig",
    "ModelConfig",
    "PopularityConfig",
    "SASRecConfig",
    "count_parameters",
]
