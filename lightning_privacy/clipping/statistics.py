"""What one release looked like from inside."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_privacy.clipping.units import ClippedSum


class StepStatistics:
    """What one release looked like from inside. Computed on private data: not covered by ε.

    Values are computed when first asked for, so that a training step does not wait for them.
    """

    def __init__(
        self, parts: Sequence[ClippedSum], noise_norm: float, signal: Tensor | None
    ) -> None:
        self._parts = tuple(
            (part.members, part.norms, part.factors, part.nonfinite) for part in parts
        )
        self._noise_norm, self._signal = noise_norm, signal

    @cached_property
    def units(self) -> int:
        """Number of units in the draw."""
        return int(self._sum(lambda members, *_: members))

    @cached_property
    def nonfinite(self) -> int:
        """Units left out because their gradient held NaN or infinity."""
        return int(self._sum(lambda _m, _n, _f, nonfinite: nonfinite))

    @cached_property
    def clipped_share(self) -> float:
        """Share of the units whose gradient was scaled down; 0 for an empty draw."""
        clipped = self._sum(lambda members, _n, factors, bad: members & ~bad & (factors < 1))
        return float(clipped) / max(1, self.units)

    @cached_property
    def clipped_mass(self) -> float:
        """Share of the gradients' length that clipping took away: 1 - sum of f |g| / sum of |g|."""
        whole = self._sum(lambda _m, norms, *_: norms)
        kept = self._sum(lambda _m, norms, factors, _b: norms * factors)
        return max(0.0, 1.0 - kept / whole) if whole else 0.0

    @cached_property
    def mean_norm(self) -> float:
        """Mean norm of the units' gradients before clipping; 0 for an empty draw."""
        return float(self._sum(lambda _m, norms, *_: norms)) / max(1, self.units - self.nonfinite)

    @cached_property
    def noise_to_signal(self) -> float | None:
        """Expected norm of the noise over that of the clipped sum, which may be zero.

        None where the release did not measure it.
        """
        if self._signal is None:
            return None
        signal = float(self._signal)
        return self._noise_norm / signal if signal else float("inf")

    def _sum(self, of: Callable[..., Tensor]) -> float:
        return sum(float(of(*part).sum()) for part in self._parts)
