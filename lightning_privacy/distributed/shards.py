"""A world in which each rank keeps a shard of every parameter: sums and noise are sharded too."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lightning_privacy.distributed.exchange import Exchange
from lightning_privacy.distributed.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Key = TypeVar("Key")


class Shards(World):
    """Each rank has the sum over all ranks for its shard, and alone draws the noise of that shard.

    Threat model: as for `World`; but what a rank knows of the noise is all of its own shard, and
    nothing of the others.
    """

    lockstep = True

    @property
    def noise_parts(self) -> int:
        """1: a coordinate is on one rank only, which draws all of its noise."""
        return 1

    def exchange(self, arrived: Callable[[Key, Tensor], object]) -> Exchange[Key]:
        """Nothing to add up: shards were added up when they were made.

        Args:
            arrived: Called with each key and this rank's shard.

        Returns:
            What takes the shards.
        """
        return Exchange(arrived)
