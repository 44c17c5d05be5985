"""The inverse questions: how much noise an ε needs, and how many steps a budget allows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lightning_privacy.accounting.accountants import (
    PRV_ERROR,
    REPORT_DISCRETIZATION,
    check_accountant,
    checked_delta,
)
from lightning_privacy.accounting.accountants import (
    epsilon as epsilon_of,
)
from lightning_privacy.accounting.cache import recall, remember
from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import AccountantName, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

SEARCH_DISCRETIZATION = 1e-3
"""Width of the privacy-loss grid while searching: ten times cheaper, and still an upper bound."""

LARGEST_STEP_COUNT = 10**8
"""`max_steps` looks no further."""

_LARGEST_NOISE_MULTIPLIER = 1e7
_SMALLEST_NOISE_MULTIPLIER = 1e-3
_FAR = 100.0
_RELATIVE_PRECISION = 1e-4
_APART = 1 + 0.2 * _RELATIVE_PRECISION


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantName = "pld",
    group_size: int = 1,
    progress: Callable[[float, float], None] | None = None,
) -> float:
    """Returns a noise multiplier with which ``steps`` releases cost at most ``epsilon``.

    The result is on the safe side: the ε that `epsilon` reports for it (grid of 1e-4) is at most
    the target. It is within 0.1 per cent of the smallest such multiplier. Results for groups,
    whose search can take a while, are remembered in the user's cache directory (``XDG_CACHE_HOME``,
    or ``LIGHTNING_PRIVACY_CACHE``, which may be ``off``) and checked again before they are used.

    Args:
        epsilon: The budget ε > 0.
        delta: δ in (0, 1).
        sample_rate: Probability with which a unit is drawn, in (0, 1].
        steps: Number of releases, >= 1.
        accountant: Which accountant to ask.
        group_size: Most parts of one unit, >= 1, each drawn on its own.
        progress: Called after each trial with the noise multiplier and its ε.

    Returns:
        The noise multiplier: standard deviation of the noise over the sensitivity.

    Raises:
        ConfigurationError: An argument is outside its range, or no amount of noise that this
            search considers reaches the target.
    """
    epsilon, delta = _checked_budget(epsilon, delta, accountant)
    steps = _checked_steps(steps)

    whole = GaussianRelease(
        noise_multiplier=1.0, sample_rate=sample_rate, count=steps, group_size=group_size
    )
    if accountant == "prv" and epsilon <= PRV_ERROR:
        raise _unreachable(f"ε = {epsilon:g}, where Opacus's PRV accountant adds {PRV_ERROR}")

    def spent(noise_multiplier: float, discretization: float = REPORT_DISCRETIZATION) -> float:
        release = replace(whole, noise_multiplier=noise_multiplier)
        value = epsilon_of([release], delta, accountant, discretization)
        if progress is not None:
            progress(noise_multiplier, value)
        return value

    question = {**whole.to_dict(), "epsilon": epsilon, "delta": delta, "accountant": accountant}
    known = recall(question) if whole.group_size > 1 else None
    if known is not None and spent(known) <= epsilon:
        return known
    found = _searched(spent, epsilon, _first_guess(epsilon, delta, whole), accountant)
    if whole.group_size > 1:
        remember(question, found)
    return found


def _searched(
    spent: Callable[..., float], epsilon: float, first: float, accountant: AccountantName
) -> float:
    if accountant != "pld":
        return _smallest(spent, epsilon, first)[0]
    coarse = partial(spent, discretization=SEARCH_DISCRETIZATION)
    sigma, slope = _smallest(coarse, epsilon, first)
    return _refined(spent, epsilon, sigma, slope)


def max_steps(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: AccountantName = "pld",
    group_size: int = 1,
) -> int:
    """Returns the largest number of releases that cost at most ``epsilon``.

    Exact in terms of the reported ε: ε(T) <= budget < ε(T + 1).

    Args:
        epsilon: The budget ε > 0.
        delta: δ in (0, 1).
        sample_rate: Probability with which a unit is drawn, in (0, 1].
        noise_multiplier: Standard deviation of the noise over the sensitivity, > 0.
        accountant: Which accountant to ask.
        group_size: Most parts of one unit, >= 1, each drawn on its own.

    Returns:
        T >= 0, where 0 means that not even one release fits. No search goes beyond
        `LARGEST_STEP_COUNT`, which is then what is returned.

    Raises:
        ConfigurationError: An argument is outside its range.
    """
    epsilon, delta = _checked_budget(epsilon, delta, accountant)
    one = GaussianRelease(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        count=1,
        group_size=group_size,
    )

    def spent(steps: int, discretization: float = REPORT_DISCRETIZATION) -> float:
        return epsilon_of([one.times(steps)], delta, accountant, discretization)

    if noise_multiplier == 0 or spent(1) > epsilon:
        return 0
    low, high = 1, 2
    while spent(high, SEARCH_DISCRETIZATION) <= epsilon:
        if high >= LARGEST_STEP_COUNT:
            return LARGEST_STEP_COUNT
        low, high = high, min(4 * high, LARGEST_STEP_COUNT)
    low, high = _narrowed(lambda steps: spent(steps, SEARCH_DISCRETIZATION), epsilon, low, high)
    # The finer grid allows a little more than the search grid did: `low` still fits.
    stride = max(1, low // 1000)
    while spent(low + stride) <= epsilon:
        if low + stride >= LARGEST_STEP_COUNT:
            return LARGEST_STEP_COUNT
        low, stride = low + stride, 2 * stride
    return _narrowed(spent, epsilon, low, low + stride)[0]


def _narrowed(spent: Callable[[int], float], budget: float, low: int, high: int) -> tuple[int, int]:
    """Shrinks [low, high], of which low fits the budget and high does not, to neighbours."""
    values = {float(low): spent(low), float(high): spent(high)}
    turn = 0
    while high - low > 1:
        middle = (low + high) // 2
        if turn % 3 < 2:  # two turns by interpolation, one by halves: it always ends, and fast
            guess = math.floor(_interpolated(values, budget)) + turn % 3
            middle = min(max(guess, low + 1), high - 1)
        turn += 1
        values[middle] = spent(middle)
        if values[middle] <= budget:
            low = middle
        else:
            high = middle
    return low, high


def _smallest(spent: Callable[[float], float], target: float, first: float) -> tuple[float, float]:
    """Finds the smallest multiplier that fits, to 1e-4, and the slope of log ε there."""
    values: dict[float, float] = {}

    def measured(sigma: float) -> float:
        values[sigma] = spent(sigma)
        return values[sigma]

    low, high = _bracket(measured, target, first)
    turn = 0
    while high / low > 1 + _RELATIVE_PRECISION:
        middle = math.sqrt(low * high)
        if turn % 4 < 3:
            # First a little to the side that fits, then to the other, so that both ends close in.
            aside = 1 + (0.4 if turn % 4 == 0 else -0.4) * _RELATIVE_PRECISION
            middle = min(max(_interpolated(values, target) * aside, low * _APART), high / _APART)
        turn += 1
        if measured(middle) <= target:
            high = middle
        else:
            low = middle
    return high, _slope(values, target)


def _bracket(spent: Callable[[float], float], target: float, first: float) -> tuple[float, float]:
    """Returns two multipliers: one with too little noise (or as little as is tried), one enough."""
    high, factor = first, 1.2
    low = first
    value = spent(high)
    enough_at_first = value <= target
    while value > target:
        if high >= _LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(
                f"ε = {value:.3g} at noise_multiplier = {high:.3g}, target {target:.3g}"
            )
        low, high, factor = high, min(factor * high, _LARGEST_NOISE_MULTIPLIER), 1.3 * factor
        value = spent(high)
    while enough_at_first and value <= target and low > _SMALLEST_NOISE_MULTIPLIER:
        high, low = low, max(low / factor, _SMALLEST_NOISE_MULTIPLIER)
        factor *= 1.3
        value = spent(low)
    return low, high


def _interpolated(values: dict[float, float], target: float) -> float:
    """Where the straight line in log-log through the two nearest points meets the target."""
    x, slope = min(values, key=lambda x: _distance(values[x], target)), _slope(values, target)
    away = math.log(target / max(values[x], 1e-300)) / slope
    return x * math.exp(min(max(away, -_FAR), _FAR))


def _slope(values: dict[float, float], target: float) -> float:
    (left, one), (right, other) = sorted(
        sorted(values.items(), key=lambda item: _distance(item[1], target))[:2]
    )
    if not (0 < one < math.inf and 0 < other < math.inf) or one == other:
        return -1.0
    return math.log(other / one) / math.log(right / left)


def _distance(value: float, target: float) -> float:
    return abs(math.log(value / target)) if 0 < value < math.inf else math.inf


def _refined(spent: Callable[[float], float], target: float, sigma: float, slope: float) -> float:
    """Moves a multiplier found on the search grid to what the reporting grid says."""
    value = spent(sigma)
    for _ in range(3):
        if not (0 < value < math.inf) or 0 <= 1 - value / target < 5 * _RELATIVE_PRECISION:
            break
        step = math.log(target / value) / slope
        guess = sigma * math.exp(min(max(step, -0.5), 0.5)) * (1 + 0.3 * _RELATIVE_PRECISION)
        at_guess = spent(guess)
        if at_guess > target and value <= target:
            break
        sigma, value = guess, at_guess
    while value > target:
        sigma *= 1 + 5 * _RELATIVE_PRECISION
        value = spent(sigma)
    return sigma


def _unreachable(found: str) -> ConfigurationError:
    return ConfigurationError(
        must="some noise multiplier must reach the target ε",
        found=found,
        cost="a run that promises an ε it cannot prove",
        remedy="ask for a larger ε or δ, or use accountant='pld'",
    )


def _first_guess(epsilon: float, delta: float, whole: GaussianRelease) -> float:
    """The multiplier that the central limit theorem would ask for: quick, and a bit too small.

    Bu et al., arXiv 1911.11607: T releases at rate q look like one Gaussian mechanism with
    μ = q sqrt(T (exp(1/σ²) − 1)). As an ε this would be unsound; as a place to start it is not.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        left = log_ndtr(mu / 2 - epsilon / mu)
        if math.isinf(left):  # of any ε so large δ is zero
            return -math.inf
        right = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        reached = left + math.log(-math.expm1(min(right - left, -1e-300)))
        return float(reached - math.log(delta))

    low, high = math.log(1e-9), math.log(1e4)
    if excess(low) >= 0 or excess(high) <= 0:
        return 1.0
    mu = math.exp(brentq(excess, low, high, xtol=1e-3))
    drawn = whole.sample_rate * whole.group_size  # of one unit, on average
    sigma = 1 / math.sqrt(math.log1p(mu**2 / (drawn**2 * whole.count)))
    return min(max(sigma, _SMALLEST_NOISE_MULTIPLIER), _LARGEST_NOISE_MULTIPLIER)


def _checked_budget(epsilon: object, delta: object, accountant: object) -> tuple[float, float]:
    check_accountant(accountant)
    budget = real_number(
        "epsilon",
        epsilon,
        "(0, inf)",
        cost="no noise multiplier and no number of steps that belong to it",
        remedy="pass the budget ε, for instance 8.0",
    )
    return budget, checked_delta(delta)


def _checked_steps(steps: object) -> int:
    return whole_number(
        "steps",
        steps,
        at_least=1,
        cost="an ε for another number of releases than will run",
        remedy="pass the number of private steps that the run will make",
    )
