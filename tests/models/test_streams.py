"""Cutting merged histories into streams, on an example written out by hand."""

import torch

from recsys.models.streams import cut_streams
from recsys.sizes import Block


def test_an_example(make_batch):
    # User 0 asks for A at an event of B, and the last question is B. User 1 has A only and is never asked for B.
    batch = make_batch([[(1, 0, 1), (2, 1, 2), (3, 1, 3), (4, 0, 4)], [(5, 0, 7)]], [[1, 0, None, 1], [0]], pad=1)
    streams = cut_streams(batch, 3)
    assert streams.blocks == (Block(2, 3, 4), Block(1, 4, 4), Block(0, 0, 0))
    a, b, c = (
        {name: streams.split(getattr(streams, name))[k].tolist() for name in ("item", "count", "position", "event")}
        for k in range(3)
    )
    assert a["item"] == [[1, 1, 4], [0, 0, 5]]
    assert a["count"] == [[1, 1, 2], [0, 0, 1]]
    assert a["position"] == [[1, 2, 4], [0, 0, 4]]
    assert a["event"] == [[True, False, True], [False, False, True]]
    assert b["item"] == [[0, 2, 3, 3]]  # asked for B before the first event of B
    assert b["count"] == [[0, 1, 2, 2]]
    assert b["position"] == [[1, 2, 3, 4]]
    assert b["event"] == [[False, True, True, False]]
    assert c["item"] == []
    assert [users.tolist() for users in streams.users()] == [[0, 1], [0], []]
    assert streams.real.tolist() == [True, True, True, False, False, True, True, True, True, True]
    assert streams.domain.tolist() == [0] * 6 + [1] * 4
    assert streams.event_slot.tolist() == [[10, 0, 7, 8, 2], [10, 10, 10, 10, 5]]
    assert streams.question_slot.tolist() == [[10, 6, 1, 10, 9], [10, 10, 10, 10, 5]]
    numbers = torch.arange(10.0)[:, None]
    assert streams.gather(streams.split(numbers), streams.question_slot)[0, :, 0].tolist() == [0, 6, 1, 0, 9]


def test_a_question_without_a_history_has_no_slot(make_batch):
    batch = make_batch([[]], [[]], pad=2)
    batch.target_domains[0, 1] = 0
    streams = cut_streams(batch, 2)
    assert streams.blocks == (Block(0, 0, 0),) * 2
    assert streams.question_slot.tolist() == [[0, 0]]
