"""The Gaussian mechanism released several times, in closed form.

k releases of multiplier σ on the same record are one of multiplier σ/√k, exactly. ε and δ follow
the analytic formula of Balle and Wang (2018, arXiv 1805.06530, theorem 8), which is tight.
"""

from __future__ import annotations

import math

# The formula is solved numerically; what it gives is rounded to the safe side by this share.
_MARGIN = 1e-6


def gaussian_epsilon(noise_multiplier: float, delta: float, releases: int = 1) -> float:
    """The ε of a Gaussian mechanism released several times on the same record.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, > 0.
        delta: δ in (0, 1).
        releases: How often, >= 0.

    Returns:
        ε >= 0, not too small.
    """
    from dp_accounting import get_epsilon_gaussian

    if not releases:
        return 0.0
    found = float(get_epsilon_gaussian(noise_multiplier / math.sqrt(releases), delta))
    return found * (1 + _MARGIN)


def gaussian_noise_multiplier(epsilon: float, delta: float, releases: int = 1) -> float:
    """The noise multiplier with which so many releases together cost at most ε.

    Args:
        epsilon: The budget, > 0.
        delta: δ in (0, 1).
        releases: How often, >= 1.

    Returns:
        Standard deviation of the noise over the sensitivity, not too small.
    """
    from dp_accounting import get_sigma_gaussian

    found = float(get_sigma_gaussian(epsilon / (1 + 2 * _MARGIN), delta))
    return found * math.sqrt(releases) * (1 + _MARGIN)
