"""The claimed curve inverted: near the truth, seldom above it, and far above what knows nothing."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_privacy.accounting import GaussianRelease
from lightning_privacy.audit import ReleaseProfile, family_epsilon
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics import MechanismEpsilonLowerBound
from lightning_privacy.metrics.functional import (
    GaussianProfile,
    curve_refuted,
    epsilon_lower_bound,
    gaussian_epsilon,
    mechanism_epsilon_lower_bound,
    refuted_noise_factor,
)
from lightning_privacy.metrics.functional.scores import Counts, split_scores

CLAIM = GaussianProfile(noise_multiplier=1.0)
DELTA = 1e-5


def attacked(count: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    member = torch.arange(2 * count) < count
    return member + noise * torch.tensor(rng.normal(size=2 * count)), member


def test_the_bound_comes_near_the_claim_where_one_without_the_curve_does_not() -> None:
    scores, member = attacked(5000, 0)
    claimed = gaussian_epsilon(1.0, DELTA)
    found = float(mechanism_epsilon_lower_bound(scores, member, CLAIM, delta=DELTA, threshold=1.5))
    blunt = float(epsilon_lower_bound(scores, member, delta=DELTA, threshold=1.5))
    assert blunt < 0.4 * claimed < 0.85 * claimed < found <= claimed


def test_half_the_noise_is_proven() -> None:
    scores, member = attacked(2000, 1, noise=0.5)
    counts = split_scores(scores, member).counts(0.5)
    assert refuted_noise_factor(counts, CLAIM) < 0.65
    assert curve_refuted(counts, CLAIM, significance=0.05)
    assert not curve_refuted(counts, CLAIM, significance=0.05, noise_factor=0.5)
    metric = MechanismEpsilonLowerBound(DELTA, CLAIM)
    assert gaussian_epsilon(1.0, DELTA) < metric(scores, member) <= gaussian_epsilon(2.0, DELTA)


def test_the_bound_exceeds_the_truth_as_seldom_as_promised() -> None:
    claimed = gaussian_epsilon(1.0, DELTA)
    wrong = sum(
        float(mechanism_epsilon_lower_bound(*attacked(300, seed), CLAIM, delta=DELTA)) > claimed
        for seed in range(60)
    )
    assert wrong <= 8  # 5 per cent of 60 is 3; the chance of 9 is 0.3 per cent


def test_guessing_proves_nothing() -> None:
    assert refuted_noise_factor(Counts(5, 10, 5, 10), CLAIM) == pytest.approx(8)
    scores, member = torch.zeros(20), torch.arange(20) < 10
    assert float(mechanism_epsilon_lower_bound(scores, member, CLAIM, delta=DELTA)) == 0


def test_all_thresholds_can_be_tried() -> None:
    scores, member = attacked(200, 2)
    proven = mechanism_epsilon_lower_bound(
        scores, member, CLAIM, delta=DELTA, threshold="bonferroni"
    )
    assert 0 < float(proven) < gaussian_epsilon(1.0, DELTA)


@pytest.mark.parametrize("rate", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_accountant_s_curve_gives_the_bound_of_the_audit(rate: float) -> None:
    release = GaussianRelease(noise_multiplier=1.0, sample_rate=rate, count=1)
    profile = ReleaseProfile(release)
    scores, member = attacked(1000, 3)
    counts = split_scores(scores, member).counts(0.5)
    metric = MechanismEpsilonLowerBound(DELTA, profile, threshold=0.5)
    audited = family_epsilon(counts, release, delta=DELTA)
    assert float(metric(scores, member)) == pytest.approx(audited.epsilon, abs=2e-3)
    assert refuted_noise_factor(counts, profile) == audited.noise_factor


def test_more_steps_are_less_noise() -> None:
    four = GaussianProfile(noise_multiplier=2.0, steps=4)
    assert four(1.0) == pytest.approx(CLAIM(1.0))
    assert four(1.0, 2.0) == pytest.approx(CLAIM(1.0, 2.0))
    assert four(1.0, 2.0) < four(1.0)


def test_a_metric_is_copied_with_its_curve() -> None:
    metric = MechanismEpsilonLowerBound(DELTA, CLAIM)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.profile == CLAIM


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MechanismEpsilonLowerBound(0.0, CLAIM),
        lambda: MechanismEpsilonLowerBound(DELTA, CLAIM, significance=0.5),
        lambda: GaussianProfile(noise_multiplier=0.0),
        lambda: GaussianProfile(noise_multiplier=1.0, steps=0),
        lambda: mechanism_epsilon_lower_bound(*attacked(9, 0), CLAIM, delta=1.0),
    ],
)
def test_arguments_outside_their_range_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigurationError):
        wrong()  # type: ignore[operator]
