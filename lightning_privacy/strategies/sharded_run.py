"""A private fit whose parameters are sharded between its steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from lightning_privacy.distributed import World
from lightning_privacy.sharded_step import ShardedStep
from lightning_privacy.strategies.run import PrivateRun
from lightning_privacy.strategies.sharding import gathered_parameters, rest

if TYPE_CHECKING:
    from torch import nn


class ShardedRun(PrivateRun):
    """`PrivateRun` over shards."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters as operations see them."""
        mesh = getattr(self.strategy, "shard_mesh", None)
        parameters = gathered_parameters(self.module, mesh)
        shards = {n: p for n, p in self.module.named_parameters() if n in parameters}
        self.step_class = functools.partial(ShardedStep, shards=shards)
        return parameters

    def _require_unchanged(self, *, anew: bool) -> None:
        rest(self.module)
        super()._require_unchanged(anew=anew)

    def forget_state(self) -> None:
        """After a validation, which has gathered parts of the module."""
        rest(self.module)
        super().forget_state()

    def _verify_state(self, moment: str) -> None:
        rest(self.module)
        super()._verify_state(moment)

    def _watch_state(self, replicas: World | None = None) -> None:
        rest(self.module)
        # Each rank has other shards: there is nothing to be compared.
        super()._watch_state(World())
