"""ε and δ of a sequence of releases, by three accountants that all err on the safe side."""

from __future__ import annotations

import logging
import math
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting.events import GaussianRelease, merged
from lightning_privacy.accounting.privacy_loss import pld_delta, pld_epsilon
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import ACCOUNTANT_NAMES, AccountantName, one_of, real_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPORT_DISCRETIZATION = 1e-4
"""Width of the privacy-loss grid behind every reported ε."""

# Opacus discretises on a grid of its own choice; beyond this many points it takes a minute.
_LARGEST_PRV_GRID = 2**23
PRV_ERROR = 0.01
"""What Opacus's accountant adds to its estimate to be an upper bound."""


def epsilon(
    releases: Sequence[GaussianRelease],
    delta: float,
    accountant: AccountantName = "pld",
    discretization: float = REPORT_DISCRETIZATION,
) -> float:
    """Returns an ε such that the releases together are (ε, δ)-differentially private.

    The value is never below the true ε, never negative, 0 for no releases and infinite where a
    release had no noise. It holds for the neighbouring relations add-or-remove and zero-out, and
    it is adaptive: later queries may depend on earlier outputs, the parameters may not.

    ``"pld"`` composes pessimistic privacy loss distributions (connect the dots: Doroshenko et
    al., arXiv 2207.04380) and is the tightest; units of several parts have no other. ``"prv"`` is
    Opacus's accountant (Gopi et al., arXiv 2106.02848), within 0.01 of it; where its arithmetic
    fails, it warns and gives the RDP bound. ``"rdp"`` is dp-accounting's (Mironov et al., arXiv
    1908.10530), 9 to 30 per cent larger.

    Args:
        releases: What was released, in any order; may be empty.
        delta: δ, in (0, 1).
        accountant: Which accountant to ask.
        discretization: Width of the privacy-loss grid, for "pld"; > 0. It is made finer where the
            losses are small, and coarser where the grid would have millions of points.

    Returns:
        ε >= 0, possibly infinite.

    Raises:
        ConfigurationError: δ, the accountant or the discretisation is not legal.
    """
    delta = checked_delta(delta)
    check_accountant(accountant)
    discretization = _checked_discretization(discretization)
    spent = merged(releases)
    refuse_groups(max((release.group_size for release in spent), default=1), accountant)
    if not spent:
        return 0.0
    if any(release.noise_multiplier == 0 for release in spent):
        return math.inf
    return max(0.0, _cached_epsilon(spent, delta, accountant, discretization))


def delta(
    releases: Sequence[GaussianRelease],
    epsilon: float,
    accountant: AccountantName = "pld",
    discretization: float = REPORT_DISCRETIZATION,
) -> float:
    """Returns a δ such that the releases together are (ε, δ)-differentially private.

    The value is never below the true δ; 0 for no releases, 1 where a release had no noise.

    Args:
        releases: What was released, in any order; may be empty.
        epsilon: ε >= 0, finite.
        accountant: "pld" or "rdp"; Opacus's PRV accountant answers only for ε.
        discretization: Width of the privacy-loss grid, for "pld"; > 0.

    Returns:
        δ in [0, 1].

    Raises:
        ConfigurationError: ε, the accountant or the discretisation is not legal.
    """
    epsilon = real_number(
        "epsilon",
        epsilon,
        "[0, inf)",
        cost="a δ without meaning",
        remedy="pass the ε at which to evaluate δ",
    )
    check_accountant(accountant)
    discretization = _checked_discretization(discretization)
    if accountant == "prv":
        raise ConfigurationError(
            must="`accountant` must be 'pld' or 'rdp' when δ is asked for",
            found="`accountant` = 'prv'",
            cost="an estimate of δ without an error bound",
            remedy="use accountant='pld', which is tighter",
        )
    spent = merged(releases)
    refuse_groups(max((release.group_size for release in spent), default=1), accountant)
    if not spent:
        return 0.0
    if any(release.noise_multiplier == 0 for release in spent):
        return 1.0
    if accountant == "rdp":
        value = _rdp(spent).get_delta(epsilon)
    else:
        value = pld_delta(spent, epsilon, discretization)
    return min(1.0, max(0.0, float(value)))


def renyi_epsilon(releases: Sequence[GaussianRelease], delta: float, order: float) -> float:
    """Returns the ε at δ that follows from the Rényi divergences of one order, added up.

    Larger than `epsilon`. A bound on this sum stays valid where each release was chosen after
    looking at the earlier ones, its noise and rate included: it is what a Rényi filter compares
    with its budget (Feldman and Zrnic 2021, arXiv 2008.11193, theorem 4.3).

    Args:
        releases: What was released, in any order.
        delta: δ, in (0, 1).
        order: α > 1, chosen before anything was released.

    Returns:
        ε >= 0, possibly infinite. Of units of several parts, as if all were drawn together.
    """
    spent = merged(releases)
    if any(release.noise_multiplier == 0 for release in spent):
        return math.inf
    return max(0.0, float(_rdp(spent, [order]).get_epsilon(checked_delta(delta))))


