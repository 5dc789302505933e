"""Parameters and operations against closed forms."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recsys.models import CrossDomainConfig, ItemKNNConfig, SASRecConfig
from recsys.models.attention import CrossConfig
from recsys.scaling.count import count_flops, count_model, full_batch, measure_flops
from recsys.types import NO_DOMAIN, PAD_ID


def block(d: int, ff: int) -> int:
    """Attention, feed-forward map and two LayerNorms."""
    return 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d


def test_sasrec_in_closed_form(make_catalog):
    d, ff, layers, length = 8, 12, 3, 10
    config = SASRecConfig(d_model=d, d_ff=ff, num_layers=layers, num_heads=2, target_query="domain")
    counted = count_model(config, make_catalog(2, 60), length)
    assert counted.item_table == 61 * d
    assert counted.other_embeddings == (length + 2 + 2) * d
    assert counted.encoder == layers * block(d, ff)
    assert counted.output_head == 2 * d
    assert counted.cross_attention == counted.gate == 0
    assert counted.dense == layers * block(d, ff) + 2 * d
    assert counted.total == counted.trainable == counted.dense + 61 * d + 14 * d
    assert counted.active == counted.dense + 14 * d + 10 * d


@pytest.mark.parametrize(("gate", "size"), [("sigmoid", 12 * 64 + 5 * 8), ("scalar", 1), ("none", 0)])
def test_cross_domain_in_closed_form(gate, size, make_catalog):
    d, ff, domains = 8, 12, 3
    config = CrossDomainConfig(d_model=d, d_ff=ff, num_layers=2, cross=CrossConfig(gate=gate, num_units=2))
    counted = count_model(config, make_catalog(domains, 60), 10)
    units = 2 * domains
    assert counted.gate == units * size
    assert counted.cross_attention == units * (4 * d * d + 4 * d + 4 * d)
    assert counted.encoder == 2 * domains * block(d, ff)
    assert counted.output_head == domains * 2 * d
    assert counted.total == counted.dense + counted.item_table + counted.other_embeddings


def test_a_history_longer_than_the_catalogue_reads_all_of_it(make_catalog):
    counted = count_model(SASRecConfig(d_model=8), make_catalog(2, 4), 10)
    assert counted.active == counted.total - 8  # the row of padding


def test_a_counting_model_has_no_parameters(make_catalog):
    assert count_model(ItemKNNConfig(), make_catalog(), 10).total == 0


CONFIGS = [
    SASRecConfig(d_model=8, d_ff=12, num_layers=2, target_query="domain"),
    CrossDomainConfig(d_model=8, d_ff=12, num_layers=2),
    *(
        CrossDomainConfig(d_model=8, d_ff=12, num_layers=2, cross=CrossConfig(gate=gate, placement=placement))
        for gate in ("sigmoid", "tanh", "scalar", "none")
        for placement in ("early", "stack")
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_counted_parameter_gets_a_gradient(config, make_catalog):
    catalog, length = make_catalog(3, 12), 12
    model = config.build(catalog, length, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as it starts, a scalar gate is closed and nothing behind it learns
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    batch = full_batch(catalog, length)
    hidden = model(batch)
    torch.nn.functional.cross_entropy((hidden @ model.item_embeddings().T)[0], batch.targets[0]).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
    reached = sum(parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
    assert reached == count_model(config, catalog, length).trainable


def test_a_parameter_that_nothing_reads_would_be_seen(make_catalog):
    # No item of the second domain and no question about it: its encoder is idle.
    catalog = make_catalog(2, 12)
    model = CrossDomainConfig(d_model=8, d_ff=12).build(catalog, 6, torch.Generator().manual_seed(0))
    batch = full_batch(catalog, 6)
    # Every other event: those of the first domain.
    own = replace(batch, target_domains=batch.domains).map(lambda tensor: tensor[..., ::2])
    model(own).sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert any(name.startswith("layers.0.1.") for name in idle)


# Operations


def test_an_encoder_of_torch_in_closed_form():
    """4 layers, d 1024, 16 heads, d_ff 4096, 2 sequences of 128; the first in-projection needs no input gradient."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).train()
        x = torch.zeros(2, 128, 1024)
    _, step = measure_flops(lambda: encoder(x))
    tokens, d, ff = 256, 1024, 4096
    linears = 4 * 3 * 2 * tokens * (4 * d * d + 2 * d * ff) - 2 * tokens * 3 * d * d
    attention = 4 * 3 * 2 * (2 * 2 * 128 * 128 * d)
    assert (linears, attention) == (75_698_798_592, 1_610_612_736)
    assert step == linears + attention == 77_309_411_328


def test_sasrec_operations_in_closed_form(make_catalog):
    d, ff, layers, length, items = 16, 24, 2, 10, 60
    config = SASRecConfig(d_model=d, d_ff=ff, num_layers=layers)
    catalog = make_catalog(2, items)
    flops = count_flops(config, catalog, full_batch(catalog, length, batch_size=3))
    forward = 3 * layers * (2 * length * (4 * d * d + 2 * d * ff) + 2 * 2 * length * length * d)
    assert flops.forward == forward
    assert flops.step == 3 * forward  # the embeddings learn, so every product has both of its gradients
    assert flops.logits_forward == 2 * 3 * length * d * items // 2  # against the target's domain
    assert flops.logits_step == 3 * flops.logits_forward
    assert (
        count_flops(config, catalog, full_batch(catalog, length), candidates=11).logits_forward == 2 * length * d * 11
    )


def test_logits_cost_what_the_counter_says():
    with torch.device("meta"):
        hidden = torch.zeros(30, 16, requires_grad=True)
        table = torch.zeros(61, 16, requires_grad=True)
    assert measure_flops(lambda: hidden @ table.T) == (2 * 30 * 16 * 61, 3 * 2 * 30 * 16 * 61)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[3]], ids=str)
def test_the_count_does_not_depend_on_device_or_dropout(config, dropout, make_catalog):
    catalog = make_catalog(3, 30)
    batch = full_batch(catalog, 10, batch_size=2)
    real = type(config).model_validate({**config.model_dump(), "dropout": dropout}).build(catalog, 10)
    flops = count_flops(config, catalog, batch)
    assert (flops.forward, flops.step) == measure_flops(lambda: real(batch))
    assert flops.forward > 0


def test_the_exchange_costs_something(make_catalog):
    catalog = make_catalog(2, 30)
    batch = full_batch(catalog, 10)
    without, with_exchange = (count_flops(config, catalog, batch) for config in (CONFIGS[1], CONFIGS[2]))
    assert with_exchange.forward > without.forward
    assert with_exchange.logits_forward == without.logits_forward


def test_the_full_batch_is_one_a_loader_could_give(make_catalog):
    catalog = make_catalog(3, 5)
    batch = full_batch(catalog, 8, batch_size=2)
    assert batch.items.shape == (2, 8)
    assert batch.mask.all()
    assert (catalog.item_domain[batch.items] == batch.domains).all()
    assert (catalog.item_domain[batch.targets] == batch.target_domains).all()
    assert (batch.items[:, 1:] == batch.targets[:, :-1]).all()
    assert (batch.targets != PAD_ID).all()
    assert (batch.target_domains != NO_DOMAIN).all()
