"""The private step where each rank keeps a shard of every parameter (FSDP2).

An operation sees the whole parameter, gathered for it, so each rank captures whole gradients of
its own examples, and their norms are complete: no norm crosses a rank. The clipped sum of each
parameter is reduce-scattered as soon as a micro-batch has it, while the next ones are computed, and
kept as a shard; each rank draws the noise of its shard. Where several ranks hold the same shard
(replicas of shards, HSDP) each has a part of its sum and of its noise, which are added up together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.distributed.tensor import DTensor, Partial, Shard

from lightning_privacy.distributed import Exchange, all_reduced
from lightning_privacy.step import PrivateStep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_privacy.sampling import UnitRows

# Sums that travel while the next ones are computed; each is held whole until it has arrived.
_UNDER_WAY = 3
# Its name since torch 2.13, where the older one warns.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedStep(PrivateStep):
    """`PrivateStep` over shards.

    All ranks run the same number of micro-batches; in each of them every parameter's sum is
    reduce-scattered once, in the same order, also where a rank has nothing to add.

    Args:
        shards: The sharded parameters, which the optimizer holds, by name.
        named: As for `PrivateStep`; the parameters are the gathered ones.
    """

    buffering = False
    revisiting = False

    def __init__(self, *, shards: Mapping[str, nn.Parameter], **named: Any) -> None:
        super().__init__(**named)
        self.held = {name: shards[name] for name in self.parameters}
        self._names |= {id(shard): name for name, shard in self.held.items()}
        self._to_come = list(self.parameters)
        self._travelling: Exchange[str] = Exchange(super()._add, self._sent, under_way=_UNDER_WAY)

    def begin(self, weights: Sequence[float], units: UnitRows | None = None) -> None:
        """See `PrivateStep.begin`."""
        for shard in self.held.values():
            shard.grad = None
        super().begin(weights, units)
        self._to_come = list(self.parameters)

    def end(self, loss: Tensor | None = None) -> None:
        """See `PrivateStep.end`; then take part in the sums to which this rank adds nothing."""
        super().end(loss)
        self._settle()
        while self._to_come:
            self._scatter(self._to_come.pop(0), None)
        self._travelling.finish()

    def discard(self) -> None:
        """See `PrivateStep.discard`."""
        self._travelling.forget()
        super().discard()

    def _add(self, name: str, gradient: Tensor) -> None:
        while self._to_come[0] != name:
            self._scatter(self._to_come.pop(0), None)
        self._scatter(self._to_come.pop(0), gradient)

    def _scatter(self, name: str, gradient: Tensor | None) -> None:
        """Add up over ranks; each keeps its shard."""
        parameter = self.parameters[name]
        if gradient is None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            gradient = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        self._travelling.send(name, gradient.view(parameter.shape).contiguous())

    def _sent(self, name: str, whole: Tensor) -> tuple[Tensor, Any]:
        """What this rank will hold of the sum over ranks, and what to wait for."""
        shard: Any = self.held[name]
        if not isinstance(shard, DTensor):
            return all_reduced(name, whole)
        # Shards lie along the last dimension of the mesh, replicas of shards along one before it.
        mesh, placements = shard.device_mesh, shard.placements
        size = mesh.size(mesh.ndim - 1)
        if placements[-1] == Shard(0) and len(whole) % size == 0:
            own = whole.new_empty(len(whole) // size, *whole.shape[1:])
            group = mesh.get_group(mesh.ndim - 1)
            return own, _reduce_scatter(own, whole, group=group, async_op=True)
        parts = DTensor.from_local(whole, mesh, [*placements[:-1], Partial()], run_check=False)
        return parts.redistribute(placements=placements).to_local(), None

    def _total(self, names: tuple[str, ...]) -> Tensor:
        parts = []
        for name in names:
            total = self._sums.pop(name, None)
            if total is None:
                local = _local(self.held[name])
                total = torch.zeros_like(
                    local, dtype=torch.promote_types(local.dtype, torch.float32)
                )
            parts.append(total.flatten())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _hand_over(self, names: tuple[str, ...], total: Tensor) -> None:
        locals_ = [_local(self.held[name]) for name in names]
        pieces = _unflatten_dense_tensors(total.to(locals_[0]), locals_)
        for name, piece in zip(names, pieces, strict=True):
            shard: Any = self.held[name]
            if isinstance(shard, DTensor):
                piece = DTensor.from_local(  # noqa: PLW2901 - the same gradient, as the optimizer wants it
                    piece, shard.device_mesh, shard.placements, run_check=False,
                    shape=shard.shape, stride=shard.stride(),
                )  # fmt: skip
            shard.grad = piece


def _local(shard: nn.Parameter) -> Tensor:
    return shard.to_local().detach() if isinstance(shard, DTensor) else shard.detach()
