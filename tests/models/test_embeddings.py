"""Embedding tables: the padding row, positions."""

import torch

from recsys.models.embeddings import ItemEmbedding, event_positions
from recsys.models.initialization import initialize
from recsys.types import PAD_ID


def test_the_padding_row_stays_zero_whatever_the_loss_and_optimizer_do():
    table = ItemEmbedding(5, 4)
    initialize(table, torch.Generator().manual_seed(0))
    before = table.weight.detach().clone()
    assert (before[PAD_ID] == 0).all()
    assert 0.005 < before[1:].std() < 0.04
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = table(torch.tensor([[0, 1, 2]])) + 1
        (hidden @ table.weight.T).logsumexp(-1).sum().backward()  # a softmax over all rows, padding included
        optimizer.step()
    assert (table.weight[PAD_ID] == 0).all()
    assert (table.weight[1:] != before[1:]).all()


def test_positions_count_from_the_first_event():
    mask = torch.tensor([[False, False, True, True, True], [True] * 5, [False] * 5])
    assert event_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0] * 5]
