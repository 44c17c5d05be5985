from __future__ import annotations

import pytest

from lightning_privacy.accounting import GaussianRelease, epsilon
from lightning_privacy.accounting.tiers import Tier, calibrated_tiers
from lightning_privacy.errors import ConfigurationError

TARGETS = {"strict": 1.0, "normal": 3.0, "relaxed": 8.0}
SHARES = {"strict": 0.3, "normal": 0.5, "relaxed": 0.2}


def found(method, **changes):
    arguments = {
        "targets": TARGETS,
        "shares": SHARES,
        "sample_rate": 0.02,
        "steps": 500,
        "delta": 1e-6,
    }
    return calibrated_tiers(method=method, **{**arguments, **changes})


def spent(result, steps=500):
    whole = GaussianRelease(
        noise_multiplier=result.noise_multiplier, sample_rate=result.sample_rate, count=steps
    )
    return {tier.name: epsilon([tier.release(whole)], 1e-6) for tier in result.tiers}


def test_scale_gives_the_published_figures():
    result = found("scale")
    clips = {tier.name: tier.clip_share * result.clip_factor for tier in result.tiers}
    assert clips == pytest.approx({"strict": 0.5203, "normal": 1.0567, "relaxed": 1.5778}, abs=2e-3)
    assert sum(SHARES[name] * clip for name, clip in clips.items()) == pytest.approx(1.0)
    assert result.noise_multiplier * result.clip_factor == pytest.approx(1.0922, abs=2e-3)
    for name, value in spent(result).items():
        assert 0.995 * TARGETS[name] < value <= TARGETS[name]


@pytest.mark.slow
def test_sample_gives_the_published_figures():
    result = found("sample")
    rates = {tier.name: tier.rate_share * result.sample_rate for tier in result.tiers}
    assert result.noise_multiplier == pytest.approx(0.9829, abs=3e-3)
    assert rates == pytest.approx(
        {"strict": 0.00606, "normal": 0.01804, "relaxed": 0.04585}, rel=6e-3
    )
    assert sum(SHARES[name] * rate for name, rate in rates.items()) >= 0.02
    for name, value in spent(result).items():
        assert 0.99 * TARGETS[name] < value <= TARGETS[name]


def test_sample_keeps_each_target_and_the_mean_rate():
    targets, shares = {"a": 2.0, "b": 6.0}, {"a": 0.5, "b": 0.5}
    result = found("sample", targets=targets, shares=shares, steps=20, sample_rate=0.1)
    rates = [tier.rate_share * result.sample_rate for tier in result.tiers]
    assert sum(rates) / 2 >= 0.1
    for name, value in spent(result, 20).items():
        assert value <= targets[name]


def test_equal_targets_are_one_tier():
    result = found("scale", targets={"a": 2.0, "b": 2.0}, shares={"a": 0.5, "b": 0.5})
    assert [tier.clip_share for tier in result.tiers] == [1.0, 1.0]
    assert result.clip_factor == 1.0


@pytest.mark.parametrize("share", [0, 1.0001, -1, float("nan")])
def test_a_tier_only_ever_strengthens(share):
    for name in ("clip_share", "rate_share"):
        with pytest.raises(ConfigurationError, match=f"`{name}` must be a finite number in"):
            Tier(**{"name": "a", name: share})
