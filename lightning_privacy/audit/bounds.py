"""What an attack's counts say about a claimed mechanism, and what the claim says about attacks.

The bounds of `lightning_privacy.metrics` know nothing of the mechanism. Here the claimed one is
known: the trade-off curve of T Poisson-subsampled Gaussian releases, from the same accountant that
made the claim. It says which pairs of error rates the mechanism allows, and an attack outside of
the curve refutes the claim, at any size of ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lightning_privacy.accounting import GaussianRelease, delta, epsilon
from lightning_privacy.metrics.functional.epsilon import error_bounds, gaussian_delta
from lightning_privacy.metrics.functional.mechanism import curve_refuted, refuted_noise_factor
from lightning_privacy.metrics.functional.scores import Counts
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# For a search; the claim itself is computed on the accountant's own grid.
_COARSE = 1e-3
_MOST_NOISE = 8.0
_STEEPEST = 8.0
_SLOPES, _FACTORS = 21, 8
_SIMULATED = 20_000


@dataclass(frozen=True, slots=True)
class ReleaseProfile:
    """The curve of Poisson-subsampled Gaussian releases, from the accountant that made the claim.

    What `lightning_privacy.metrics.MechanismEpsilonLowerBound` asks for:
    ``ReleaseProfile(privacy.plan.release(privacy.steps))``.

    Args:
        release: The claim: noise multiplier, sample rate and steps.
    """

    release: GaussianRelease

    def __call__(self, epsilon: float, noise_factor: float = 1.0) -> float:
        """δ at ε, rounded up.

        Args:
            epsilon: ε >= 0.
            noise_factor: How many times the claimed noise there is.

        Returns:
            δ in [0, 1].
        """
        scaled = _with_noise(self.release, noise_factor)
        if scaled.sample_rate == 1:
            return gaussian_delta(epsilon, math.sqrt(scaled.count) / scaled.noise_multiplier)
        return delta([scaled], epsilon, discretization=_COARSE)


class FamilyBound(NamedTuple):
    """What an attack says about a claimed noise multiplier.

    Attributes:
        epsilon: Lower bound on ε: that of the largest noise with which the attack is possible.
        claimed: ε of the claim.
        noise_factor: How many times the claimed noise that is, between 1/8 and 8; below 1 the
            claim is refuted.
        refuted: Whether no mechanism with the claimed noise allows these error rates.
    """

    epsilon: float
    claimed: float
    noise_factor: float
    refuted: bool


def family_epsilon(
    counts: Counts, release: GaussianRelease, *, delta: float, significance: float = 0.05
) -> FamilyBound:
    """A lower bound on ε by inverting the trade-off curve of the claimed kind of mechanism.

    Finds the noise multiplier from which on, at the claimed rate and steps, the attack's error
    rates are impossible, and gives its ε. Far tighter than bounds that know nothing: 83 to 93 per
    cent of the claim where Clopper-Pearson proves a third. If the trainer is not of that kind the
    bound is an estimate; that the claim is refuted stays true.

    Args:
        counts: What a rule fixed in advance did in independent trials; see
            `neyman_pearson_scores`.
        release: The claim: noise multiplier, sample rate and steps.
        delta: δ in (0, 1).
        significance: Chance in (0, 0.5) of refuting a true claim.

    Returns:
        The bound.

    Raises:
        ConfigurationError: An argument is outside its range.
    """
    significance = real_number(
        "significance", significance, "(0, 0.5)", cost="a bound that says nothing", remedy="0.05"
    )
    factor, found = (
        refuted_noise_factor(counts, ReleaseProfile(release), significance=significance),
        0.0,
    )
    if factor < _MOST_NOISE:
        # More noise than this is refuted: so the true ε is at least that of this noise.
        found = epsilon([_with_noise(release, factor)], delta, discretization=_COARSE)
    return FamilyBound(
        epsilon=found,
        claimed=epsilon([release], delta),
        noise_factor=factor,
        refuted=factor <= 1,
    )


def claim_refuted(counts: Counts, release: GaussianRelease, *, significance: float) -> bool:
    """Whether an attack's error rates are impossible under a claimed mechanism.

    See `lightning_privacy.metrics.functional.curve_refuted`. The true curve of the claim is at
    least the one used here, because the accountant is pessimistic: a true claim is refuted with
    chance ``significance`` at most.

    Args:
        counts: What a rule fixed in advance did in independent trials.
        release: The claim.
        significance: Chance of refuting a true claim.

    Returns:
        Whether the claim is refuted.
    """
    return curve_refuted(counts, ReleaseProfile(release), significance=significance)


def neyman_pearson_scores(projections: Tensor, release: GaussianRelease) -> Tensor:
    """The most powerful score of a canary that a private coordinate follows over all steps.

    Each step's projection is N(1, σ²) where the canary was drawn and N(0, σ²) where not; the score
    is its log-likelihood ratio, Σ log(1 − q + q exp((s − 1/2) / σ²)).

    Args:
        projections: ``[T, m]`` of the released sums on the canaries' unit directions, in clip
            norms.
        release: The claim.

    Returns:
        ``[m]`` float64 scores, higher for members.
    """
    sigma, q = release.noise_multiplier, release.sample_rate
    gain = (projections.double() - 0.5) / sigma**2
    if q == 1:
        return gain.sum(0)
    return torch.logaddexp(gain + math.log(q), gain.new_tensor(math.log1p(-q))).sum(0)


def neyman_pearson_threshold(
    release: GaussianRelease, members: int, non_members: int, *, significance: float = 0.05
) -> float:
    """Where to cut `neyman_pearson_scores`, found by simulating the claim: no real score is spent.

    Args:
        release: The claim.
        members: How many members will be scored.
        non_members: How many others.
        significance: As for the bound to come.

    Returns:
        The threshold with which the simulated attack proves most, with that many canaries.
    """
    rng = np.random.default_rng(0)
    inside, outside = (
        np.sort(_simulated_scores(release, rate, rng)) for rate in (release.sample_rate, 0.0)
    )
    profile = ReleaseProfile(release)
    slopes = np.linspace(0.0, _STEEPEST, _SLOPES)
    factors = np.exp(np.linspace(0.02, math.log(_MOST_NOISE) / 3, _FACTORS))
    rest = 1 - np.array([
        [profile(slope, factor) for slope in slopes]
        for factor in factors
    ])  # fmt: skip

    def proven(cut: float) -> float:
        rates = [1 - np.searchsorted(side, cut) / len(side) for side in (inside, outside)]
        hits, alarms = round(rates[0] * members), round(rates[1] * non_members)
        missed, false = error_bounds(Counts(hits, members, alarms, non_members), significance)
        gaps = [rest - np.exp(slopes) * x - y for x, y in ((false, missed), (missed, false))]
        # The factor on the noise at which the gap changes its sign.
        gap = np.maximum(*gaps).max(1)
        return float(np.interp(0.0, np.maximum.accumulate(gap), -factors))

    cuts = np.quantile(np.concatenate([inside, outside]), np.linspace(0.02, 0.98, 49))
    return float(max(cuts, key=proven))


def _simulated_scores(
    release: GaussianRelease, rate: float, rng: np.random.Generator
) -> np.ndarray:
    total = torch.zeros(_SIMULATED, dtype=torch.float64)
    for _ in range(release.count):
        drawn = rng.random(_SIMULATED) < rate
        noise = rng.normal(scale=release.noise_multiplier, size=_SIMULATED)
        total += neyman_pearson_scores(torch.from_numpy(drawn + noise)[None], release)
    return total.numpy()


def advantage_ceiling(releases: Sequence[GaussianRelease]) -> float:
    """The largest membership advantage that any attack can have: δ(0), the total variation.

    Args:
        releases: What was released.

    Returns:
        TPR − FPR of the best possible attack, in [0, 1], rounded up by the accountant.
    """
    return delta(releases, 0.0)


def generic_advantage_ceiling(epsilon: float, delta: float) -> float:
    """The largest membership advantage under (ε, δ) alone, whatever the mechanism.

    (e^ε − 1 + 2δ) / (e^ε + 1) (Humphries et al. 2023, arXiv 2010.12112). A Gaussian mechanism's own
    ceiling, `advantage_ceiling`, is much lower.

    Args:
        epsilon: ε >= 0.
        delta: δ in [0, 1).

    Returns:
        The ceiling, in [0, 1].
    """
    return min(1.0, math.tanh(epsilon / 2) + 2 * delta / (math.exp(epsilon) + 1))


def _with_noise(release: GaussianRelease, factor: float) -> GaussianRelease:
    return GaussianRelease(
        noise_multiplier=release.noise_multiplier * factor,
        sample_rate=release.sample_rate,
        count=release.count,
    )
