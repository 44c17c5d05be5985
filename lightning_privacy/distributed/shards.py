"""A world in which each rank keeps a shard of every parameter: sums and noise are sharded too."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch.distributed as dist
from typing_extensions import override

from lightning_privacy.distributed.exchange import Exchange, all_reduced
from lightning_privacy.distributed.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Key = TypeVar("Key")


class Shards(World):
    """The ranks that hold a shard draw its noise: one of them all, or each of several a part.

    After the reduce-scatter a rank has the sum over the ranks of its mesh row for its shard. Where
    shards have no replicas that is the sum over all ranks. Where they have, the sums of the rows
    are added up over the replicas of a shard, each with its share of the noise, as in `World`.

    Threat model: as for `World`; but what a rank knows of the noise is all of its own shard, or its
    share of it where that has replicas, and nothing of the others.
    """

    lockstep = True
    _replicas: Any = None

    def replicated(self, group: Any) -> Self:
        """Say which ranks hold the same shard as this one; by default no other does.

        Args:
            group: Their process group.

        Returns:
            This world.
        """
        self._replicas = group
        return self

    @property
    @override
    def noise_parts(self) -> int:
        """How many ranks hold a coordinate: 1, or the replicas of a shard."""
        return 1 if self._replicas is None else dist.get_world_size(self._replicas)

    @override
    def exchange(self, arrived: Callable[[Key, Tensor], object]) -> Exchange[Key]:
        """Add up shards over their replicas; where there are none, that was done before.

        Args:
            arrived: Called with each key and this rank's shard.

        Returns:
            What takes the shards.
        """
        if self._replicas is None:
            return Exchange(arrived)
        return Exchange(arrived, partial(all_reduced, group=self._replicas))
