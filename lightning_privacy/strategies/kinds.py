"""Which world and which run go with a strategy: of replicas, or of shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.distributed import Shards, World
from lightning_privacy.strategies.base import is_sharded
from lightning_privacy.strategies.run import PrivateRun
from lightning_privacy.strategies.sharded_run import ShardedRun

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def joined(strategy: Strategy) -> World:
    """Join the other ranks of a fit, until `World.left`.

    Args:
        strategy: The trainer's strategy.

    Returns:
        The ranks.
    """
    kind = Shards if is_sharded(strategy) else World
    # Others may have joined processes that train apart from one another.
    world = kind.join().watched() if getattr(strategy, "world_size", 1) > 1 else kind()
    mesh = getattr(strategy, "shard_mesh", None)
    if isinstance(world, Shards) and mesh is not None and mesh.ndim > 1:
        world.replicated(mesh.get_group(0))
    return world


def run_for(strategy: Strategy) -> type[PrivateRun]:
    """The kind of run that drives a fit.

    Args:
        strategy: The trainer's strategy.

    Returns:
        A class.
    """
    return ShardedRun if is_sharded(strategy) else PrivateRun
