"""A lower bound on ε by inverting the curve of the claimed mechanism.

The curve comes as a function, because metrics do not account: `GaussianProfile` here, or
`lightning_privacy.audit.ReleaseProfile`, which asks the accountant that made the claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lightning_privacy.metrics.functional.epsilon import error_bounds, gaussian_delta, proven
from lightning_privacy.metrics.functional.scores import Counts, split_scores
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

Profile = Callable[[float, float], float]
"""δ at an ε >= 0, of the claimed mechanism with so many times its noise; falls in both."""

_HALVINGS = 13
_WIDEST = math.log(8)
_LARGEST_SLOPE = 50.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianProfile:
    """The curve of Gaussian releases of every unit: no subsampling.

    Args:
        noise_multiplier: σ > 0, in clip norms.
        steps: How many releases.

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        cost, remedy = "a curve of no mechanism", "pass the noise and the steps of the claim"
        real_number("noise_multiplier", self.noise_multiplier, "(0, inf)", cost=cost, remedy=remedy)
        whole_number("steps", self.steps, at_least=1, cost=cost, remedy=remedy)

    def __call__(self, epsilon: float, noise_factor: float = 1.0) -> float:
        """δ at ε (Dong et al. 2022, arXiv 1905.02383, corollary 2.13).

        Args:
            epsilon: ε >= 0.
            noise_factor: How many times the noise there is.

        Returns:
            δ in [0, 1].
        """
        return gaussian_delta(epsilon, math.sqrt(self.steps) / self.noise_multiplier / noise_factor)


def mechanism_epsilon_lower_bound(
    scores: Tensor,
    member: Tensor,
    profile: Profile,
    *,
    delta: float,
    significance: float = 0.05,
    threshold: float | Literal["split", "bonferroni"] = "split",
    seed: int = 0,
) -> Tensor:
    """A lower bound on ε at δ from attack scores, for a mechanism whose kind is known.

    Finds the noise from which on the attack's error rates are impossible, and gives its ε. Far
    tighter than bounds that know nothing. If the trainer is not of that kind the bound is an
    estimate; a bound above the claim refutes it in any case.

    Args:
        scores: ``[N]`` attack scores, independent; higher says "more likely a member".
        member: ``[N]`` booleans, or 0 and 1: fair coins thrown before training.
        profile: The claimed mechanism's curve: δ at (ε, factor on its noise).
        delta: δ in (0, 1).
        significance: Chance in (0, 0.5) that the bound exceeds the true ε.
        threshold: As for `epsilon_lower_bound`.
        seed: Divides the scores for "split".

    Returns:
        A float64 tensor without dimensions: ε >= 0; 0 if nothing can be proven.

    Raises:
        ConfigurationError: An argument is not legal, or one side is empty.
    """
    cost = "a bound that says nothing"
    delta = real_number("delta", delta, "(0, 1)", cost=cost, remedy="pass the δ of the claim")
    significance = real_number(
        "significance", significance, "(0, 0.5)", cost=cost, remedy="pass 0.05"
    )

    def bound(counts: Counts, _delta: float, chance: float, least: float) -> float:
        return _refuted_level(counts, profile, chance, least)

    level = proven(split_scores(scores, member), bound, delta, significance, threshold, seed)
    value = _epsilon(profile, math.exp(_WIDEST - level), delta) if level else 0.0
    return torch.tensor(value, dtype=torch.float64)


def refuted_noise_factor(counts: Counts, profile: Profile, *, significance: float = 0.05) -> float:
    """The factor on the claimed noise from which on an attack is impossible.

    Args:
        counts: What a rule fixed in advance did in independent trials.
        profile: The claimed mechanism's curve.
        significance: Chance in (0, 0.5) of refuting a true claim.

    Returns:
        The factor, from 1/8 to 8; 1 or less refutes the claim, 8 says that nothing was proven.
    """
    return math.exp(_WIDEST - _refuted_level(counts, profile, significance, 0.0))


def curve_refuted(
    counts: Counts, profile: Profile, *, significance: float, noise_factor: float = 1.0
) -> bool:
    """Whether an attack's error rates are impossible under a curve.

    A mechanism that is (ε, δ(ε))-private for every ε allows no test with FNR below
    max(1 − δ(ε) − e^ε FPR, e^−ε (1 − δ(ε) − FPR)). (Wasserman and Zhou 2010; Dong et al. 2022,
    arXiv 1905.02383, proposition 2.12.)

    Args:
        counts: What a rule fixed in advance did in independent trials.
        profile: The curve, rounded up where it is not exact.
        significance: Chance of refuting a true claim.
        noise_factor: How many times the claimed noise there is.

    Returns:
        Whether it is refuted.
    """
    missed, alarms = error_bounds(counts, significance)

    def gap(slope: float) -> float:
        rest = 1 - profile(slope, noise_factor)
        grown = math.exp(slope)
        return max(rest - grown * alarms - missed, rest - grown * missed - alarms)

    return _exceeds_zero(gap)


def _refuted_level(counts: Counts, profile: Profile, significance: float, least: float) -> float:
    """ln(8 / the least refuted factor on the noise); ``least`` if it is not above that."""

    def refuted(level: float) -> bool:
        factor = math.exp(_WIDEST - level)
        return curve_refuted(counts, profile, significance=significance, noise_factor=factor)

    low, high = least, 2 * _WIDEST
    if least and not refuted(least):
        return least
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


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


def _epsilon(profile: Profile, noise_factor: float, delta: float) -> float:
    """The largest ε that a curve rules out at δ: rounded down, as a lower bound has to be."""
    low, high = 0.0, 1.0
    if profile(0.0, noise_factor) <= delta:
        return 0.0
    while high < _LARGEST_SLOPE and profile(high, noise_factor) > delta:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if profile(middle, noise_factor) > delta else (low, middle)
    return low
