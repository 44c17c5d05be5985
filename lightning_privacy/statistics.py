"""A mean and a standard deviation that are paid for: constants of a preprocessing.

A statistic of private data is an output like any other. This one is a single release of the
Gaussian mechanism on the sums of x and 2x² − 1, of values scaled to x in [−1, 1]. Two numbers that
are released by themselves are what attacks on the low bits of noise are made for, so sums and noise
lie on a grid (`GridNoise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_privacy.accounting import GaussianRelease, noise_multiplier_for
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.noise import GaussianNoise, GridNoise, fresh_secret
from lightning_privacy.noise.grid import ROUNDING_SLACK
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a value's pair (x, 2x² − 1), both in [−1, 1].
_SENSITIVITY = math.sqrt(2)
_LEAST_STD = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class PaidStatistics:
    """A noised mean and standard deviation, and what they cost.

    Args:
        mean: In the units of the values.
        std: At least a thousandth of half the range.
        releases: What a ledger is charged with.
    """

    mean: float
    std: float
    releases: tuple[GaussianRelease, ...]


def private_mean_and_std(
    values: Sequence[float] | np.ndarray,
    *,
    lower: float,
    upper: float,
    epsilon: float,
    delta: float,
) -> PaidStatistics:
    """Release the mean and the standard deviation of one number per unit.

    Guarantee: (ε, δ)-differential privacy for neighbours of which one has a unit that in the other
    is replaced by an empty record, which adds nothing to the sums; the number of units is public
    (neighbouring relation zero-out). To put another value in its place is to change it twice.

    Args:
        values: ``[N]`` one for each unit, such as an image's mean brightness; those outside the
            bounds are moved to them, and one that is not finite counts as the middle.
        lower: Public lower bound.
        upper: Public upper bound, > lower.
        epsilon: ε > 0.
        delta: δ in (0, 1).

    Returns:
        The noised figures and what a ledger is charged with.

    Raises:
        ConfigurationError: A number is out of its range, or there is no value.
    """
    for name, number in (("lower", lower), ("upper", upper - lower)):
        within = "(-inf, inf)" if name == "lower" else "(0, inf)"
        real_number(name, number, within, cost="a sensitivity without a bound",
                    remedy="pass public bounds with lower < upper")  # fmt: skip
    given = np.asarray(values, dtype=np.float64).ravel()
    if not len(given):
        raise ConfigurationError(
            must="there is at least one value",
            found="none",
            cost="a mean of nothing",
            remedy="pass one number for each unit",
        )
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    scaled = np.nan_to_num((given - middle) / half, nan=0.0).clip(-1, 1)
    sums = torch.tensor([scaled.sum(), (2 * scaled**2 - 1).sum()], dtype=torch.float64)
    noise_multiplier = noise_multiplier_for(epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    noise = GridNoise(
        GaussianNoise(fresh_secret()), noise_multiplier=noise_multiplier, dimension=len(sums)
    )
    noise.add_(sums, "mean and std", 0, noise_multiplier * _SENSITIVITY * (1 + ROUNDING_SLACK))
    first, second = (sums / len(given)).tolist()
    variance = max((second + 1) / 2 - first**2, _LEAST_STD**2)
    release = GaussianRelease(noise_multiplier=noise_multiplier, sample_rate=1.0, count=1)
    return PaidStatistics(
        mean=middle + half * max(-1.0, min(1.0, first)),
        std=half * math.sqrt(variance),
        releases=(release,),
    )
