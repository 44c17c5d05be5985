from __future__ import annotations

import math
import time

import pytest

from lightning_privacy.accounting import calibrate, epsilon, max_steps, noise_multiplier_for
from lightning_privacy.errors import ConfigurationError
from tests.accounting.goldens import exact_epsilon, golden, release

CALIBRATIONS = golden("published")["calibration"]["rows"]
BUDGET = {"epsilon": 2.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 60}


@pytest.mark.parametrize(("target", "delta", "q", "steps", "sigma", "where"), CALIBRATIONS)
def test_calibration_is_safe_and_as_tight_as_the_published_one(
    target, delta, q, steps, sigma, where
):
    found = noise_multiplier_for(epsilon=target, delta=delta, sample_rate=q, steps=steps)
    assert found == pytest.approx(sigma, rel=1e-3)
    spent = epsilon([release(found, q, steps)], delta)
    assert target * (1 - 1e-3) <= spent <= target


def test_a_typical_calibration_takes_less_than_two_seconds():
    import scipy.fft
    import scipy.optimize  # noqa: F401

    start = time.thread_time()
    noise_multiplier_for(epsilon=8.0, delta=1e-5, sample_rate=0.0131, steps=231)
    assert time.thread_time() - start < 2


def test_the_search_stays_away_from_small_multipliers(monkeypatch):
    asked = []
    original = calibrate.epsilon_of

    def watched(releases, *args):
        asked.append(releases[0].noise_multiplier)
        return original(releases, *args)

    monkeypatch.setattr(calibrate, "epsilon_of", watched)
    for target, delta, q, steps, *_ in CALIBRATIONS:
        noise_multiplier_for(epsilon=target, delta=delta, sample_rate=q, steps=steps)
    assert min(asked) > 0.3
    assert len(asked) < 12 * len(CALIBRATIONS)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_every_accountant_is_calibrated_for_itself(accountant):
    sigma = noise_multiplier_for(**BUDGET, accountant=accountant)
    spent = epsilon([release(sigma, 0.1, 60)], 1e-5, accountant)
    assert 2.0 * (1 - 2e-3) <= spent <= 2.0


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [
        (0.01, 1e-6, 0.01, 1000),
        (100.0, 1e-5, 0.01, 10),
        (1000.0, 1e-5, 0.1, 10),
        (8.0, 1e-5, 0.01, 1),
        (1.0, 1e-9, 1e-4, 100_000),
        (0.5, 0.1, 0.2, 5),
        (1e300, 1e-3, 0.01, 1),
    ],
)
def test_unusual_budgets_end_on_the_safe_side(target, delta, q, steps):
    sigma = noise_multiplier_for(epsilon=target, delta=delta, sample_rate=q, steps=steps)
    assert sigma > 0
    assert epsilon([release(sigma, q, steps)], delta) <= target


def test_the_unsampled_gaussian_is_calibrated_exactly():
    sigma = noise_multiplier_for(epsilon=1.0, delta=1e-5, sample_rate=1.0, steps=25)
    assert exact_epsilon(5 / sigma, 1e-5) == pytest.approx(1.0, rel=1e-3)


def test_a_budget_that_no_noise_reaches_is_refused(monkeypatch):
    monkeypatch.setattr(calibrate, "_LARGEST_NOISE_MULTIPLIER", 10.0)
    with pytest.raises(ConfigurationError, match="some noise multiplier must reach the target ε"):
        noise_multiplier_for(**{**BUDGET, "epsilon": 0.01})


def test_prv_adds_a_hundredth_to_every_epsilon():
    with pytest.raises(ConfigurationError, match="Opacus's PRV accountant adds 0.01"):
        noise_multiplier_for(**{**BUDGET, "epsilon": 0.01}, accountant="prv")


@pytest.mark.parametrize("slope", [-50.0, -1.0, -0.01])
@pytest.mark.parametrize("start", [0.5, 0.999, 1.0, 1.5])
def test_what_the_fine_grid_says_decides(slope, start):
    # Wherever the search grid's answer and slope point to, the end fits the reporting grid.
    found = calibrate._refined(lambda sigma: 1 / sigma, 1.0, start, slope)
    assert 1 / found <= 1


