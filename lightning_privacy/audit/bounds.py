"""What an attack's counts say about a claimed mechanism, and what the claim says about attacks.

The bounds of `lightning_privacy.metrics` know nothing of the mechanism. Here the claimed one is
known: the trade-off curve of T Poisson-subsampled Gaussian releases, from the same accountant that
made the claim. It says which pairs of error rates the mechanism allows, and an attack outside of
the curve refutes the claim, at any size of ε.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lightning_privacy.accounting import GaussianRelease, delta, epsilon
from lightning_privacy.metrics.functional.epsilon import error_bounds, gaussian_delta
from lightning_privacy.metrics.functional.scores import Counts
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# For a search; the claim itself is computed on the accountant's own grid.
_COARSE = 1e-3
_HALVINGS = 12
_WIDEST = math.log(8)
_LARGEST_SLOPE = 50.0
_STEEPEST = 8.0
_SLOPES, _FACTORS = 21, 8
_SIMULATED = 20_000


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
    refuted = claim_refuted(counts, release, significance=significance)
    # The factor on the noise from which on the attack is impossible, by bisection of its logarithm.
    low, high = (-_WIDEST, 0.0) if refuted else (0.0, _WIDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scaled = _with_noise(release, math.exp(middle))
        if claim_refuted(counts, scaled, significance=significance):
            high = middle
        else:
            low = middle
    factor, found = math.exp(high), 0.0
    if high < _WIDEST:
        # More noise than this is refuted: so the true ε is at least that of this noise.
        found = epsilon([_with_noise(release, factor)], delta, discretization=_COARSE)
    return FamilyBound(
        epsilon=found,
        claimed=epsilon([release], delta),
        noise_factor=factor,
        refuted=refuted,
    )


def claim_refuted(counts: Counts, release: GaussianRelease, *, significance: float) -> bool:
    """Whether an attack's error rates are impossible under a claimed mechanism.

    A mechanism that is (ε, δ(ε))-private for every ε allows no test with FNR below
    max(1 − δ(ε) − e^ε FPR, e^−ε (1 − δ(ε) − FPR)). (Wasserman and Zhou 2010; Dong et al. 2022,
    arXiv 1905.02383, proposition 2.12.) The true curve of the claim is at least this, because the
    accountant is pessimistic: a true claim is refuted with chance ``significance`` at most.

    Args:
        counts: What a rule fixed in advance did in independent trials.
        release: The claim.
        significance: Chance of refuting a true claim.

    Returns:
        Whether the claim is refuted.
    """
    missed, alarms = error_bounds(counts, significance)

    def gap(slope: float) -> float:
        rest = 1 - _delta(release, slope)
        grown = math.exp(slope)
        return max(rest - grown * alarms - missed, rest - grown * missed - alarms)

    return _exceeds_zero(gap)


def _exceeds_zero(gap: Callable[[float], float]) -> bool:
    """Whether a function with one maximum over slopes is positive anywhere, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, 1.0
    # The gap falls without a bound once e^ε outgrows what is left.
    while high < _LARGEST_SLOPE and gap(high) > gap(high * 0.75):
        high *= 2
    for _ in range(14):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        left, right = gap(first), gap(second)
        if max(left, right) > 0:
            return True
        low, high = (low, second) if left > right else (first, high)
    return gap(low) > 0


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
    slopes = np.linspace(0.0, _STEEPEST, _SLOPES)
    factors = np.exp(np.linspace(0.02, _WIDEST / 3, _FACTORS))
    rest = 1 - np.array([
        [_delta(_with_noise(release, factor), slope) for slope in slopes]
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


def _delta(release: GaussianRelease, slope: float) -> float:
    if release.sample_rate == 1:
        return gaussian_delta(slope, math.sqrt(release.count) / release.noise_multiplier)
    return delta([release], slope, discretization=_COARSE)


def _with_noise(release: GaussianRelease, factor: float) -> GaussianRelease:
    return GaussianRelease(
        noise_multiplier=release.noise_multiplier * factor,
        sample_rate=release.sample_rate,
        count=release.count,
    )
