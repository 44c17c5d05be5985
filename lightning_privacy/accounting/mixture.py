"""One release of a Gaussian mechanism on the sampled contributions of one unit, exactly.

A unit has up to G parts, each drawn with probability q and each of norm at most 1. The release is
dominated by P = Σ_k Binom(G, q)(k) N(k, σ²) against Q = N(0, σ²), a mixture of Gaussians (Ganesh,
arXiv 2401.10294; vectors reduce to numbers by arXiv 2310.15526, Corollary 4.7). G = 1 is the
Poisson-subsampled Gaussian. The loss log P/Q rises with the output, so that every event
"loss above ε" is a half-line, found by inverting one convex function.

Outputs x are written as gains u = log N(1, σ²) : N(0, σ²) at x, where few digits cancel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Outputs beyond this many standard deviations (mass 4e-26) count as infinite losses.
TAIL = 10.5
# Numbers of drawn parts that are rarer than this together count as all parts drawn.
_RARE_COUNT = 1e-27
_NEWTON_STEPS = 60


class Mixture(NamedTuple):
    """How many parts are drawn.

    Attributes:
        none: Probability that no part is drawn.
        some: 1 - none, with all its digits.
        sizes: Numbers of parts >= 1, ascending.
        logs: Log of each one's probability, given that any part is drawn.
    """

    none: float
    some: float
    sizes: tuple[int, ...]
    logs: tuple[float, ...]


@lru_cache(maxsize=64)
def binomial(sample_rate: float, group_size: int) -> Mixture:
    """Returns the distribution of the number of drawn parts, rounded up where it is rare.

    Guarantee: it dominates the binomial one. Probability is only ever moved to larger numbers,
    which makes the release more revealing (arXiv 2401.10294).

    Args:
        sample_rate: Probability q of each part, in (0, 1].
        group_size: Number of parts G >= 1.

    Returns:
        The mixture.
    """
    if sample_rate == 1 or group_size == 1:
        return Mixture(1 - sample_rate, sample_rate, (group_size,), (0.0,))
    from scipy.stats import binom

    beyond = binom.sf(np.arange(1, group_size + 1), group_size, sample_rate)
    last = int(np.argmax(beyond < _RARE_COUNT)) + 1
    sizes = np.arange(1, last + 1)
    logs = binom.logpmf(sizes, group_size, sample_rate)
    if last < group_size:
        rest = float(binom.logsf(last, group_size, sample_rate))
        sizes, logs = np.append(sizes, group_size), np.append(logs, max(rest, -700.0))
    log_none = group_size * math.log1p(-sample_rate)
    some = -math.expm1(log_none)
    logs -= math.log(some)
    return Mixture(math.exp(log_none), some, tuple(sizes.tolist()), tuple(logs.tolist()))


def hockey_stick(
    epsilons: np.ndarray, noise_multiplier: float, sample_rate: float, group_size: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns δ(ε) of one release for a unit removed and for a unit added.

    These are the hockey-stick divergences of P from Q and of Q from P (Zhu et al., arXiv
    2106.08567), as a sum over the number of drawn parts. Each term is a difference that is never
    negative, taken in log space, so that no digits cancel in the tails.

    Args:
        epsilons: Values of ε, any sign.
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        group_size: G >= 1.

    Returns:
        δ for removing, δ for adding; each in [0, 1], of the shape of ``epsilons``.
    """
    from scipy.special import log_ndtr

    sigma, mixture = noise_multiplier, binomial(sample_rate, group_size)
    removed, added = np.empty_like(epsilons), np.empty_like(epsilons)
    lowest = math.log1p(-mixture.some) if mixture.some < 1 else -math.inf
    for out, sign in ((removed, 1.0), (added, -1.0)):
        losses = sign * epsilons
        reached = losses > lowest  # no output has a smaller loss
        gain = _gain(losses[reached], sigma, mixture)
        at = sigma * gain + 0.5 / sigma  # the output where the loss is ε, in standard deviations
        still = log_ndtr(-sign * at)
        total = np.zeros_like(gain)
        for size, log in zip(mixture.sizes, mixture.logs, strict=True):
            ratio = size * gain - 0.5 * size * (size - 1) / sigma**2
            moved = log_ndtr(sign * (size / sigma - at))
            if sign > 0:
                total += np.exp(log + moved) * -np.expm1(np.minimum(still + ratio - moved, 0.0))
            else:
                scale = log + still + ratio + epsilons[reached]
                total += np.exp(scale) * -np.expm1(np.minimum(moved - still - ratio, 0.0))
        out[reached] = mixture.some * total
        out[~reached] = -np.expm1(np.minimum(epsilons[~reached], 0.0))
    return np.clip(removed, 0.0, 1.0), np.clip(added, 0.0, 1.0)


