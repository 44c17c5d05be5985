from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest

from lightning_privacy.accounting import GaussianRelease
from lightning_privacy.accounting.events import merged
from lightning_privacy.errors import ConfigurationError, GuaranteeError
from tests.accounting.goldens import release


def test_a_release_is_a_frozen_value():
    event = release(1.1, 0.01, 5)
    assert event == release(1.1, 0.01, 5)
    assert hash(event) == hash(release(1.1, 0.01, 5))
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.count = 0


def test_round_trip_of_plain_scalars():
    event = GaussianRelease(
        noise_multiplier=np.float32(1.5), sample_rate=np.float64(0.5), count=np.int64(7)
    )
    fields = event.to_dict()
    assert [type(value) for value in fields.values()] == [float, float, int]
    assert GaussianRelease.from_dict(fields) == event


@pytest.mark.parametrize(
    ("field", "bad", "message"),
    [
        ("noise_multiplier", -0.1, r"`noise_multiplier` must be a finite number in \[0, inf\)"),
        ("noise_multiplier", math.nan, "`noise_multiplier` = nan"),
        ("noise_multiplier", math.inf, "`noise_multiplier` = inf"),
        ("noise_multiplier", True, "`noise_multiplier` = True"),
        ("noise_multiplier", "1", "`noise_multiplier` = '1'"),
        ("sample_rate", 0, r"`sample_rate` must be a finite number in \(0, 1\]"),
        ("sample_rate", 1.0001, "`sample_rate` = 1.0001"),
        ("sample_rate", None, "`sample_rate` = None"),
        ("count", -1, "`count` must be a whole number >= 0"),
        ("count", 1.0, "`count` = 1.0"),
        ("count", True, "`count` = True"),
    ],
)
def test_wrong_fields_are_refused(field, bad, message):
    fields = {"noise_multiplier": 1.0, "sample_rate": 0.1, "count": 1, field: bad}
    with pytest.raises(ConfigurationError, match=message):
        GaussianRelease(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"noise_multiplier": 1.0, "sample_rate": 0.1},
        {"noise_multiplier": 1.0, "sample_rate": 0.1, "count": 1, "more": 0},
    ],
)
def test_stored_fields_must_be_exactly_the_known_ones(fields):
    with pytest.raises(GuaranteeError, match="must have exactly the fields"):
        GaussianRelease.from_dict(fields)


def test_equal_mechanisms_merge_wherever_they_stand():
    events = [
        release(1.0, 0.1, 2),
        release(2.0, 0.1, 1),
        release(1.0, 0.1, 3),
        release(3.0, 0.1, 0),
    ]
    assert merged(events) == (release(1.0, 0.1, 5), release(2.0, 0.1, 1))
    assert merged([]) == ()


def test_times_keeps_the_mechanism():
    assert release(1.0, 0.1, 2).times(9) == release(1.0, 0.1, 9)
    assert release(1.0, 0.1, 2).same_mechanism(release(1.0, 0.1, 9))
    assert not release(1.0, 0.1).same_mechanism(release(1.0, 0.2))
    assert not release(1.0, 0.1).same_mechanism(release(1.1, 0.1))
