"""SASRec: the question of the target domain, and configs that cannot be."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from recsys.models import SASRecConfig

HISTORY = [(1, 0, 1), (2, 1, 2), (3, 0, 3), (4, 1, 4)]


def build(make_catalog, stir, **options):
    return stir(SASRecConfig(d_model=8, d_ff=8, num_heads=2, **options).build(make_catalog(3), 6))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_question_reaches_its_own_position_only(num_layers, make_batch, make_catalog, stir):
    model = build(make_catalog, stir, target_query="domain", num_layers=num_layers)
    asked = [0, 1, 1, 0]
    before = model(make_batch([HISTORY], [asked]))
    for t in range(4):
        for question in (2, None):
            changed = [question if s == t else domain for s, domain in enumerate(asked)]
            after = model(make_batch([HISTORY], [changed]))
            moved = (after != before).any(-1)[0]
            assert moved.tolist() == [s == t for s in range(4)]


def test_the_question_changes_the_order_of_items_and_not_only_a_bias(make_batch, make_catalog, stir):
    model = build(make_catalog, stir, target_query="domain")
    histories = [HISTORY, [(5, 0, 1), (6, 1, 2)]]

    def scores(domain):
        hidden = model(make_batch(histories, [[domain] * len(row) for row in histories]))[:, -1]
        return hidden @ model.item_embeddings().T

    shift = scores(0) - scores(1)
    assert not torch.allclose(shift[0], shift[1])


def test_without_it_no_question_is_read(make_batch, make_catalog, stir):
    model = build(make_catalog, stir)
    batch = make_batch([HISTORY], [[0, 1, 1, 0]])
    other = dataclasses.replace(batch, target_domains=batch.target_domains * 0 + 2)
    assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize("domain_embedding", [True, False])
def test_the_domain_of_an_event_is_read_if_embedded(domain_embedding, make_batch, make_catalog, stir):
    model = build(make_catalog, stir, domain_embedding=domain_embedding)
    batch = make_batch([HISTORY], [[0, 1, 1, 0]])
    other = dataclasses.replace(batch, domains=1 - batch.domains)
    assert torch.equal(model(batch), model(other)) != domain_embedding


def test_config_refuses():
    with pytest.raises(ValidationError, match="num_heads = 3 does not divide d_model = 8; 2 does"):
        SASRecConfig(d_model=8, num_heads=3)
    with pytest.raises(ValidationError):
        SASRecConfig(num_layers=0)
