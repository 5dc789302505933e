"""The stand-in that the benchmark holds ABXI's step against does the same as that step."""

import sys
from pathlib import Path

import pytest
import torch

from recsys.data.batches import TrainBatches
from recsys.experiment import Experiment, build_model, load_data
from recsys.loading import parse_config
from recsys.models.abxi import ABXI
from recsys.types import PAD_ID

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import naive_abxi

VALUES = {
    "name": "small",
    "data": {"source": {"name": "synthetic", "num_users": 40, "items_per_domain": 50, "max_events": 30}, "max_len": 20},
    "model": {"name": "abxi", "d_model": 16, "d_ff": 24, "domain_rank": 2, "invariant_rank": 3, "dropout": 0.0},
    "loss": {"name": "infonce"},
    "negatives": {"name": "uniform", "num_negatives": 6, "scope": "each_domain"},
}


@pytest.mark.parametrize("num_domains", [2, 3])
def test_loss_and_gradients_are_those_of_the_step(num_domains: int) -> None:
    experiment = parse_config(VALUES, Experiment, "small")
    source = experiment.data.source.model_copy(update={"num_domains": num_domains})
    experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"source": source})})
    data = load_data(experiment.data, None)
    model = build_model(experiment, data)
    assert isinstance(model, ABXI)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in model.parameters():  # no map is zero, so that each one counts
            part += 0.05 * torch.randn(part.shape, generator=generator)
        model.embedding.items.weight[PAD_ID] = 0
    batches = TrainBatches(
        data.sequences, data.split, max_len=20, batch_size=16, seed=0, device="cpu", domain=None, windows="last"
    )
    batch = next(iter(batches))
    assert experiment.loss is not None
    assert experiment.negatives is not None
    sampler = experiment.negatives.build(data.catalog, torch.Generator().manual_seed(2))

    loss = experiment.loss.build(data.catalog)(model(batch), model.item_embeddings(), batch, sampler)
    loss.backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}

    asked = batch.targets != PAD_ID
    sampler.generator.manual_seed(2)
    drawn = torch.zeros(*batch.targets.shape, 6 * num_domains, dtype=torch.long)
    drawn[asked] = sampler.draw(batch.targets[asked]).items
    model.zero_grad()
    naive = naive_abxi.loss(naive_abxi.hidden(model, batch), model.item_embeddings(), batch, drawn, 0.75, num_domains)
    naive.backward()

    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=0)
    for name, part in model.named_parameters():
        assert part.grad is not None
        assert (part.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
