"""What a private run has released, as immutable values that an accountant adds up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianRelease:
    """``count`` releases of a Poisson-subsampled Gaussian mechanism with the same parameters.

    One release is: draw each unit independently with probability ``sample_rate``, add up
    contributions of norm at most 1, add Gaussian noise of standard deviation
    ``noise_multiplier`` in every coordinate. Where ``group_size`` is above 1, a unit has up to that
    many parts, each with a draw and a contribution of its own (arXiv 2401.10294).

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, >= 0; 0 means that
            no noise was added, and costs an infinite ε.
        sample_rate: Probability with which a unit is drawn, in (0, 1].
        count: Number of draws, >= 0.
        group_size: Most parts of one unit, >= 1, each drawn on its own.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    group_size: int = 1

    def __post_init__(self) -> None:
        """Checks and normalises the three numbers."""
        noise_multiplier = real_number(
            "noise_multiplier",
            self.noise_multiplier,
            "[0, inf)",
            cost="an ε that describes a mechanism that was not run",
            remedy="pass the standard deviation of the noise divided by the sensitivity",
        )
        sample_rate = real_number(
            "sample_rate",
            self.sample_rate,
            "(0, 1]",
            cost="an ε that describes a sampling that was not done",
            remedy="pass the probability with which each unit is drawn",
        )
        count = whole_number(
            "count",
            self.count,
            at_least=0,
            cost="spent budget that is not counted",
            remedy="pass the number of draws as an int",
        )
        object.__setattr__(self, "noise_multiplier", noise_multiplier)
        object.__setattr__(self, "sample_rate", sample_rate)
        group_size = whole_number(
            "group_size",
            self.group_size,
            at_least=1,
            cost="users whose further examples no accountant counts",
            remedy="pass the most examples that one user may have",
        )
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "group_size", group_size)

    def same_mechanism(self, other: GaussianRelease) -> bool:
        """Says whether both have the same noise multiplier, sample rate and group size.

        Args:
            other: The release to compare with.

        Returns:
            True if they differ in their count at most.
        """
        return self.times(0) == other.times(0)

    def times(self, count: int) -> GaussianRelease:
        """Returns the same mechanism with another number of draws.

        Args:
            count: Number of draws, >= 0.

        Returns:
            A new value.
        """
        return replace(self, count=count)

    def to_dict(self) -> dict[str, float | int]:
        """Returns plain Python scalars, for checkpoints and JSON.

        Returns:
            A dictionary that `from_dict` turns back into an equal value; the group size stands in
            it where it is not 1.
        """
        fields: dict[str, float | int] = {
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "count": self.count,
        }
        return fields if self.group_size == 1 else {**fields, "group_size": self.group_size}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> GaussianRelease:
        """Rebuilds a release from `to_dict`'s result.

        Args:
            fields: Exactly the fields that `to_dict` writes.

        Returns:
            The release.

        Raises:
            GuaranteeError: A field is missing or unknown.
            ConfigurationError: A value is outside its range.
        """
        expected = {"noise_multiplier", "sample_rate", "count"}
        if set(fields) - {"group_size"} != expected:
            raise GuaranteeError(
                must=f"a stored release must have exactly the fields {sorted(expected)}",
                found=f"the fields {sorted(map(str, fields))}",
                cost="spent budget that is read wrongly",
                remedy="load it with the version of lightning_privacy that wrote it",
            )
        return cls(
            noise_multiplier=fields["noise_multiplier"],  # type: ignore[arg-type]
            sample_rate=fields["sample_rate"],  # type: ignore[arg-type]
            count=fields["count"],  # type: ignore[arg-type]
            group_size=fields.get("group_size", 1),  # type: ignore[arg-type]
        )


def merged(releases: Sequence[GaussianRelease]) -> tuple[GaussianRelease, ...]:
    """Adds up the counts of equal mechanisms, wherever they stand, and drops empty ones.

    Composition does not depend on the order, so this changes no ε; it saves the accountant work.

    Args:
        releases: Releases in any order.

    Returns:
        At most one release for each mechanism.
    """
    counts: dict[GaussianRelease, int] = {}
    for release in releases:
        mechanism = release.times(0)
        counts[mechanism] = counts.get(mechanism, 0) + release.count
    return tuple(mechanism.times(count) for mechanism, count in counts.items() if count)
