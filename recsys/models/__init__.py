"""Recommenders: each file holds a config and its module; the union of the configs is the list of models."""

from typing import Annotated

from pydantic import Field

from recsys.models.abxi import ABXIConfig
from recsys.models.autocdsr import AutoCDSRConfig
from recsys.models.autocdsr_plus import AutoCDSRPlusConfig
from recsys.models.bert4rec import BERT4RecConfig
from recsys.models.c2dsr import C2DSRConfig
from recsys.models.cdsrnp import CDSRNPConfig
from recsys.models.count import count_parameters
from recsys.models.cross_domain import CrossDomainConfig
from recsys.models.gru4rec import GRU4RecConfig
from recsys.models.hstu import HSTUConfig
from recsys.models.item_knn import ItemKNNConfig
from recsys.models.llm4cdsr import LLM4CDSRConfig
from recsys.models.markov import MarkovConfig
from recsys.models.popularity import PopularityConfig
from recsys.models.sasrec import SASRecConfig

ModelConfig = Annotated[
    PopularityConfig  # one per line, in the order of the README
    | MarkovConfig
    | ItemKNNConfig
    | SASRecConfig
    | BERT4RecConfig
    | GRU4RecConfig
    | HSTUConfig
    | CrossDomainConfig
    | ABXIConfig
    | LLM4CDSRConfig
    | CDSRNPConfig
    | C2DSRConfig
    | AutoCDSRConfig
    | AutoCDSRPlusConfig,
    Field(discriminator="name"),
]

__all__ = [
    "ABXIConfig",
    "AutoCDSRConfig",
    "AutoCDSRPlusConfig",
    "BERT4RecConfig",
    "C2DSRConfig",
    "CDSRNPConfig",
    "CrossDomainConfig",
    "GRU4RecConfig",
    "HSTUConfig",
    "ItemKNNConfig",
    "LLM4CDSRConfig",
    "MarkovConfig",
    "ModelConfig",
    "PopularityConfig",
    "SASRecConfig",
    "count_parameters",
]