def checked_delta(delta: object) -> float:
    """Returns δ as a float, or refuses it.

    Args:
        delta: What was given.

    Returns:
        δ, strictly between 0 and 1.

    Raises:
        ConfigurationError: δ is no number in (0, 1).
    """
    return real_number(
        "delta",
        delta,
        "(0, 1)",
        cost="a guarantee that holds for nobody (δ >= 1) or for no Gaussian noise (δ = 0)",
        remedy="pass a δ well below one over the number of units, for instance 1e-6",
    )


def delta_warning(delta: float, units: int) -> str | None:
    """Returns what to say of a δ that promises nothing, and None of a smaller one.

    Args:
        delta: δ, in (0, 1).
        units: Number of units.

    Returns:
        The warning, or None.
    """
    if delta * units < 1:
        return None
    return (
        f"delta={delta:g} is not below one over the number of units, {units}: who publishes one "
        "unit as it is would keep this promise. Pass a δ well below 1/n."
    )


def check_accountant(accountant: object) -> None:
    """Refuses an accountant that is not offered, and says why for the one that is asked for most.

    Args:
        accountant: What was given.

    Raises:
        ConfigurationError: The accountant is unknown.
    """
    cost = "an ε from an accountant whose bound is not known to hold"
    if accountant == "gdp":
        cost = "an ε that is too small: the GDP approximation gives 2.23 where the truth is 3.77"
    one_of("accountant", accountant, ACCOUNTANT_NAMES, cost=cost, remedy="use accountant='pld'")


def refuse_groups(group_size: int, accountant: AccountantName) -> None:
    """Refuses accountants that know no mixture of Gaussians.

    Args:
        group_size: Most parts of one unit.
        accountant: Which accountant is asked.

    Raises:
        ConfigurationError: There are several parts, and it is not "pld".
    """
    if accountant != "pld" and group_size > 1:
        raise ConfigurationError(
            must="`accountant` must be 'pld' where a unit has several parts, drawn on their own",
            found=f"`accountant` = {accountant!r}",
            cost="no ε: Rényi and PRV accountants have no mixture of Gaussians",
            remedy="use accountant='pld', or draw users instead of examples",
        )


@lru_cache(maxsize=512)
def _cached_epsilon(
    spent: tuple[GaussianRelease, ...],
    delta: float,
    accountant: AccountantName,
    discretization: float,
) -> float:
    if accountant == "rdp":
        return float(_rdp(spent).get_epsilon(delta))
    if accountant == "prv":
        return _prv_epsilon(spent, delta)
    return pld_epsilon(spent, delta, discretization)


def _rdp(spent: tuple[GaussianRelease, ...], orders: Sequence[float] | None = None) -> Any:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    # Add-or-remove only: with replace-one this accountant drops a factor of 2.
    accountant = RdpAccountant(orders)
    with _without_advice():
        for release in map(_together, spent):
            gaussian = dp_event.GaussianDpEvent(release.noise_multiplier)
            sampled = dp_event.PoissonSampledDpEvent(release.sample_rate, gaussian)
            accountant.compose(sampled if release.sample_rate < 1 else gaussian, release.count)
    return accountant


def _together(release: GaussianRelease) -> GaussianRelease:
    """A release in which all parts of a unit are drawn as soon as any is: it reveals more."""
    if release.group_size == 1:
        return release
    return GaussianRelease(
        noise_multiplier=release.noise_multiplier / release.group_size,
        sample_rate=min(1.0, -math.expm1(release.group_size * math.log1p(-release.sample_rate)))
        if release.sample_rate < 1
        else 1.0,
        count=release.count,
    )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Drops dp-accounting's messages about orders that it leaves out, which is sound."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _prv_epsilon(spent: tuple[GaussianRelease, ...], delta: float) -> float:
    """Opacus's PRV accountant, kept away from the inputs on which it fails or takes minutes."""
    from opacus.accountants import PRVAccountant

    bound = float(_rdp(spent).get_epsilon(delta))
    history = [(release.noise_multiplier, release.sample_rate, release.count) for release in spent]
    steps = sum(count for *_, count in history)
    mesh = PRV_ERROR / math.sqrt(steps * math.log(12_000 / delta) / 2)
    reason = f"its grid would need more than {_LARGEST_PRV_GRID} points"
    if 2 * (bound + 3) / mesh < _LARGEST_PRV_GRID:
        accountant = PRVAccountant()
        accountant.history = history
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))
        except (ArithmeticError, RuntimeError, ValueError, IndexError) as failure:
            reason = f"{type(failure).__name__}: {failure}"
        else:
            if math.isfinite(value):
                return value
            reason = f"it returned {value}"
    warnings.warn(
        f"Opacus's PRV accountant cannot handle these releases ({reason}); the RDP bound, which is "
        "larger, is given instead. accountant='pld' has no such limit.",
        RuntimeWarning,
        stacklevel=2,
    )
    return bound


def _checked_discretization(discretization: object) -> float:
    return real_number(
        "discretization",
        discretization,
        "(0, 1]",
        cost="no grid to compute ε on",
        remedy="leave the default of 1e-4",
    )
