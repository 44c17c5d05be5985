from __future__ import annotations

import pytest

from lightning_privacy.accounting import plan_table
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.types import NeighbouringRelation

COMMON = {"dataset_size": 1000, "batch_sizes": [50, 200], "delta": 1e-5, "accountant": "rdp"}


def test_an_epsilon_gives_the_noise_of_each_batch_size():
    small, large = plan_table(**COMMON, epochs=3, epsilon=2.0)
    assert (small["expected_batch_size"], large["expected_batch_size"]) == (50, 200)
    assert (small["sample_rate"], large["sample_rate"]) == (0.05, 0.2)
    assert (small["steps"], large["steps"]) == (60, 15)
    assert small["noise_multiplier"] < large["noise_multiplier"]
    assert small["noise_to_batch"] == small["noise_multiplier"] / 50 > large["noise_to_batch"]
    for row in (small, large):
        assert 1.99 < row["epsilon"] <= 2.0
        assert row["delta"] == 1e-5


def test_a_noise_gives_the_epsilon_of_each_batch_size():
    small, large = plan_table(**COMMON, steps=40, noise_multiplier=1.5)
    assert small["steps"] == large["steps"] == 40
    assert small["epsilon"] < large["epsilon"]


def test_the_rows_agree_with_the_plan():
    fields = {
        "relation": NeighbouringRelation.ADD_OR_REMOVE,
        "sample_rate": 0.05,
        "expected_batch_size": 50,
        "clip_norm": 1.0,
        "steps": 40,
        "delta": 1e-5,
        "accountant": "rdp",
        "precision_slack": 2e-2,
    }
    slack = {"precision_slack": 2e-2}
    row, _ = plan_table(**COMMON, **slack, steps=40, noise_multiplier=1.5)
    assert row["epsilon"] == PrivacyPlan(noise_multiplier=1.5, **fields).epsilon()
    row, _ = plan_table(**COMMON, **slack, steps=40, epsilon=2.0)
    plan = PrivacyPlan.calibrated(epsilon=2.0, **fields)
    assert row["noise_multiplier"] == pytest.approx(plan.noise_multiplier, rel=1e-12)


def test_a_part_of_an_epoch_rounds_up():
    assert plan_table(**COMMON, epochs=0.01, noise_multiplier=1.0)[0]["steps"] == 1
    assert plan_table(**COMMON, epochs=1.01, noise_multiplier=1.0)[0]["steps"] == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": None}, "exactly one of `epochs` and `steps` must be given\nFound: neither"),
        ({"steps": 3}, "exactly one of `epochs` and `steps` must be given\nFound: both"),
        ({"epsilon": None}, "exactly one of `epsilon` and `noise_multiplier` must be given"),
        ({"noise_multiplier": 1.0}, "exactly one of `epsilon` and `noise_multiplier`"),
        ({"dataset_size": 0}, "`dataset_size` must be a whole number >= 1"),
        ({"dataset_size": 1e3}, "`dataset_size` = 1000.0"),
        ({"batch_sizes": []}, "`batch_sizes` must name at least one"),
        ({"batch_sizes": [0]}, r"`batch_sizes` must be a finite number in \(0, 1000\]"),
        ({"batch_sizes": [1001]}, "`batch_sizes` = 1001"),
        ({"epochs": 0}, "`epochs` must be a finite number"),
        ({"epochs": None, "steps": 0}, "`steps` must be a whole number >= 1"),
        ({"epsilon": None, "noise_multiplier": 0}, "`noise_multiplier` must be a finite number"),
        ({"precision_slack": 1}, "`precision_slack` must be a finite number"),
        ({"delta": 1}, "`delta` must be"),
        ({"accountant": "gdp"}, "`accountant` must be one of"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {**COMMON, "epochs": 3, "epsilon": 2.0, **change}
    with pytest.raises(ConfigurationError, match=message):
        plan_table(**arguments)
