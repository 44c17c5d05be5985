"""A policy: who belongs to which tier, what each is owed, and how it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.types import one_of, real_number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_privacy.tiers.segmentation import Segmentation

_METHODS = ("scale", "sample")
_LITERAL = ("noise", "variance", "per_user_noise")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierPolicy:
    """Individual budgets by tier (Boenisch et al. 2023, arXiv 2303.17046).

    Args:
        segmentation: Puts each user into a tier.
        targets: ε > 0 by tier, at least two; `SensitivityPolicy.targets` makes them.
        shares: Estimated share of the users by tier, from public knowledge; they add up to 1. They
            set the common noise, so they must not be counted on the protected users.
        method: "scale" gives a stricter tier a smaller clip norm, "sample" a smaller rate, at one
            constant noise.

    Raises:
        ConfigurationError: Names or numbers do not fit together.
        UnsupportedOperationError: Noise that depends on who is present is asked for.
    """

    segmentation: Segmentation
    targets: Mapping[str, float]
    shares: Mapping[str, float]
    method: str = "scale"

    def __post_init__(self) -> None:
        """Checks everything that can be checked without users."""
        _refuse_literal(self.method)
        one_of(
            "method",
            self.method,
            _METHODS,
            cost="budgets that nothing keeps",
            remedy="use 'scale' or 'sample'",
        )
        if set(self.targets) != set(self.shares) or len(self.targets) < 2:
            raise ConfigurationError(
                must="`targets` and `shares` name the same tiers, at least two",
                found=f"{sorted(self.targets)} and {sorted(self.shares)}",
                cost="a tier without a budget",
                remedy="give each tier a target ε and an estimated share of the users",
            )
        for name in self.targets:
            for what, value in (("targets", self.targets), ("shares", self.shares)):
                real_number(
                    f"{what}[{name!r}]",
                    value[name],
                    "(0, inf)" if what == "targets" else "(0, 1]",
                    cost="a tier without a budget",
                    remedy="give each tier a target ε > 0 and a share in (0, 1]",
                )
        if not math.isclose(sum(self.shares.values()), 1.0, abs_tol=1e-6):
            raise ConfigurationError(
                must="`shares` add up to 1",
                found=f"{sum(self.shares.values()):g}",
                cost="another mean clip norm or rate than the one that was asked for",
                remedy="estimate the shares anew, from public knowledge",
            )

    @property
    def largest_target(self) -> float:
        """The headline: the ε that holds for every user."""
        return max(self.targets.values())


def _refuse_literal(method: object) -> None:
    if method in _LITERAL:
        raise UnsupportedOperationError(
            must="the noise does not depend on who is present",
            found=f"method={method!r}",
            cost="its variance tells who was there: 0.1 per cent more of it, in the 4e7 "
            "coordinates of an adapter, has a divergence of 10 in one step",
            remedy="use method='scale' or 'sample': more noise relative to a sensitive user's "
            "contribution, and the same noise for all",
        )
