"""The claimed curve: what it refutes, how seldom it errs, how near it comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_privacy.accounting import GaussianRelease
from lightning_privacy.audit import (
    advantage_ceiling,
    claim_refuted,
    family_epsilon,
    generic_advantage_ceiling,
    neyman_pearson_scores,
    neyman_pearson_threshold,
)
from lightning_privacy.metrics.functional.scores import Counts, Scores

ONE = GaussianRelease(noise_multiplier=1.0, sample_rate=1.0, count=1)
MANY = GaussianRelease(noise_multiplier=2.0, sample_rate=0.25, count=40)


def attacked(release: GaussianRelease, count: int, seed: int, factor: float = 1.0) -> Scores:
    """Scores of a trainer that adds ``factor`` times the claimed noise."""
    rng = np.random.default_rng(seed)
    inside = np.arange(2 * count) < count
    shape = (release.count, 2 * count)
    drawn = (rng.random(shape) < release.sample_rate) & inside
    sums = drawn + rng.normal(size=shape) * release.noise_multiplier * factor
    scores = neyman_pearson_scores(torch.from_numpy(sums), release).numpy()
    return Scores(scores[inside], scores[~inside])


@pytest.fixture(scope="module")
def threshold() -> float:
    return neyman_pearson_threshold(ONE, 5000, 5000)


def test_the_bound_comes_near_the_claim(threshold: float) -> None:
    found = family_epsilon(attacked(ONE, 5000, 0).counts(threshold), ONE, delta=1e-5)
    assert found.claimed == pytest.approx(4.377, abs=1e-3)
    assert 0.85 * found.claimed <= found.epsilon <= found.claimed
    assert not found.refuted
    assert found.noise_factor > 1


def test_half_the_noise_is_refuted(threshold: float) -> None:
    counts = attacked(ONE, 2000, 1, factor=0.5).counts(threshold)
    found = family_epsilon(counts, ONE, delta=1e-5)
    assert found.refuted
    assert found.epsilon > 1.7 * found.claimed
    assert found.noise_factor < 0.65


@pytest.mark.parametrize(
    "release", [ONE, pytest.param(MANY, marks=pytest.mark.slow)], ids=["one step", "subsampled"]
)
def test_a_true_claim_is_seldom_refuted(release: GaussianRelease) -> None:
    cut = neyman_pearson_threshold(release, 1000, 1000)
    wrong = sum(
        claim_refuted(attacked(release, 1000, seed).counts(cut), release, significance=0.05)
        for seed in range(30)
    )
    assert wrong <= 4  # 1.5 on average if the bound were exact


def test_guessing_proves_nothing() -> None:
    found = family_epsilon(Counts(500, 1000, 500, 1000), ONE, delta=1e-5)
    assert found.epsilon < 0.6
    assert not found.refuted


def test_the_score_is_the_likelihood_ratio() -> None:
    s = torch.tensor([[0.3, 1.7], [-0.4, 0.9]], dtype=torch.float64)
    near = torch.exp(-((s - 1) ** 2) / 8)
    far = torch.exp(-(s**2) / 8)
    expected = torch.log(0.75 + 0.25 * near / far).sum(0)
    torch.testing.assert_close(neyman_pearson_scores(s, MANY), expected)


@pytest.mark.parametrize(
    ("epsilon", "generic", "gaussian"),
    [(1, 0.46, 0.107), (2, 0.76, 0.198), (4, 0.96, 0.356), (8, 1.00, 0.595)],
)
def test_the_ceilings_of_the_advantage(epsilon: float, generic: float, gaussian: float) -> None:
    from lightning_privacy.accounting import noise_multiplier_for

    sigma = noise_multiplier_for(epsilon=epsilon, delta=1e-5, sample_rate=1.0, steps=1)
    release = GaussianRelease(noise_multiplier=sigma, sample_rate=1.0, count=1)
    assert generic_advantage_ceiling(epsilon, 1e-5) == pytest.approx(generic, abs=0.005)
    assert advantage_ceiling([release]) == pytest.approx(gaussian, abs=1.5e-3)
