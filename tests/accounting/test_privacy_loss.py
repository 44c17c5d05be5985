from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate
from scipy.optimize import brentq

from lightning_privacy.accounting import GaussianRelease, privacy_loss
from lightning_privacy.accounting.privacy_loss import hockey_stick, pld_delta, pld_epsilon
from tests.accounting.goldens import exact_delta, exact_epsilon, release


def composed(sigma: float, q: float, count: int, width: float) -> list:
    """Both directions, by convolution even where a closed form would do."""
    singles = privacy_loss._single_losses(sigma, q, width)
    return [privacy_loss._Composition(((single, count),), width) for single in singles]


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (0.5, 0.7), (2.0, 1.0), (0.3, 0.01)])
@pytest.mark.parametrize("epsilon", [-2.0, -0.05, 0.0, 0.05, 1.0, 4.0])
def test_hockey_stick_is_the_integral_that_defines_it(sigma, q, epsilon):
    def densities(x):
        still = math.exp(-0.5 * (x / sigma) ** 2)
        mixed = (1 - q) * still + q * math.exp(-0.5 * ((x - 1) / sigma) ** 2)
        return mixed / sigma / math.sqrt(2 * math.pi), still / sigma / math.sqrt(2 * math.pi)

    def removed(x):
        mixed, still = densities(x)
        return max(0.0, mixed - math.exp(epsilon) * still)

    def added(x):
        mixed, still = densities(x)
        return max(0.0, still - math.exp(epsilon) * mixed)

    ours = [float(side[0]) for side in hockey_stick(np.array([epsilon]), sigma, q)]
    grid = np.linspace(-12 * sigma, 1 + 12 * sigma, 60)
    for value, integrand in zip(ours, (removed, added), strict=True):
        pieces = itertools.pairwise(grid)
        truth = sum(integrate.quad(integrand, *piece, limit=200)[0] for piece in pieces)
        assert value == pytest.approx(truth, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("sigma", "q"), [(1.0, 0.01), (0.54, 0.0152), (4.0, 0.01), (2.0, 0.5), (20.0, 1.0)]
)
def test_one_release_agrees_with_dp_accounting(sigma, q):
    from dp_accounting.pld import privacy_loss_distribution

    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    )
    ours = privacy_loss._single_losses(sigma, q, 1e-3)
    for mine, other in zip(ours, (theirs._pmf_remove, theirs._pmf_add), strict=True):
        dense = other.to_dense_pmf()
        start = max(mine.bottom, dense._lower_loss)
        stop = min(mine.bottom + len(mine.masses), dense._lower_loss + dense.size)
        left = mine.masses[start - mine.bottom : stop - mine.bottom]
        right = dense._probs[start - dense._lower_loss : stop - dense._lower_loss]
        np.testing.assert_allclose(left, right, atol=1e-10)
        assert stop - start > 10


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.01), (0.4, 0.3), (3.0, 1.0), (100.0, 0.001)])
def test_masses_are_probabilities_in_both_directions(sigma, q):
    for loss in privacy_loss._single_losses(sigma, q, 1e-4):
        assert loss.masses.min() >= 0
        assert loss.masses.sum() + loss.infinite == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 1.0, 700), (0.3, 2.0, 40), (0.05, 0.6, 9)]
)
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_compositions_agree_with_dp_accounting(q, sigma, steps, delta):
    from dp_accounting.pld import privacy_loss_distribution

    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    ).self_compose(steps)
    sides = composed(sigma, q, steps, 1e-3)
    ours = max(privacy_loss._epsilon(side, delta) for side in sides)
    assert ours == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-6, abs=1e-6)
    at_one = max(privacy_loss._delta(side, 1.0) for side in sides)
    assert at_one == pytest.approx(theirs.get_delta_for_epsilon(1.0), rel=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize(("mu", "count"), [(0.5, 100_000), (1.0, 10_000), (5.0, 1000)])
def test_an_fft_of_many_releases_never_falls_below_the_exact_gaussian(mu, count, delta):
    # dp-accounting 0.6.0 gives 3.351 here for mu 0.5, 1e5 releases, δ 1e-12: 3.449 is exact.
    truth = exact_epsilon(mu, delta)
    sides = composed(math.sqrt(count) / mu, 1.0, count, 1e-4)
    values = [privacy_loss._epsilon(side, delta) for side in sides]
    assert truth <= max(values) <= truth * 1.001 + 1e-3
    deltas = [privacy_loss._delta(side, truth) for side in sides]
    assert exact_delta(mu, truth) * (1 - 1e-9) <= max(deltas) <= delta * 1.05


@pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.5), (0.3, 0.01), (1.0, 0.9), (3.0, 0.2)])
def test_one_release_is_the_inverse_of_its_hockey_stick(sigma, q, delta):
    # Adding a unit has losses below -log(1 - q) only: no tilt brings their mass to the top.
    def worst(epsilon):
        return max(float(side[0]) for side in hockey_stick(np.array([epsilon]), sigma, q))

    found = pld_epsilon([release(sigma, q)], delta, 1e-4)
    if worst(0.0) <= delta:
        assert found == 0
    else:
        truth = brentq(lambda epsilon: worst(epsilon) - delta, 0, 300, xtol=1e-12)
        assert truth <= found <= truth * (1 + 1e-5) + 1e-6
        assert pld_delta([release(sigma, q)], truth, 1e-4) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize(("mu", "count"), [(0.05, 10**7), (0.02, 10**6), (1e-4, 1), (1e-4, 100)])
