"""Individual budgets at constant noise: a smaller clip norm, or a smaller rate, for some users.

Boenisch et al. 2023 (arXiv 2303.17046). All users share one noise. *Scale* gives each tier a clip
norm C_p, so that its noise multiplier is s / C_p; *Sample* gives each tier a rate q_p. The ε of a
tier is that of an ordinary Poisson-subsampled Gaussian with these numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_privacy.accounting.accountants import epsilon as epsilon_of
from lightning_privacy.accounting.calibrate import SEARCH_DISCRETIZATION, noise_multiplier_for
from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Mapping

TierMethod = Literal["scale", "sample"]

_LEAST_RATE = 1e-9
_CLOSE = 1.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """What the users of one tier have of the largest clip norm and the largest rate.

    Args:
        name: The tier's name.
        clip_share: Their clip norm over the plan's, in (0, 1].
        rate_share: Their rate over the plan's, in (0, 1].

    Raises:
        ConfigurationError: A share is outside its range.
    """

    name: str
    clip_share: float = 1.0
    rate_share: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what would not be covered by the plan's ε."""
        for name in ("clip_share", "rate_share"):
            real_number(
                name,
                getattr(self, name),
                "(0, 1]",
                cost="a tier whose ε is above the headline",
                remedy="let tiers only strengthen: divide by the largest clip norm, or rate",
            )

    def release(self, whole: GaussianRelease) -> GaussianRelease:
        """Returns what the plan's releases are to a user of this tier.

        Args:
            whole: What they are to a user with the largest clip norm and rate.

        Returns:
            The same number of releases, with this tier's noise multiplier and rate.
        """
        return GaussianRelease(
            noise_multiplier=whole.noise_multiplier / self.clip_share,
            sample_rate=whole.sample_rate * self.rate_share,
            count=whole.count,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TieredNoise:
    """What `calibrated_tiers` found.

    Attributes:
        tiers: One for each target.
        noise_multiplier: Noise over the largest clip norm.
        sample_rate: The largest rate.
        clip_factor: The largest clip norm over the mean one.
    """

    tiers: tuple[Tier, ...]
    noise_multiplier: float
    sample_rate: float
    clip_factor: float


def calibrated_tiers(
    *,
    targets: Mapping[str, float],
    shares: Mapping[str, float],
    method: TierMethod,
    sample_rate: float,
    steps: int,
    delta: float,
) -> TieredNoise:
    """Returns the least noise with which each tier keeps its own target.

    Args:
        targets: ε > 0 by tier.
        shares: Estimated share of the users by tier, public; they add up to 1.
        method: "scale" or "sample".
        sample_rate: Rate at which users are drawn, on average over all of them, in (0, 1].
        steps: Number of releases, >= 1.
        delta: δ in (0, 1).

    Returns:
        The tiers' shares, and the common noise. Each tier's ε is at most its target.

    Raises:
        ConfigurationError: A value is outside its range, or no noise reaches a target.
    """
    if method == "scale":
        return _scaled(targets, shares, sample_rate, steps, delta)
    return _sampled(targets, shares, sample_rate, steps, delta)


def _scaled(
    targets: Mapping[str, float], shares: Mapping[str, float], rate: float, steps: int, delta: float
) -> TieredNoise:
    noises = {
        name: noise_multiplier_for(epsilon=target, delta=delta, sample_rate=rate, steps=steps)
        for name, target in targets.items()
    }
    least = min(noises.values())
    tiers = tuple(
        Tier(name=name, clip_share=min(1.0, least / noise)) for name, noise in noises.items()
    )
    mean = sum(shares[tier.name] * tier.clip_share for tier in tiers)
    return TieredNoise(tiers=tiers, noise_multiplier=least, sample_rate=rate, clip_factor=1 / mean)


def _sampled(
    targets: Mapping[str, float], shares: Mapping[str, float], rate: float, steps: int, delta: float
) -> TieredNoise:
    rates: dict[str, float] = {}

    def enough(noise: float) -> bool:
        found = {name: _largest_rate(noise, eps, steps, delta) for name, eps in targets.items()}
        rates.clear()
        rates.update(found)
        return sum(shares[name] * found[name] for name in targets) >= rate

    # With the noise that the strictest target needs at the mean rate, every tier has that rate.
    high = noise_multiplier_for(
        epsilon=min(targets.values()), delta=delta, sample_rate=rate, steps=steps
    )
    low = noise_multiplier_for(
        epsilon=max(targets.values()), delta=delta, sample_rate=rate, steps=steps
    )
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    # Rates are found to a thousandth, from below.
    while not enough(high):
        high *= _CLOSE
    most = max(rates.values())
    tiers = tuple(Tier(name=name, rate_share=found / most) for name, found in rates.items())
    return TieredNoise(tiers=tiers, noise_multiplier=high, sample_rate=most, clip_factor=1.0)


def _largest_rate(noise: float, target: float, steps: int, delta: float) -> float:
    """The largest rate that keeps a target, to a thousandth; 0 if none does."""

    def kept(rate: float) -> bool:
        release = GaussianRelease(noise_multiplier=noise, sample_rate=rate, count=steps)
        return epsilon_of([release], delta, "pld", SEARCH_DISCRETIZATION) <= target

    low, high = 0.0, 1.0
    if kept(high):
        return high
    guess = 0.05
    while not kept(guess):
        high, guess = guess, guess / 4
        if guess < _LEAST_RATE:
            return 0.0
    low = guess
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low
