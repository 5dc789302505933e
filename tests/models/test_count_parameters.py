"""Parameters by group: closed forms, sums, and the meta device."""

import pytest
import torch
from torch import nn

from recsys.models import CrossDomainConfig, ItemKNNConfig, SASRecConfig, count_parameters
from recsys.models.attention import CrossConfig


def test_sasrec_in_closed_form(make_catalog):
    d, ff, layers, length = 8, 12, 3, 10
    config = SASRecConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2, target_query="domain")
    counts = count_parameters(config.build(make_catalog(2, num_items=60), length))
    block = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d
    assert counts == {
        "item_table": 61 * d,
        "other_embeddings": (length + 2 + 2) * d,
        "encoder": layers * block,
        "cross_attention": 0,
        "gate": 0,
        "output": 2 * d,
        "total": 61 * d + (length + 4) * d + layers * block + 2 * d,
    }


@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "scalar", "none"])
def test_host_sums_to_the_total_on_the_meta_device(gate, make_catalog):
    catalog = make_catalog(3)
    config = CrossDomainConfig(d_model=8, d_ff=12, num_heads=2, cross=CrossConfig(gate=gate, num_units=2))
    with torch.device("meta"):
        model = config.build(catalog, 10)
    counts = count_parameters(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert counts == count_parameters(config.build(catalog, 10))
    assert counts["total"] == sum(number for group, number in counts.items() if group != "total")
    assert counts["gate"] == 6 * {"sigmoid": 12 * 64 + 5 * 8, "tanh": 12 * 64 + 5 * 8, "scalar": 1, "none": 0}[gate]
    assert counts["output"] == 3 * 16


def test_a_counting_model_has_none(make_catalog):
    assert count_parameters(ItemKNNConfig().build(make_catalog(2), 10))["total"] == 0


def test_an_unknown_or_shared_parameter_is_a_bug():
    with pytest.raises(AssertionError, match=r"Conv1d\.weight is in no group"):
        count_parameters(nn.Sequential(nn.Conv1d(1, 1, 1)))
    twice = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="counted twice"):
        count_parameters(nn.Sequential(twice, nn.Sequential(twice)))
