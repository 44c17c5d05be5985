"""Units of several parts: exact in one step, an upper bound in many, and equal to what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_privacy.accounting import GaussianRelease, delta, epsilon, mixture
from lightning_privacy.accounting.accountants import renyi_epsilon
from lightning_privacy.accounting.mixture import binomial, hockey_stick
from lightning_privacy.errors import ConfigurationError
from tests.accounting.goldens import golden, release

GOLDEN = golden("user_level")


def group(noise_multiplier: float, rate: float, size: int, count: int = 1) -> GaussianRelease:
    return GaussianRelease(
        noise_multiplier=noise_multiplier, sample_rate=rate, count=count, group_size=size
    )


def exact(epsilon, sigma, rate, size):
    """δ(ε) with forty digits, from the definition."""
    import mpmath as mp

    with mp.workdps(40):
        rate, sigma = mp.mpf(rate), mp.mpf(sigma)
        weights = [
            mp.binomial(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)
        ]

        def loss(x):
            terms = (mp.exp((2 * k * x - k * k) / (2 * sigma**2)) for k in range(size + 1))
            return mp.log(sum(w * term for w, term in zip(weights, terms, strict=True)))

        def output(value):
            low, high = mp.mpf(-2000), mp.mpf(2000)
            for _ in range(150):
                middle = (low + high) / 2
                low, high = (middle, high) if loss(middle) < value else (low, middle)
            return low

        def above(x):
            return mp.erfc(x / sigma / mp.sqrt(2)) / 2

        x = output(epsilon)
        moved = sum(w * above(x - k) for k, w in enumerate(weights))
        removed = moved - mp.exp(epsilon) * above(x)
        x = output(-epsilon)
        moved = sum(w * above(k - x) for k, w in enumerate(weights))
        return float(removed), float(above(-x) - mp.exp(epsilon) * moved)


@pytest.mark.parametrize(
    ("sigma", "rate", "size", "epsilon"),
    [
        (4.0, 0.01, 8, 0.3),
        (1.5, 0.1, 6, 2.0),
        (1.0, 0.3, 5, -0.4),
        (20.0, 0.5, 12, 0.01),
        (0.7, 0.002, 3, 5.0),
    ],
)
def test_one_step_has_all_its_digits(sigma, rate, size, epsilon):
    pytest.importorskip("mpmath")
    ours = [float(side[0]) for side in hockey_stick(np.array([epsilon]), sigma, rate, size)]
    assert ours == pytest.approx(exact(epsilon, sigma, rate, size), rel=1e-10)


def test_one_step_agrees_with_a_monte_carlo_estimate():
    generator = np.random.default_rng(0)
    size, rate, sigma, at, draws = 6, 0.1, 1.5, 0.5, 400_000
    counts = np.arange(size + 1)
    weights = stats.binom.pmf(counts, size, rate)

    def losses(outputs):
        mixed = (weights * stats.norm.pdf(outputs[:, None], counts, sigma)).sum(1)
        return np.log(mixed) - stats.norm.logpdf(outputs, 0, sigma)

    with_user = generator.binomial(size, rate, draws) + sigma * generator.standard_normal(draws)
    without = sigma * generator.standard_normal(draws)
    removed = np.maximum(0, -np.expm1(at - losses(with_user)))
    added = np.maximum(0, -np.expm1(at + losses(without)))
    ours = hockey_stick(np.array([at]), sigma, rate, size)
    for samples, value in zip((removed, added), ours, strict=True):
        error = samples.std() / math.sqrt(draws)
        assert abs(samples.mean() - value[0]) < 4 * error
    spent = delta([group(sigma, rate, size)], at)
    assert spent == pytest.approx(GOLDEN["one_step"]["pld"], rel=1e-4)
    assert spent == pytest.approx(GOLDEN["one_step"]["monte_carlo"], rel=2e-3)


@pytest.mark.parametrize("case", GOLDEN["examples"], ids=lambda case: f"G={case['group_size']}")
def test_golden_epsilons(case):
    ours = epsilon([group(4.0, 0.01, case["group_size"], 1000)], 1e-6)
    # The goldens have a coarser grid, which only ever adds.
    assert case["epsilon"] - 0.005 < ours <= case["epsilon"] + 5e-4


def test_a_group_of_one_is_an_ordinary_unit():
    assert group(1.0, 0.01, 1, 9) == release(1.0, 0.01, 9)
    assert epsilon([group(1.0, 0.01, 1, 1000)], 1e-6) == pytest.approx(2.1245225, abs=1e-6)


def test_unsampled_parts_add_up_to_one_contribution():
    whole = epsilon([release(5.0, 1.0, 3)], 1e-6)
    assert epsilon([group(15.0, 1.0, 3, 3)], 1e-6) == pytest.approx(whole, rel=1e-12)


def test_dp_accounting_agrees_where_its_rounding_does_not_show():
    from dp_accounting.pld import privacy_loss_distribution

    weights = stats.binom.pmf(np.arange(9), 8, 0.02)
    theirs = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        2.0, list(range(9)), list(weights / weights.sum()), value_discretization_interval=2e-3
    ).self_compose(50)
    ours = epsilon([group(2.0, 0.02, 8, 50)], 1e-5)
    assert ours == pytest.approx(theirs.get_epsilon_for_delta(1e-5), abs=0.01)


def test_more_of_anything_costs_more():
    base = epsilon([group(4.0, 0.01, 4, 100)], 1e-6)
    for worse in (group(4.0, 0.01, 5, 100), group(4.0, 0.02, 4, 100), group(3.0, 0.01, 4, 100)):
        assert epsilon([worse], 1e-6) > base
    # At most as bad as if one draw decided for all parts together, each step.
    together = epsilon([release(1.0, 1 - 0.99**4, 100)], 1e-6)
    assert base < together


def test_rare_numbers_of_parts_are_rounded_up():
    law = binomial(0.01, 5000)
    assert len(law.sizes) < 300
    assert law.sizes[-1] == 5000
    moved = np.exp(law.logs[-1]) * law.some
    assert moved >= stats.binom.sf(law.sizes[-2], 5000, 0.01)
    assert law.none + law.some == pytest.approx(1.0)
    assert np.exp(law.logs).sum() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("size", [2, 300])
def test_little_noise_gives_a_large_but_finite_answer(size):
    value = epsilon([group(0.02, 0.01, size, 10)], 1e-6)
    assert 100 < value < math.inf


def test_the_search_for_the_output_converges():
    law = binomial(0.2, 40)
    losses = np.linspace(math.log(law.none) + 1e-3, 60, 500)
    gains = mixture._gain(losses, 1.3, law)
    back = [mixture._loss(gain, 1.3, law) for gain in gains]
    assert back == pytest.approx(losses.tolist(), abs=1e-11)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_other_accountants_refuse_groups(accountant):
    with pytest.raises(ConfigurationError, match="must be 'pld' where a unit has several parts"):
        epsilon([group(4.0, 0.01, 4)], 1e-6, accountant)
    with pytest.raises(ConfigurationError, match="'pld'"):
        delta([group(4.0, 0.01, 4)], 1.0, "rdp")


def test_the_filter_of_a_ledger_counts_every_part():
    releases = [group(4.0, 0.01, 4, 1000)]
    bound = renyi_epsilon(releases, 1e-6, 8.0)
    assert bound > epsilon(releases, 1e-6)
    assert bound == pytest.approx(
        renyi_epsilon([release(1.0, 1 - 0.99**4, 1000)], 1e-6, 8.0), rel=1e-9
    )
    assert renyi_epsilon([group(4.0, 1.0, 4)], 1e-6, 8.0) == pytest.approx(
        renyi_epsilon([release(1.0, 1.0)], 1e-6, 8.0)
    )
