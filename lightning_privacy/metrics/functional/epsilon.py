"""Lower bounds on ε from attack scores: what an audit can prove about a trained model.

Every bound holds with probability 1 − ``significance``. They differ in what they assume:

| bound | assumes |
|---|---|
| Clopper–Pearson | the scores are independent |
| GDP | the same, and a Gaussian trade-off curve (then the bound is an estimate) |
| one run | nothing but fair coins that decided who is a member |
| one run, f-DP | the same, and a Gaussian trade-off curve |

The bound that knows the claimed mechanism's curve is `mechanism_epsilon_lower_bound`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from lightning_privacy.metrics.functional.scores import Counts, Scores, hull, split_scores
from lightning_privacy.types import one_of, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BoundMethod = Literal["clopper_pearson", "gdp", "one_run", "one_run_fdp"]
BOUND_METHODS: tuple[BoundMethod, ...] = get_args(BoundMethod)
_TOLERANCE = 1e-7
# Beyond this no number of canaries that fits into memory can tell.
_LARGEST = 64.0
_SPLIT = 0.2


def epsilon_lower_bound(
    scores: Tensor,
    member: Tensor,
    *,
    delta: float,
    method: BoundMethod = "clopper_pearson",
    significance: float = 0.05,
    threshold: float | Literal["split", "bonferroni"] = "split",
    seed: int = 0,
) -> Tensor:
    """A lower bound on ε at δ, from attack scores of members and non-members.

    Args:
        scores: ``[N]`` attack scores; higher says "more likely a member".
        member: ``[N]`` booleans, or 0 and 1: fair coins thrown before training.
        delta: δ in (0, 1).
        method: "clopper_pearson", "gdp", "one_run" or "one_run_fdp".
        significance: Chance in (0, 0.5) that the bound exceeds the true ε.
        threshold: A number fixed before the scores were seen; "split", which chooses it on a
            random fifth of the scores and bounds on the rest; or "bonferroni", which tries every
            corner of the ROC's convex hull at a significance divided by their number. As the
            corners are chosen by the scores, the last is a heuristic.
        seed: Divides the scores for "split".

    Returns:
        A float64 tensor without dimensions: ε >= 0; 0 if nothing can be proven.

    Raises:
        ConfigurationError: An argument is not legal, or one side is empty.
    """
    one_of("method", method, BOUND_METHODS, cost="no bound", remedy="use 'clopper_pearson'")
    delta, significance = _checked(delta, significance)
    split = split_scores(scores, member)
    value = proven(split, _BOUNDS[method], delta, significance, threshold, seed)
    return torch.tensor(value, dtype=torch.float64)


def proven(
    split: Scores,
    bound: Bound,
    delta: float,
    significance: float,
    threshold: float | Literal["split", "bonferroni"],
    seed: int,
) -> float:
    """What a bound proves by a threshold that is found as `epsilon_lower_bound` says."""
    if threshold == "split":
        chosen_on, split = split.divided(_SPLIT, seed)
        cut = _best(chosen_on, bound, delta, significance)[1]
    elif threshold == "bonferroni":
        return _best(split, bound, delta, significance / len(hull(split)))[0]
    else:
        remedy = 'pass a number, "split" or "bonferroni"'
        cut = real_number("threshold", threshold, "(-inf, inf)", cost="no rule", remedy=remedy)
    return bound(split.counts(cut), delta, significance, 0.0)


def _best(scores: Scores, bound: Bound, delta: float, significance: float) -> tuple[float, float]:
    """The largest bound over the hull, and its threshold; without one, the largest advantage."""
    corners = [(scores.counts(float(cut)), float(cut)) for cut in hull(scores)]
    # The most telling first: the others are then ruled out by one evaluation each.
    corners.sort(key=lambda pair: -_precision(pair[0], significance))
    found = max(corners, key=lambda pair: _advantage(pair[0]))[1]
    best = 0.0
    for counts, cut in corners:
        value = bound(counts, delta, significance, best)
        if value > best:
            best, found = value, cut
    return best, found


def clopper_pearson_epsilon(counts: Counts, *, delta: float, significance: float = 0.05) -> float:
    """ε that the exact intervals of both error rates prove, for a rule fixed in advance.

    max over both directions of ln((TPR_low − δ) / FPR_high), each limit at ``significance`` / 2.
    (Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535.)

    Args:
        counts: True and false positives, members and non-members; independent trials.
        delta: δ in (0, 1).
        significance: Chance in (0, 0.5) that the bound is wrong.

    Returns:
        ε >= 0.

    Raises:
        ConfigurationError: An argument is not legal.
    """
    return _clopper_pearson(counts, *_checked(delta, significance), 0.0)


def _clopper_pearson(counts: Counts, delta: float, significance: float, _least: float) -> float:
    fnr, fpr = error_bounds(counts, significance)
    ways = ((1 - fnr, fpr), (1 - fpr, fnr))
    logs = [math.log((high - delta) / low) for high, low in ways if high > delta and low > 0]
    return max(0.0, *logs) if logs else 0.0


def error_bounds(counts: Counts, significance: float) -> tuple[float, float]:
    """Upper limits of the false-negative and the false-positive rate, that hold together.

    Args:
        counts: What a rule fixed in advance did.
        significance: Chance that one of the limits is too low.

    Returns:
        The two limits, in [0, 1] (Clopper and Pearson 1934, one-sided, each at half the chance).
    """
    missed = counts.members - counts.true_positives
    return (
        _upper(missed, counts.members, significance / 2),
        _upper(counts.false_positives, counts.non_members, significance / 2),
    )


def _upper(count: int, trials: int, significance: float) -> float:
    from scipy.special import betaincinv

    if count >= trials:
        return 1.0
    return float(betaincinv(count + 1, trials - count, 1 - significance))


def gdp_epsilon(counts: Counts, *, delta: float, significance: float = 0.05) -> float:
    """ε at δ of the largest μ with which Gaussian differential privacy is refuted.

    μ = Φ⁻¹(1 − FPR_high) − Φ⁻¹(FNR_high). (Nasr et al. 2023, arXiv 2302.07956.) Where the
    mechanism's trade-off curve is not Gaussian this is an estimate, not a bound.

    Args:
        counts: What a rule fixed in advance did, in independent trials.
        delta: δ in (0, 1).
        significance: Chance in (0, 0.5) that the bound is wrong.

    Returns:
        ε >= 0.

    Raises:
        ConfigurationError: An argument is not legal.
    """
    return _gdp(counts, *_checked(delta, significance), 0.0)


def _gdp(counts: Counts, delta: float, significance: float, _least: float) -> float:
    from scipy.special import ndtri

    fnr, fpr = error_bounds(counts, significance)
    # A negative value says that nothing was seen, not that the opposite was.
    return gaussian_epsilon(max(0.0, float(-ndtri(fpr) - ndtri(fnr))), delta)


def one_run_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """ε that one training run proves, from guesses about independently included canaries.

    (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2.) The canaries may interfere
    with one another in the run: only the coins that included them have to be fair and independent.

    Args:
        canaries: m, each included by a fair coin.
        guesses: r <= m, about how many of them a guess was made.
        correct: v <= r, how many guesses were right.
        delta: δ in [0, 1).
        significance: Chance in (0, 0.5) that the bound is wrong.

    Returns:
        ε >= 0.

    Raises:
        ConfigurationError: An argument is not legal.
    """
    delta, significance = _checked(delta, significance, least="[0, 1)")
    return _one_run(_guessed(canaries, guesses, correct), delta, significance, 0.0)


def _one_run(counts: Counts, delta: float, significance: float, least: float) -> float:
    from scipy.special import bdtr, expit

    correct, guesses = counts.true_positives, counts.true_positives + counts.false_positives
    canaries = counts.members + counts.non_members

    def p_value(epsilon: float) -> float:
        # P[Bin >= k] = 1 - bdtr(k - 1), computed from the other tail to keep its digits.
        wrong = 1 - float(expit(epsilon))
        reached = float(bdtr(guesses - correct, guesses, wrong))
        if not delta or reached > significance:
            return reached
        at = np.arange(1, correct + 1)
        between = bdtr(guesses - correct + at, guesses, wrong) - reached
        return reached + 2 * canaries * delta * float((between / at).max(initial=0.0))

    if not guesses or correct <= guesses / 2:
        return least
    return _largest_refuted(lambda epsilon: p_value(epsilon) <= significance, least)


def one_run_fdp_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """ε at δ of the Gaussian trade-off curve that one training run refutes.

    (Mahloujifar, Melis and Chaudhuri 2025, arXiv 2410.22235, algorithm 3.) Usually more than
    `one_run_epsilon`, for the same assumption on the coins and one on the curve.

    Args:
        canaries: m, each included by a fair coin.
        guesses: r <= m, about how many of them a guess was made.
        correct: v <= r, how many guesses were right.
        delta: δ in (0, 1).
        significance: Chance in (0, 0.5) that the bound is wrong.

    Returns:
        ε >= 0.

    Raises:
        ConfigurationError: An argument is not legal.
    """
    delta, significance = _checked(delta, significance)
    return _one_run_fdp(_guessed(canaries, guesses, correct), delta, significance, 0.0)


def _one_run_fdp(counts: Counts, delta: float, significance: float, least: float) -> float:
    correct, guesses = counts.true_positives, counts.true_positives + counts.false_positives
    canaries = counts.members + counts.non_members

    def refuted(epsilon: float) -> bool:
        mu = _gaussian_mu(epsilon, delta)
        right = significance * correct / canaries
        wrong = significance * (guesses - correct) / canaries
        right, wrong = _recursion(right, wrong, correct, guesses, mu)
        return right + wrong > guesses / canaries

    if not guesses:
        return least
    return _largest_refuted(refuted, least)


def _recursion(
    right: float, wrong: float, correct: int, guesses: int, mu: float
) -> tuple[float, float]:
    from scipy.special import ndtr, ndtri

    for i in range(correct - 1, -1, -1):
        grown = max(wrong, float(ndtr(ndtri(right) - mu)))
        if grown == wrong:
            break
        right = min(1.0, right + i / (guesses - i) * (grown - wrong))
        wrong = grown
    return right, wrong


def _largest_refuted(refuted: Callable[[float], bool], least: float) -> float:
    """The largest ε above ``least`` that is refuted, by bisection; ``least`` if it is not."""
    low, high = least, max(1.0, 2 * least)
    if not refuted(low):
        return least
    while high < _LARGEST and refuted(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of μ-Gaussian differential privacy (Dong et al. 2022, arXiv 1905.02383, cor. 2.13).

    Args:
        mu: μ >= 0, the distance of two normal distributions in standard deviations.
        delta: δ in (0, 1).

    Returns:
        ε >= 0.
    """
    if mu == 0 or _gaussian_log_delta(0.0, mu) <= math.log(delta):
        return 0.0
    if math.isinf(mu):
        return math.inf
    low, high = 0.0, 1.0
    while _gaussian_log_delta(high, mu) > math.log(delta):
        low, high = high, 2 * high
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        above = _gaussian_log_delta(middle, mu) > math.log(delta)
        low, high = (middle, high) if above else (low, middle)
    return low


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ at ε of μ-Gaussian differential privacy; the inverse of `gaussian_epsilon`.

    Args:
        epsilon: ε >= 0.
        mu: μ > 0.

    Returns:
        δ in [0, 1].
    """
    return math.exp(_gaussian_log_delta(epsilon, mu))


def _gaussian_log_delta(epsilon: float, mu: float) -> float:
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log1p(-math.exp(second - first)) if second < first else -math.inf


@lru_cache(maxsize=4096)
def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ whose ε at δ this is."""
    low, high = 0.0, 1.0
    while _gaussian_log_delta(epsilon, high) < math.log(delta):
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        below = _gaussian_log_delta(epsilon, middle) < math.log(delta)
        low, high = (middle, high) if below else (low, middle)
    return low


