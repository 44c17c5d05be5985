from __future__ import annotations

import math

import pytest

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling import resolve_sampling
from lightning_privacy.types import NeighbouringRelation

ADD, ZERO = NeighbouringRelation.ADD_OR_REMOVE, NeighbouringRelation.ZERO_OUT
DEFAULTS = {
    "sample_rate": None,
    "expected_batch_size": None,
    "dataset_size": None,
    "actual_size": 1000,
    "loader_batch_size": 20,
    "world_size": 1,
}


@pytest.mark.parametrize(
    ("given", "rate", "batch", "relation", "steps"),
    [
        # Declared alone: nothing depends on the data set's length of 1000.
        ({"sample_rate": 0.01, "dataset_size": 5000}, 0.01, 50, ADD, 100),
        ({"sample_rate": 0.01, "expected_batch_size": 64}, 0.01, 64, ADD, 100),
        ({"expected_batch_size": 50, "dataset_size": 2000}, 0.025, 50, ADD, 40),
        (
            {"sample_rate": 0.025, "expected_batch_size": 50, "dataset_size": 2000},
            0.025, 50, ADD, 40,
        ),
        ({"dataset_size": 2000}, 0.01, 20, ADD, 100),
        ({"dataset_size": 2000, "world_size": 4}, 0.04, 80, ADD, 25),
        # From the data set's own length, which is public then.
        ({"sample_rate": 0.01}, 0.01, 10, ZERO, 100),
        ({"expected_batch_size": 50}, 0.05, 50, ZERO, 20),
        ({}, 0.02, 20, ZERO, 50),
        ({"world_size": 2}, 0.04, 40, ZERO, 25),
        ({"expected_batch_size": 1000}, 1.0, 1000, ZERO, 1),
        ({"expected_batch_size": 3, "actual_size": 4}, 0.75, 3, ZERO, 1),
        ({"expected_batch_size": 0.5}, 0.0005, 0.5, ZERO, 2000),
    ],
)  # fmt: skip
def test_the_rate_and_the_relation_follow_from_what_was_declared(
    given, rate, batch, relation, steps
):
    found = resolve_sampling(**{**DEFAULTS, **given})
    assert found.sample_rate == pytest.approx(rate, rel=1e-12)
    assert found.expected_batch_size == pytest.approx(batch, rel=1e-12)
    assert found.relation is relation
    assert found.steps_per_epoch == steps
    public = "taken as public"
    assert (public in found.note) == (relation is ZERO)


@pytest.mark.parametrize(
    "given",
    [
        {"sample_rate": 0.01, "dataset_size": 5000},
        {"sample_rate": 0.01, "expected_batch_size": 64},
        {"expected_batch_size": 50, "dataset_size": 2000},
        {"dataset_size": 2000},
    ],
)
def test_under_add_or_remove_nothing_depends_on_the_length(given):
    found = [resolve_sampling(**{**DEFAULTS, **given, "actual_size": n}) for n in (999, 1000, 1001)]
    assert found[0] == found[1] == found[2]


def test_the_loader_s_batch_size_is_named_when_it_is_used():
    assert "loader's batch size" in resolve_sampling(**DEFAULTS).note
    given = {**DEFAULTS, "expected_batch_size": 50}
    assert "loader's batch size" not in resolve_sampling(**given).note


def test_it_can_be_unpacked():
    rate, batch, relation, steps, note = resolve_sampling(**DEFAULTS)
    assert (rate, batch, relation, steps) == (0.02, 20.0, ZERO, 50)
    assert note


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_rate": 0}, r"`sample_rate` must be a finite number in \(0, 1\]"),
        ({"sample_rate": 1.5}, "`sample_rate` = 1.5"),
        ({"sample_rate": True}, "`sample_rate` = True"),
        ({"sample_rate": math.nan}, "`sample_rate` = nan"),
        (
            {"expected_batch_size": 0},
            r"`expected_batch_size` must be .* in \(0, inf\)",
        ),
        ({"expected_batch_size": -8}, "`expected_batch_size` = -8"),
        ({"expected_batch_size": math.inf}, "`expected_batch_size` = inf"),
        ({"expected_batch_size": False}, "`expected_batch_size` = False"),
        ({"dataset_size": 0}, "`dataset_size` must be a whole number >= 1"),
        ({"dataset_size": 2.5}, "`dataset_size` = 2.5"),
        ({"dataset_size": True}, "`dataset_size` = True"),
        ({"actual_size": 0}, "`actual_size` must be a whole number >= 1"),
        ({"loader_batch_size": None}, "`loader_batch_size` = None"),
        ({"sample_rate": 1e-300}, "Found: a sample rate of 1e-300"),
        ({"world_size": 0}, "`world_size` must be a whole number >= 1"),
        ({"expected_batch_size": 1001}, "must be at most the number of units"),
        ({"expected_batch_size": 60, "dataset_size": 50}, "the declared dataset_size, 50"),
        ({"loader_batch_size": 2000}, "the data set's length, 1000"),
        (
            {"sample_rate": 0.1, "expected_batch_size": 64, "dataset_size": 2000},
            "must be `sample_rate` x `dataset_size`\nFound: 64, where 0.1 x 2000 = 200",
        ),
    ],
)
def test_wrong_or_contradicting_arguments_are_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_sampling(**{**DEFAULTS, **given})
