"""A mean and a deviation that are paid for."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_privacy import PrivacyLedger
from lightning_privacy.accounting import epsilon
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.statistics import private_mean_and_std

BOUNDS = {"lower": 0.0, "upper": 2.0, "delta": 1e-5}


def test_with_many_units_they_are_near():
    values = np.random.default_rng(0).normal(0.8, 0.2, 20_000)
    paid = private_mean_and_std(values, epsilon=1.0, **BOUNDS)
    assert paid.mean == pytest.approx(0.8, abs=0.01)
    assert paid.std == pytest.approx(0.2, abs=0.02)


def test_the_noise_is_what_the_budget_asks_for(tmp_path):
    paid = private_mean_and_std([1.0], epsilon=0.5, **BOUNDS)
    assert epsilon(paid.releases, 1e-5) == pytest.approx(0.5, abs=0.01)
    ledger = PrivacyLedger(tmp_path / "spent.sqlite", dataset="sounds", budget=(1.0, 1e-5))
    ledger.reserve("mean and std", paid.releases)
    assert 0.4 < ledger.epsilon() < 0.6


def test_the_noise_has_the_size_of_one_units_contribution():
    """With one unit of value 0 the mean is noise of std sigma sqrt(2), cut at the bounds."""
    sigma = private_mean_and_std([1.0], epsilon=100.0, **BOUNDS).releases[0].noise_multiplier
    found = [private_mean_and_std([1.0], epsilon=100.0, **BOUNDS).mean - 1 for _ in range(200)]
    assert np.std(found) == pytest.approx(sigma * np.sqrt(2), rel=0.25)


def test_what_is_released_lies_on_a_grid():
    """Whatever the sum was; else the low bits of a single number tell it (Mironov 2012)."""
    for value in (1.0, 0.3, 1.7000001):
        means = [private_mean_and_std([value], epsilon=100.0, **BOUNDS).mean for _ in range(20)]
        assert all(((mean - 1) * 2**20).is_integer() for mean in means)


def test_values_out_of_bounds_and_nan_have_no_more_influence():
    values = [np.nan, np.inf, -1e30, 1.0] * 5000
    paid = private_mean_and_std(values, epsilon=1.0, **BOUNDS)
    assert paid.mean == pytest.approx(1.0, abs=0.02)  # the middle, both bounds, and 1


@pytest.mark.parametrize(
    "wrong", [{"values": []}, {"lower": 2.0}, {"upper": float("inf")}, {"epsilon": 0.0}], ids=str
)
def test_what_has_no_bound_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        private_mean_and_std(**{"values": [1.0], "epsilon": 1.0, **BOUNDS, **wrong})
