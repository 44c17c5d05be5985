"""Private training with every parameter sharded over the devices (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import override

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.strategies.base import privatize
from lightning_privacy.strategies.sharded_files import load_file
from lightning_privacy.strategies.sharding import Root, same_replicas, shard, sharded_parts
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from datetime import timedelta

    from lightning.pytorch import Trainer
    from torch.distributed.device_mesh import DeviceMesh

_UNSET: Any = object()


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` for data parallelism alone, without ``configure_model``.

    It shards the module itself: each block of its ``torch.nn.ModuleList``, then what remains. A
    module that calls ``fully_shard`` in ``configure_model`` keeps its own way.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes its
            shard, or one file, which any strategy can read.
        process_group_backend: As for `ModelParallelStrategy`.
        timeout: As for `ModelParallelStrategy`; its default if left out.
        replicas: How many ranks hold each shard (hybrid sharding, HSDP), a divisor of the number of
            ranks. With the number of nodes, parameters are gathered within a node, and only clipped
            and noised sums of shards travel between nodes. 1: every rank has a shard of its own.

    Attributes:
        replicas: The same.
        shard_mesh: Of one dimension, the shards; or of two, replicas and shards. From
            ``setup_environment`` on.

    Raises:
        ConfigurationError: ``replicas`` does not divide the number of ranks.
    """

    shard_mesh: DeviceMesh | None = None

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        replicas: int = 1,
    ) -> None:
        self.replicas = whole_number(
            "replicas", replicas, at_least=1, cost="parameters on no device", remedy="pass 1"
        )
        named: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            **named,
        )

    @override
    def setup_environment(self) -> None:
        """All ranks are data parallel."""
        ranks = self._data_parallel_size = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise ConfigurationError(
                must="every shard has as many replicas as any other",
                found=f"replicas={self.replicas} on {ranks} ranks",
                cost="shards that some ranks do not have",
                remedy="pass a divisor of the number of ranks, for instance the number of nodes",
            )
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            shape = self.replicas, ranks // self.replicas
            names = ("replicas", "shards")
            self.shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @override
    def setup(self, trainer: Trainer) -> None:
        """Shard the module, unless it has done so, before the optimizers are made."""
        module: Any = self.lightning_module
        if next(sharded_parts(module), None) is None:
            assert self.shard_mesh is not None
            shard(module, self.shard_mesh)
            Root(module, self.shard_mesh)
        same_replicas(module, self.shard_mesh)
        own = vars(module).get("configure_model", _UNSET)
        # Lightning wants the module to have sharded itself; it was called before, if there is one.
        module.configure_model = _sharded_already
        try:
            super().setup(trainer)
        finally:
            if own is _UNSET:
                del module.configure_model
            else:
                module.configure_model = own

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """See `Strategy.load_checkpoint`; a folder of shards, or one file of any strategy."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_file():
            return super().load_checkpoint(path, weights_only)
        module: Any = self.lightning_module
        return load_file(
            path, module, self.optimizers, strict=module.strict_loading, weights_only=weights_only
        )

    @override
    def training_step(self, *arguments: Any) -> Any:
        """See `Strategy.training_step`."""
        return self._step(super().training_step, *arguments)

    @override
    def validation_step(self, *arguments: Any) -> Any:
        """See `Strategy.validation_step`."""
        return self._step(super().validation_step, *arguments)

    @override
    def test_step(self, *arguments: Any) -> Any:
        """See `Strategy.test_step`."""
        return self._step(super().test_step, *arguments)

    @override
    def predict_step(self, *arguments: Any) -> Any:
        """See `Strategy.predict_step`."""
        return self._step(super().predict_step, *arguments)

    def _step(self, step: Any, *arguments: Any) -> Any:
        module: Any = self.lightning_module
        root = Root.of(module)
        return step(*arguments) if root is None else root.around(step, *arguments)


def _sharded_already() -> None:
    """Stands for a ``configure_model`` that shards."""


PrivateFSDPStrategy = privatize(FullyShardedStrategy)
"""What ``Trainer(strategy="private_fsdp")`` names: parameters sharded by FSDP2, made private."""
# A class is pickled by the place where it can be imported from.
PrivateFSDPStrategy.__module__ = __name__
PrivateFSDPStrategy.__name__ = PrivateFSDPStrategy.__qualname__ = "PrivateFSDPStrategy"

StrategyRegistry.register(
    "private_fsdp",
    PrivateFSDPStrategy,
    description="differentially private training with parameters sharded over devices (FSDP2)",
    override=True,
)