def extreme_losses(
    noise_multiplier: float, sample_rate: float, group_size: int = 1
) -> tuple[float, float]:
    """Returns losses beyond which almost no mass lies (4e-26 for each number of drawn parts).

    Args:
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        group_size: G >= 1.

    Returns:
        The lowest and the highest loss of removing a unit.
    """
    sigma, mixture = noise_multiplier, binomial(sample_rate, group_size)
    highest = max(
        size / sigma + math.sqrt(TAIL**2 + 2 * log)
        for size, log in zip(mixture.sizes, mixture.logs, strict=True)
        if TAIL**2 + 2 * log > 0
    )
    lowest, top = (_loss((at - 0.5 / sigma) / sigma, sigma, mixture) for at in (-TAIL, highest))
    return lowest, top


def mean_loss(noise_multiplier: float, sample_rate: float, group_size: int = 1) -> float:
    """Returns an estimate, from above, of the mean loss of removing a unit.

    Args:
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        group_size: G >= 1.

    Returns:
        At most the unsampled parts' share, and χ²/2 where there is much noise.
    """
    sigma, mixture = noise_multiplier, binomial(sample_rate, group_size)
    usual = [TAIL**2 + 2 * log > 0 for log in mixture.logs]
    sizes = np.array(mixture.sizes, float)[usual]
    weights = mixture.some * np.exp(np.array(mixture.logs)[usual])
    mean = 0.5 * float(weights @ sizes**2) / sigma**2
    products = np.outer(sizes, sizes) / sigma**2
    if products.max() < 600:
        mean = min(mean, 0.5 * float(weights @ np.expm1(products) @ weights))
    return mean


def _gain(losses: np.ndarray, sigma: float, mixture: Mixture) -> np.ndarray:
    """Solves loss = log(none + some · Σ_k w_k exp(k u - k(k-1)/2σ²)) for u."""
    target = _log_ratio_of_some(losses, mixture)
    if len(mixture.sizes) == 1 and mixture.sizes[0] == 1:
        return target
    sizes, logs = np.array(mixture.sizes, float), np.array(mixture.logs)
    offsets = logs - 0.5 * sizes * (sizes - 1) / sigma**2
    # One term of the sum alone reaches the target here or later, so the root lies to the left;
    # from there Newton's steps on a convex function fall monotonically.
    gain = np.full_like(target, np.inf)
    for size, offset in zip(sizes, offsets, strict=True):
        np.minimum(gain, (target - offset) / size, out=gain)
    for _ in range(_NEWTON_STEPS):
        value, slope = _log_sum(gain, sizes, offsets)
        step = (value - target) / slope
        gain -= step
        if not step.size or np.all(np.abs(step) <= 1e-14 * (1 + np.abs(gain))):
            break
    return gain


def _log_ratio_of_some(losses: np.ndarray, mixture: Mixture) -> np.ndarray:
    """Solves loss = log(none + some · exp(t)) for t."""
    none, some = mixture.none, mixture.some
    result = np.empty_like(losses)
    # The first form keeps its digits around 0, the second one far from it. A loss that is a
    # rounding error above the lowest one would give t = -inf, and inf - inf later.
    near = np.abs(losses) < 1
    result[near] = np.log1p(np.maximum(np.expm1(losses[near]) / some, -1 + 1e-16))
    far = losses[~near]
    result[~near] = far - math.log(some) + np.log1p(np.maximum(-none * np.exp(-far), -1 + 1e-16))
    return result


def _log_sum(
    gain: np.ndarray, sizes: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log of Σ_k exp(offset_k + k u), and its slope."""
    largest = np.full_like(gain, -np.inf)
    for size, offset in zip(sizes, offsets, strict=True):
        np.maximum(largest, size * gain + offset, out=largest)
    total, weighted = np.zeros_like(gain), np.zeros_like(gain)
    for size, offset in zip(sizes, offsets, strict=True):
        term = np.exp(size * gain + offset - largest)
        total += term
        weighted += size * term
    return largest + np.log(total), weighted / total


def _loss(gain: float, sigma: float, mixture: Mixture) -> float:
    sizes, logs = np.array(mixture.sizes, float), np.array(mixture.logs)
    offsets = logs - 0.5 * sizes * (sizes - 1) / sigma**2
    value = float(_log_sum(np.array([gain]), sizes, offsets)[0][0]) + math.log(mixture.some)
    return float(np.logaddexp(value, math.log(mixture.none) if mixture.none > 0 else -math.inf))
