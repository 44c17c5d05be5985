"""Pessimistic privacy loss distributions of sampled Gaussian releases, and their composition.

One release becomes a distribution on a grid of losses by connect-the-dots (Doroshenko et al.,
arXiv 2207.04380, Algorithm 1), which is an upper bound on any grid. Many releases are convolved by
one FFT of the exponentially tilted distribution: an FFT's rounding error is relative to the
largest value, so that without the tilt it swamps a δ below 1e-9 (measured on dp-accounting 0.6.0,
Gaussian with μ = 0.5 cut into 1e5 releases, δ = 1e-12: ε comes out 0.098 *below* the exact 3.449).
With the tilt the mass near ε is the largest, and δ is right to eight digits at any size.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_privacy.accounting.mixture import extreme_losses, hockey_stick, mean_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_privacy.accounting.events import GaussianRelease

# A tiny noise multiplier means losses in the hundreds, for which a grid of 1e-4 takes minutes and
# gigabytes. A coarser one is still an upper bound, and fine enough for an ε of that size.
_LARGEST_GRID = 400_000
_LARGEST_COMPOSED_GRID = 2_000_000
# From here on the moment bound, a few per cent larger, is answer enough.
_LARGEST_EPSILON = 200.0
# Beyond these, numbers leave float64: less noise has no finite ε, more is taken for this much, and
# a smaller rate for this one.
_LEAST_NOISE, _MOST_NOISE, _LEAST_RATE = 1e-100, 1e8, 1e-15
# Beyond this exp(loss) is about to leave float64, and ε is in the hundreds.
_LARGEST_LOSS = 576.0
# How many cells on either side of 0 the coarser distribution keeps apart.
_NEAR = 1024
# The FFT's window leaves out at most exp(-_RARE) of the tilted mass, at either end.
_RARE = 28.0


class _Loss(NamedTuple):
    """Masses at (bottom + i) * width for i = 0, 1, …, and the mass on an infinite loss.

    ``moment_losses`` and ``moment_logs`` are a coarser distribution whose E[exp(order * loss)] is
    at least this one's for every order, and which is cheaper to evaluate.
    """

    bottom: int
    masses: np.ndarray
    infinite: float
    moment_losses: np.ndarray
    moment_logs: np.ndarray


class _Mechanism(NamedTuple):
    """``count`` releases; ``group`` is how many parts of one unit are drawn independently."""

    sigma: float
    rate: float
    times: int
    group: int = 1


class _Composition(NamedTuple):
    """What is composed, in one direction: single losses and how often each occurs."""

    parts: tuple[tuple[_Loss, int], ...]
    width: float

    @property
    def infinite(self) -> float:
        """The mass on an infinite total loss."""
        finite = sum(n * math.log1p(-min(loss.infinite, 0.5)) for loss, n in self.parts)
        return -math.expm1(finite)

    def log_moment(self, order: float) -> float:
        """An upper bound on log E[exp(order * total loss)] over the finite losses."""
        return sum(
            n * _log_sum_exp(loss.moment_logs + order * loss.moment_losses)
            for loss, n in self.parts
        )


def pld_epsilon(releases: Sequence[GaussianRelease], delta: float, discretization: float) -> float:
    """Returns an ε for which all releases together are (ε, δ)-differentially private.

    Guarantee: never below the true ε of the worse direction (a unit added, a unit removed).

    Args:
        releases: At least one, with positive noise multipliers and counts.
        delta: δ in (0, 1).
        discretization: Width of the grid, > 0, per unit of total loss; see `_grid_width`.

    Returns:
        ε >= 0, possibly infinite.
    """
    mechanisms = _mechanisms(releases)
    if min(part.sigma for part in mechanisms) < _LEAST_NOISE:
        return math.inf
    if _hopeless(mechanisms):
        # Zero-concentrated DP of the unsampled releases (Bun and Steinke, arXiv 1605.02065).
        rho = sum(0.5 * part.times * (part.group / part.sigma) ** 2 for part in mechanisms)
        return rho + 2 * math.sqrt(-rho * math.log(delta))
    return max(_epsilon(side, delta) for side in _directions(mechanisms, discretization))


def pld_delta(releases: Sequence[GaussianRelease], epsilon: float, discretization: float) -> float:
    """Returns a δ for which all releases together are (ε, δ)-differentially private.

    Guarantee: never below the true δ of the worse direction (a unit added, a unit removed).

    Args:
        releases: At least one, with positive noise multipliers and counts.
        epsilon: ε >= 0.
        discretization: Width of the grid, > 0, per unit of total loss; see `_grid_width`.

    Returns:
        δ in [0, 1].
    """
    mechanisms = _mechanisms(releases)
    if min(part.sigma for part in mechanisms) < _LEAST_NOISE or _hopeless(mechanisms):
        return 1.0
    return min(1.0, max(_delta(side, epsilon) for side in _directions(mechanisms, discretization)))


def _mechanisms(releases: Sequence[GaussianRelease]) -> list[_Mechanism]:
    # Unsampled Gaussians compose exactly into one Gaussian: no grid error adds up.
    return [
        _Mechanism(noise / release.group_size / math.sqrt(release.count), 1.0, 1)
        if release.sample_rate == 1
        else _Mechanism(noise, rate, release.count, release.group_size)
        for release in releases
        for noise in [min(release.noise_multiplier, _MOST_NOISE)]
        for rate in [max(release.sample_rate, _LEAST_RATE)]
    ]


def _hopeless(mechanisms: list[_Mechanism]) -> bool:
    """Whether losses are so large that exp(loss) leaves float64."""
    return any(max(map(abs, _extremes(part))) > _LARGEST_LOSS for part in mechanisms)


def _extremes(part: _Mechanism) -> tuple[float, float]:
    return extreme_losses(part.sigma, part.rate, part.group)


def _directions(
    mechanisms: list[_Mechanism], discretization: float
) -> tuple[_Composition, _Composition]:
    width = _grid_width(mechanisms, discretization)
    both = [
        (_single_losses(part.sigma, part.rate, width, part.group), part.times)
        for part in mechanisms
    ]
    removed = tuple((pair[0], count) for pair, count in both)
    added = tuple((pair[1], count) for pair, count in both)
    return _Composition(removed, width), _Composition(added, width)


def _grid_width(mechanisms: list[_Mechanism], discretization: float) -> float:
    """The grid: ``discretization``, finer where all losses are small, coarser where it must be."""
    total, largest, typical = 0.0, 0.0, 1.0
    for part in mechanisms:
        mean = mean_loss(part.sigma, part.rate, part.group)
        total += part.times * mean + 20 * math.sqrt(part.times * mean)
        largest = max(largest, *map(abs, _extremes(part)))
        typical = min(typical, math.sqrt(2 * mean))
    # The bound's excess grows with count * width²: at a thirtieth of the typical loss it stays
    # below a thousandth of the losses' own variance. On a grid finer than `floor` the rounding of
    # δ(ε) would weigh more than that excess, and might turn the bound over.
    floor = typical / float((7e12 * typical**2) ** (2 / 7))
    fine = discretization * min(1.0, total / 2, 300 * typical)
    fine = max(fine, min(floor, discretization))
    effort = min(1.0, 3e-4 / discretization)  # a search may be coarse where it is expensive
    composed = (total + largest) / _LARGEST_COMPOSED_GRID
    return max(fine, largest / _LARGEST_GRID / effort, composed / effort)


@lru_cache(maxsize=8)
def _single_losses(sigma: float, q: float, width: float, group: int = 1) -> tuple[_Loss, _Loss]:
    """Connect-the-dots for one release: the loss of removing a unit, and of adding one.

    The algorithm takes second differences of δ(ε), which for negative ε is 1 - exp(ε) plus a small
    rest, exp(ε) times the other direction's δ(-ε). The first part contributes nothing, so the rest
    is used alone there, or its digits would drown in those of 1. The two distributions are a pair
    like the true ones: the other direction has the mirrored losses, and masses smaller by
    exp(-loss).
    """
    lowest, highest = extreme_losses(sigma, q, group)
    bottom, top = min(math.floor(lowest / width), -1), max(math.ceil(highest / width), 1)
    losses = np.arange(bottom, top + 1) * width
    delta = hockey_stick(losses, sigma, q, group)[0]
    mirrored = hockey_stick(-losses, sigma, q, group)[1]
    rest = np.exp(np.minimum(losses, 0.0)) * mirrored
    masses = np.empty(len(losses))
    for part, values in ((slice(0, -bottom), rest), (slice(-bottom, None), delta)):
        rises = np.diff(values, prepend=math.nan, append=math.nan)
        masses[part] = ((rises[1:] - rises[:-1] * math.exp(width)) / math.expm1(width))[part]
    masses[0] = (rest[1] - rest[0]) / math.expm1(width) - rest[0]
    masses[-1] = (delta[-1] - delta[-2]) / math.expm1(-width)
    masses = np.maximum(masses, 0.0)
    mirrored_masses = masses[::-1] * np.exp(-losses[::-1])
    return (
        _loss(bottom, masses, float(delta[-1]), width),
        _loss(-top, mirrored_masses, float(mirrored[0]), width),
    )


def _loss(bottom: int, masses: np.ndarray, infinite: float, width: float) -> _Loss:
    """Adds the coarser distribution: cells near 0 alone, farther ones in growing buckets.

    A bucket's mass goes to its two ends, such that its mean stays: exp is convex.
    """
    growing = np.round(_NEAR * (1 + 1 / 512) ** np.arange(0, 512 * 16)).astype(np.int64)
    edges = np.concatenate([-growing[::-1], np.arange(1 - _NEAR, _NEAR), growing]) - bottom
    starts = np.concatenate([[0], edges[(edges > 0) & (edges < len(masses))]])
    ends = np.append(starts[1:], len(masses)) - 1
    total = np.add.reduceat(masses, starts)
    offsets = np.arange(len(masses)) - np.repeat(starts, ends - starts + 1)
    upward = np.add.reduceat(masses * offsets, starts) / np.maximum(ends - starts, 1)
    with np.errstate(divide="ignore"):
        logs = np.log(np.concatenate([np.maximum(total - upward, 0.0), upward]))
    return _Loss(bottom, masses, infinite, (bottom + np.append(starts, ends)) * width, logs)


def _epsilon(composition: _Composition, delta: float) -> float:
    allowed = delta - composition.infinite
    if allowed <= 0:
        return math.inf
    # δ(ε) <= E[exp(λ (loss - ε))] for every λ > 0: the best λ is also the best tilt.
    moment, width = composition.log_moment, composition.width
    bound, tilt = _least(lambda order: (moment(order) - math.log(allowed)) / order, width)
    if bound > _LARGEST_EPSILON:
        return bound
    losses, above, shortfall, spill = _tails(composition, tilt, bound)
    deltas = above - shortfall + spill
    over = np.flatnonzero(deltas > allowed)
    if not len(over):
        return 0.0 if _delta(composition, 0.0) <= delta else max(0.0, float(losses[0]))
    cell = int(over[-1]) + 1  # between the grid points cell - 1 and cell δ is above - c exp(ε)
    if cell == len(losses):
        return bound
    rest = above[cell] + spill - allowed
    inside = math.log(rest / shortfall[cell]) if rest > 0 else 0.0
    return min(bound, max(0.0, float(losses[cell]) + min(inside, 0.0)))


def _delta(composition: _Composition, epsilon: float) -> float:
    moment, width = composition.log_moment, composition.width
    bound, tilt = _least(lambda order: moment(order) - order * epsilon, width)
    estimate = math.exp(min(bound, 0.0))
    losses, above, shortfall, spill = _tails(composition, tilt, epsilon)
    cell = int(np.searchsorted(losses, epsilon))
    if cell == len(losses):
        value = spill
    else:
        value = above[cell] - shortfall[cell] * math.exp(epsilon - losses[cell]) + spill
    return min(estimate, float(value)) + composition.infinite


def _tails(
    composition: _Composition, tilt: float, centre: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Composes, and sums the masses from each grid point on.

    Returns:
        Losses l; A = Σ mass over losses >= l; C = Σ mass exp(l - loss) over the same; and the
        mass that may lie above the window. δ(l) = A - C plus that mass.
    """
    width = composition.width
    start = sum(n * _log_tilted_sum(loss, width, tilt) for loss, n in composition.parts)
    # Tilted mass outside of the window wraps round, and counts too much rather than too little,
    # except that what lay above it may land below ε: that much is charged.
    moment = composition.log_moment
    upper, _ = _least(lambda up: (_RARE + moment(tilt + up) - start) / up, width)
    lower, _ = _least(lambda down: (_RARE + moment(tilt - down) - start) / down, width)
    spill = math.exp(start - tilt * upper - _RARE)
    first, last = math.floor(-lower / width) - 1, math.ceil(upper / width) + 1
    masses = _tilted_convolution(composition, tilt, first, last - first + 1)
    losses = (first + np.arange(len(masses))) * width
    window = slice(int(np.searchsorted(losses, centre - 100)), None)
    losses, masses = losses[window], masses[window]
    masses = masses * np.exp(np.minimum(start - tilt * losses, 300))
    above = np.cumsum(masses[::-1])[::-1]
    shortfall = np.cumsum((masses * np.exp(centre - losses))[::-1])[::-1]
    return losses, above, shortfall * np.exp(np.minimum(losses - centre, 700)), spill


