"""What one release looked like from inside, over all ranks. None of it is covered by ε."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_privacy.clipping.units import ClippedSum
    from lightning_privacy.distributed import World


class Signal:
    """Measures the norm of a release's clipped sum, beside that of its noise.

    Where a rank has the whole sum, or the whole sum of its shard, it is measured before the noise.
    Of sums that lie on several ranks only the noised total ever exists: the expected square of the
    noise is taken off it, which leaves an estimate, and 0 where the noise hides the sum.

    Args:
        std: Standard deviation of the noise in each coordinate.
        world: The ranks.
        wanted: Whether to measure, a pass over the sum.
    """

    def __init__(self, std: float, world: World, *, wanted: bool) -> None:
        self._std, self._wanted = std, wanted
        self._replicas = world.noise_parts > 1
        self._norms: list[Tensor] = []
        self._size = 0

    def before(self, total: Tensor) -> None:
        """See a part of this rank's sum without noise.

        Args:
            total: The part; all parts of a release are on one device.
        """
        self._size += total.numel()
        if self._wanted and not self._replicas:
            self._norms.append(torch.linalg.vector_norm(total).float())

    def after(self, total: Tensor) -> None:
        """See a part of the sum with noise.

        Args:
            total: The part.
        """
        if self._wanted and self._replicas:
            self._norms.append(torch.linalg.vector_norm(total).float())

    def squares(self, like: Tensor) -> Tensor:
        """This rank's part of the squared norm, and of the number of coordinates.

        Args:
            like: Says type and device.

        Returns:
            Two numbers, to be added up over shards; the first is negative where nothing was
            measured.
        """
        size = like.new_tensor(float(self._size))
        if not self._norms:
            return torch.stack([-like.new_ones(()), size])
        return torch.stack([torch.stack(self._norms).to(like).square().sum(), size])

    def ratio(self, square: float, size: float) -> float | None:
        """Expected norm of the noise over that of the sum.

        Args:
            square: The squared norm over all shards.
            size: The number of coordinates.

        Returns:
            The ratio, infinite for a sum of zero; None where it was not measured.
        """
        if square < 0:
            return None
        noise = self._std**2 * size
        if self._replicas:
            square = max(0.0, square - noise)
        return (noise / square) ** 0.5 if square else float("inf")


class StepStatistics:
    """What one release looked like from inside. Computed on private data: not covered by ε.

    Values are computed when first asked for, so that a training step does not wait for them.

    Args:
        parts: This rank's micro-batches.
        measured: Norms of sum and noise.
        world: The ranks; of several, the figures are added up at once, without waiting.
    """

    def __init__(self, parts: Sequence[ClippedSum], measured: Signal, world: World) -> None:
        self._parts = tuple(
            (part.members, part.norms, part.factors, part.nonfinite) for part in parts
        )
        self._measured = measured
        self._everywhere = None if world.alone else self._over(world)

    @cached_property
    def units(self) -> int:
        """Number of units in the draw."""
        return int(self._totals[0])

    @cached_property
    def nonfinite(self) -> int:
        """Units left out because their gradient held NaN or infinity."""
        return int(self._totals[1])

    @cached_property
    def clipped_share(self) -> float:
        """Share of the units whose gradient was scaled down; 0 for an empty draw."""
        return self._totals[2] / max(1, self.units)

    @cached_property
    def clipped_mass(self) -> float:
        """Share of the gradients' length that clipping took away: 1 - sum of f |g| / sum of |g|."""
        whole, kept = self._totals[3:5]
        return max(0.0, 1.0 - kept / whole) if whole else 0.0

    @cached_property
    def mean_norm(self) -> float:
        """Mean norm of the units' gradients before clipping; 0 for an empty draw."""
        return self._totals[3] / max(1, self.units - self.nonfinite)

    @cached_property
    def noise_to_signal(self) -> float | None:
        """Expected norm of the noise over that of the clipped sum, which may be zero.

        None where the release did not measure it.
        """
        return self._measured.ratio(*self._totals[5:])

    @cached_property
    def _totals(self) -> list[float]:
        found = self._added() if self._everywhere is None else self._everywhere
        totals: list[float] = found.tolist()
        return totals

    def _over(self, world: World) -> Tensor:
        own = self._added()
        everywhere = world.sum_(own.clone())
        # A replica has measured the whole already.
        return everywhere if world.lockstep else torch.cat([everywhere[:5], own[5:]])

    def _added(self) -> Tensor:
        """Of this rank: units, non-finite and clipped ones, sums of norms; and `Signal`'s."""
        figures = [
            torch.stack(
                [
                    members.sum().to(norms.dtype),
                    bad.sum().to(norms.dtype),
                    (members & ~bad & (factors < 1)).sum().to(norms.dtype),
                    norms.sum(),
                    (norms * factors).sum(),
                ]
            )
            for members, norms, factors, bad in self._parts
        ]
        total = torch.stack(figures).sum(0) if figures else torch.zeros(5)
        return torch.cat([total, self._measured.squares(total)])