def _guessed(canaries: int, guesses: int, correct: int) -> Counts:
    cost, remedy = "a bound on nothing", "pass 0 <= correct <= guesses <= canaries"
    m = whole_number("canaries", canaries, at_least=1, cost=cost, remedy=remedy)
    r = whole_number("guesses", guesses, at_least=0, cost=cost, remedy=remedy)
    v = whole_number("correct", correct, at_least=0, cost=cost, remedy=remedy)
    real_number("guesses", r, f"[0, {m}]", cost=cost, remedy=remedy)
    real_number("correct", v, f"[0, {r}]", cost=cost, remedy=remedy)
    return Counts(v, m, r - v, 0)


def _checked(delta: float, significance: float, least: str = "(0, 1)") -> tuple[float, float]:
    cost = "a bound that says nothing"
    return (
        real_number("delta", delta, least, cost=cost, remedy="pass the δ of the claim"),
        real_number("significance", significance, "(0, 0.5)", cost=cost, remedy="pass 0.05"),
    )


def _precision(counts: Counts, significance: float) -> float:
    guesses = counts.true_positives + counts.false_positives
    return 1 - _upper(counts.false_positives, guesses, significance) if guesses else 0.0


def _advantage(counts: Counts) -> float:
    return counts.true_positives / counts.members - counts.false_positives / counts.non_members


if TYPE_CHECKING:
    Bound = Callable[[Counts, float, float, float], float]

_BOUNDS: dict[str, Bound] = {
    "clopper_pearson": _clopper_pearson,
    "gdp": _gdp,
    "one_run": _one_run,
    "one_run_fdp": _one_run_fdp,
}