def test_the_rounding_of_tiny_losses_never_turns_the_bound_over(mu, count, delta):
    sigma = math.sqrt(count) / mu
    sides = composed(
        sigma,
        1.0,
        count,
        privacy_loss._grid_width([privacy_loss._Mechanism(sigma, 1.0, count)], 1e-4),
    )
    truth = exact_epsilon(mu, delta)
    assert truth <= max(privacy_loss._epsilon(side, delta) for side in sides) <= truth * 1.02 + 1e-4


def test_without_the_tilt_the_rounding_of_the_fft_swamps_a_small_delta(monkeypatch):
    truth = exact_epsilon(0.5, 1e-12)
    sides = composed(math.sqrt(100_000) / 0.5, 1.0, 100_000, 1e-4)
    original = privacy_loss._tails
    monkeypatch.setattr(
        privacy_loss, "_tails", lambda composition, tilt, centre: original(composition, 0.0, centre)
    )
    untilted = max(privacy_loss._epsilon(side, 1e-12) for side in sides)
    assert abs(untilted - truth) > 0.01


@pytest.mark.parametrize(
    ("sigma", "q", "count"), [(0.05, 0.01, 100), (0.06, 1.0, 1), (0.03, 1.0, 1), (0.001, 0.01, 100)]
)
def test_hopeless_settings_are_answered_from_above(sigma, q, count):
    # With probability 1 - (1 - q)^count > δ a unit is drawn once at least: 1 / (2 σ²) is a floor.
    value = pld_epsilon([release(sigma, q, count)], 1e-5, 1e-4)
    assert 0.5 / sigma**2 < value < math.inf
    if q == 1:
        assert pld_delta([release(sigma, q, count)], 1.0, 1e-4) > 0.5
        assert exact_epsilon(1 / sigma, 1e-5) <= value


def test_small_losses_get_a_fine_grid():
    # q 0.01, σ 100: a loss has a standard deviation of 1e-4, the width of the reporting grid.
    value = pld_epsilon([release(100.0, 0.01, 1000)], 1e-6, 1e-4)
    almost_gaussian = exact_epsilon(0.01 * math.sqrt(1000) / 100, 1e-6)
    assert almost_gaussian * 0.99 < value < almost_gaussian * 1.02


def test_the_coarse_moments_are_above_the_exact_ones():
    for loss in privacy_loss._single_losses(0.6, 0.02, 1e-4):
        composition = privacy_loss._Composition(((loss, 7),), 1e-4)
        for order in (0.5, 3.0, 20.0):
            exact = 7 * privacy_loss._log_tilted_sum(loss, 1e-4, order)
            assert exact - 1e-9 <= composition.log_moment(order) <= exact * (1 + 1e-3) + 1e-4


def test_a_delta_below_the_infinite_mass_has_no_finite_epsilon():
    loss = privacy_loss._single_losses(1.0, 0.1, 1e-3)[0]._replace(infinite=1e-6)
    composition = privacy_loss._Composition(((loss, 1),), 1e-3)
    assert privacy_loss._epsilon(composition, 1e-7) == math.inf
    assert privacy_loss._delta(composition, 30.0) >= 1e-6


@pytest.mark.parametrize("rate", [1e-6, 0.01, 1.0])
def test_noise_that_leaves_float64_is_never_too_cheap(rate: float) -> None:
    def spent(noise: float) -> float:
        release = GaussianRelease(noise_multiplier=noise, sample_rate=rate, count=1000)
        return pld_epsilon([release], 1e-30, 1e-3)

    assert spent(1e-300) == math.inf
    assert spent(1e-90) > 1e100
    assert (
        pld_delta([GaussianRelease(noise_multiplier=1e-300, sample_rate=rate, count=1)], 5.0, 1e-3)
        == 1.0
    )
    assert 0 < spent(1e300) == spent(1e90) <= spent(1e7)


@pytest.mark.parametrize("noise", [0.3, 1.0, 1e7])
def test_a_rate_that_leaves_float64_is_taken_for_a_larger_one(noise: float) -> None:
    def spent(rate: float) -> float:
        release = GaussianRelease(noise_multiplier=noise, sample_rate=rate, count=1000)
        return pld_epsilon([release], 1e-60, 1e-4)

    assert 0 <= spent(1e-300) == spent(1e-100) <= spent(1e-20)
