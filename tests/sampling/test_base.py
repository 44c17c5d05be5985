from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.sampling import MicroBatch, micro_batches


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("physical", [1, 3, 8, 100, None])
def test_nothing_is_lost_and_nothing_comes_twice(size, physical):
    draw = np.arange(size, dtype=np.int64) * 3
    parts = micro_batches(draw, physical)
    assert [row for part in parts for row in part.indices] == draw.tolist()
    assert all(set(part.weights) == {1.0} for part in parts)
    most = size if physical is None else physical
    sizes = [len(part.indices) for part in parts]
    assert len(sizes) == -(-size // most)
    assert max(sizes) - min(sizes) <= 1
    assert sum(part.drawn for part in parts) == size


@pytest.mark.parametrize("physical", [1, 8, None])
def test_an_empty_draw_is_one_row_of_weight_zero(physical):
    (only,) = micro_batches(np.array([], dtype=np.int64), physical)
    assert only == MicroBatch(indices=(0,), weights=(0.0,))
    assert only.drawn == 0


def test_rows_are_plain_ints():
    (only,) = micro_batches(np.array([3, 5]), 4)
    assert [type(row) for row in only.indices] == [int, int]


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_a_micro_batch_must_have_room(bad):
    with pytest.raises(ConfigurationError, match="`physical_batch_size` must be a whole number"):
        micro_batches([1, 2], bad)


@pytest.mark.parametrize(
    ("indices", "weights"),
    [
        ((), ()),
        ((1, 2), (1.0,)),
        ((1,), (1.0, 1.0)),
        ((1,), (0.5,)),
        ((1,), (2.0,)),
        ((1,), (-1.0,)),
    ],
)
def test_a_micro_batch_has_rows_and_weights_of_zero_or_one(indices, weights):
    with pytest.raises(GuaranteeError, match="at least one row and a weight 0 or 1 for each"):
        MicroBatch(indices=indices, weights=weights)


def test_a_micro_batch_is_frozen():
    (only,) = micro_batches([1], 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        only.weights = (0.0,)