def test_more_budget_needs_less_noise():
    sigmas = [noise_multiplier_for(**{**BUDGET, "epsilon": target}) for target in (1, 2, 4)]
    assert sigmas == sorted(sigmas, reverse=True)
    assert noise_multiplier_for(**{**BUDGET, "steps": 61}) > sigmas[1]


@pytest.mark.parametrize(
    ("target", "delta", "q", "sigma", "steps", "where"), golden("published")["steps"]["rows"]
)
def test_published_step_counts(target, delta, q, sigma, steps, where):
    assert max_steps(epsilon=target, delta=delta, sample_rate=q, noise_multiplier=sigma) == steps


@pytest.mark.parametrize(
    ("target", "delta", "q", "sigma", "accountant"),
    [
        (2.0, 1e-6, 0.1, 3.0, "pld"),
        (1.0, 1e-5, 0.01, 4.0, "pld"),
        (8.0, 1e-5, 0.015, 0.54, "pld"),
        (3.0, 1e-5, 0.2, 1.0, "pld"),
        (3.0, 1e-5, 1.0, 9.0, "pld"),
        (3.0, 1e-5, 0.02, 1.0, "rdp"),
    ],
)
def test_max_steps_is_exact(target, delta, q, sigma, accountant):
    steps = max_steps(
        epsilon=target,
        delta=delta,
        sample_rate=q,
        noise_multiplier=sigma,
        accountant=accountant,
    )
    assert steps >= 1
    assert epsilon([release(sigma, q, steps)], delta, accountant) <= target
    assert target < epsilon([release(sigma, q, steps + 1)], delta, accountant)


def test_no_step_fits_a_tiny_budget_or_no_noise():
    common = {"delta": 1e-5, "sample_rate": 0.5}
    assert max_steps(epsilon=0.1, noise_multiplier=0.5, **common) == 0
    assert max_steps(epsilon=10.0, noise_multiplier=0.0, **common) == 0


def test_one_step_fits_exactly():
    common = {"delta": 1e-5, "sample_rate": 0.5}
    budget = epsilon([release(1.0, 0.5, 1)], 1e-5)
    assert max_steps(epsilon=budget, noise_multiplier=1.0, **common) == 1


def test_max_steps_looks_no_further_than_it_says(monkeypatch):
    monkeypatch.setattr(calibrate, "LARGEST_STEP_COUNT", 1000)
    assert max_steps(epsilon=8.0, delta=1e-5, sample_rate=0.001, noise_multiplier=5.0) == 1000


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("epsilon", 0, r"`epsilon` must be a finite number in \(0, inf\)"),
        ("epsilon", -1, "`epsilon` = -1"),
        ("epsilon", math.inf, "`epsilon` = inf"),
        ("epsilon", math.nan, "`epsilon` = nan"),
        ("epsilon", True, "`epsilon` = True"),
        ("delta", 0, "`delta` must be"),
        ("delta", 1, "`delta` must be"),
        ("sample_rate", 0, "`sample_rate` must be"),
        ("sample_rate", 1.5, "`sample_rate` must be"),
        ("sample_rate", "0.1", "`sample_rate` = '0.1'"),
        ("steps", 0, "`steps` must be a whole number >= 1"),
        ("steps", 1.5, "`steps` = 1.5"),
        ("steps", True, "`steps` = True"),
        ("accountant", "gdp", "`accountant` must be one of"),
    ],
)
def test_wrong_arguments_are_refused(name, bad, message):
    with pytest.raises(ConfigurationError, match=message):
        noise_multiplier_for(**{**BUDGET, name: bad})
    if name == "steps":
        return
    common = {"epsilon": 2.0, "delta": 1e-5, "sample_rate": 0.1, "noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match=message):
        max_steps(**{**common, name: bad})
