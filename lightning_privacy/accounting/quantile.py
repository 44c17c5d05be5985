"""A quantile of private counts that is differentially private itself."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np

from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence


def private_quantile(
    counts: Sequence[int] | np.ndarray,
    *,
    epsilon: float,
    largest: int,
    quantile: float = 0.5,
    test_seed: int | None = None,
) -> int:
    """Returns a number near a quantile of one count for each user.

    Guarantee: (ε, 0)-differentially private for adding or removing one user with whatever count.
    Together with a run that costs (ε', δ), the whole costs (ε + ε', δ).

    The exponential mechanism (McSherry and Talwar, FOCS 2007) over 1, …, ``largest``. A candidate's
    score is how many users would have to go, or come, to make it the quantile; one user changes it
    by at most max(quantile, 1 - quantile).

    Args:
        counts: One whole number for each user.
        epsilon: ε > 0, for this answer.
        largest: Largest possible answer, >= 1: public, and not taken from the counts.
        quantile: Which one, in (0, 1); 0.5 is the median.
        test_seed: Makes the answer repeatable, and then not private. For tests.

    Returns:
        A whole number from 1 to ``largest``.

    Raises:
        ConfigurationError: A value is outside its range.
    """
    remedy = "pass for instance epsilon=0.1, largest=1000, quantile=0.5"
    cost = "an answer without the guarantee that it claims"
    epsilon = real_number("epsilon", epsilon, "(0, inf)", cost=cost, remedy=remedy)
    share = real_number("quantile", quantile, "(0, 1)", cost=cost, remedy=remedy)
    top = whole_number("largest", largest, at_least=1, cost=cost, remedy=remedy)
    ordered = np.sort(np.asarray(counts))
    candidates = np.arange(1, top + 1)
    below = np.searchsorted(ordered, candidates, side="left")
    above = len(ordered) - np.searchsorted(ordered, candidates, side="right")
    too_high = (1 - share) * below - share * (len(ordered) - below)
    too_low = share * above - (1 - share) * (len(ordered) - above)
    distance = np.maximum(np.maximum(too_high, too_low), 0)
    weights = np.exp(-epsilon * (distance - distance.min()) / (2 * max(share, 1 - share)))
    key = secrets.randbits(128) if test_seed is None else test_seed
    uniform = np.random.Generator(np.random.Philox(key=key)).random()
    place = int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))
    return int(candidates[min(place, top - 1)])