def _tilted_convolution(
    composition: _Composition, tilt: float, first: int, length: int
) -> np.ndarray:
    """Masses of the tilted total loss, which add up to 1, from grid point ``first`` on."""
    from scipy import fft

    size = fft.next_fast_len(max(length, *(len(p.masses) for p, _ in composition.parts)), real=True)
    product: np.ndarray | None = None
    offset = 0
    for loss, count in composition.parts:
        exponents = tilt * composition.width * (loss.bottom + np.arange(len(loss.masses)))
        exponents -= _log_tilted_sum(loss, composition.width, tilt)
        factor = fft.rfft(loss.masses * np.exp(exponents), size) ** count
        product = factor if product is None else product * factor
        offset += count * loss.bottom
    assert product is not None
    masses = np.maximum(fft.irfft(product, size), 0.0)
    # The FFT's rounding, measured at most a sixth of this in 1e7 releases, is charged to every
    # cell: it grows with the number of factors, and is relative to the largest mass.
    rounding = 1e-15 * (100 + sum(count for _, count in composition.parts))
    masses += rounding * (masses + masses.max())
    return np.roll(masses, (offset - first) % size)


def _log_tilted_sum(loss: _Loss, width: float, tilt: float) -> float:
    """Log of Σ mass exp(tilt * loss), exactly."""
    with np.errstate(divide="ignore"):
        logs = np.log(loss.masses)
    return _log_sum_exp(logs + tilt * width * (loss.bottom + np.arange(len(logs))))


def _log_sum_exp(values: np.ndarray) -> float:
    largest = float(values.max())
    return largest + math.log(float(np.exp(values - largest).sum()))


def _least(function: Callable[[float], float], width: float) -> tuple[float, float]:
    """Smallest value over positive orders, and where; any order is sound, the best is tight.

    Orders end at 1 / width: beyond it one cell's tilted mass would be nothing to the next one's.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_order: function(math.exp(log_order)),
        bounds=(math.log(1e-3), -math.log(width)),
        method="bounded",
        options={"xatol": 0.05},
    )
    return float(found.fun), math.exp(float(found.x))
