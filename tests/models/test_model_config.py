"""The union of the configs, told apart by `name`."""

import pytest
from pydantic import TypeAdapter, ValidationError

from recsys.models import CrossDomainConfig, ModelConfig

ADAPTER = TypeAdapter(ModelConfig)


@pytest.mark.parametrize(
    "name", ["popularity", "markov", "item_knn", "sasrec", "bert4rec", "gru4rec", "hstu", "cross_domain"]
)
def test_each_name_builds(name, make_catalog):
    config = ADAPTER.validate_python({"name": name})
    assert config.name == name
    assert config.build(make_catalog(2), 10)


def test_a_nested_exchange():
    config = ADAPTER.validate_python({"name": "cross_domain", "cross": {"gate": "tanh", "placement": "stack"}})
    assert isinstance(config, CrossDomainConfig)
    assert config.cross.gate == "tanh"
    assert ADAPTER.validate_python({"name": "cross_domain", "cross": None}).cross is None


@pytest.mark.parametrize(
    "bad", [{"name": "sasrecc"}, {"name": "sasrec", "d_modell": 8}, {"name": "sasrec", "d_model": "8"}, {}]
)
def test_what_is_not_a_model(bad):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(bad)
