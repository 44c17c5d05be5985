"""FSDP2 for a module that knows nothing of it: which parts are sharded, and what a step sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_privacy.clipping.casts import GATHERED
from lightning_privacy.errors import UnsupportedOperationError
from lightning_privacy.strategies.quantised import pack_quantised
from lightning_privacy.strategies.replicas import broadcast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

    Result = TypeVar("Result")


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a LightningModule: each block of a list of blocks, then each of its direct children.

    The module itself is left alone: Lightning calls its ``training_step``, not its ``forward``.
    Weights in 4 bits become bytes, which are sharded together with their scales.

    Args:
        module: The LightningModule. One that holds a sharded part already is not touched.
        mesh: One dimension, the ranks; or two, replicas and shards.

    Raises:
        UnsupportedOperationError: A parameter belongs to the LightningModule itself; or torch
            cannot shard bytes.
    """
    if any(True for _ in sharded_parts(module)):
        return
    own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    if own:
        raise UnsupportedOperationError(
            must="every trainable parameter belongs to a part of the LightningModule",
            found=f"{', '.join(own)} of the LightningModule itself",
            cost="a parameter that is gathered for no operation, and whole on every rank",
            remedy="put it into a torch.nn.Module, and assign that to an attribute",
        )
    packed = pack_quantised(module, _device(mesh))
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        whole = {p for p in child.parameters() if p not in packed and not _can_be_sharded(p)}
        for part in (*_blocks(child), child):
            try:
                fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
            except RuntimeError as error:
                if packed and "floating point" in str(error):
                    raise _bytes_refused(error) from error
                raise


class Root(nn.Module):
    """Stands above all sharded parts, so that they take turns in gathering.

    The direct children of a LightningModule, by themselves, know nothing of each other. And what
    lies in one of them outside its blocks, such as embeddings and head, may be used although the
    child itself is never called: it is gathered for the whole of a step.

    Args:
        module: A LightningModule that `shard` has sharded.
        mesh: The same mesh.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.module = module
        self._around: list[Any] = [
            child for child in module.children() if next(_blocks(child), None) is not None
        ]
        fully_shard(self, mesh=mesh, ignored_params=set(module.parameters()))
        vars(module)[_ROOT] = self  # not as a part of it

    @staticmethod
    def of(module: nn.Module) -> Root | None:
        """The root above a module; None where the module has sharded itself.

        Args:
            module: A LightningModule.

        Returns:
            The root.
        """
        return vars(module).get(_ROOT)

    def around(self, step: Callable[..., Result], *arguments: Any) -> Result:
        """Run a step of the module within the forward of this one.

        Args:
            step: What to call.
            *arguments: With what.

        Returns:
            What it returns.
        """
        for part in self._around:
            part.unshard()
        result: list[Result] = []
        error: list[BaseException] = []

        def called() -> None:
            # An error, like a result, is kept from FSDP, so that its forward comes to its end.
            try:
                result.append(step(*arguments))
            except BaseException as raised:  # noqa: BLE001 - raised again below
                error.append(raised)

        self(called)
        if error:
            raise error.pop()
        return result.pop()

    def forward(self, step: Callable[[], None]) -> None:
        """Call a step.

        Args:
            step: What to call.
        """
        step()


def sharded_parts(module: nn.Module) -> Iterator[Any]:
    """Find the parts whose parameters are gathered together.

    Args:
        module: Any module.

    Yields:
        Each part that ``fully_shard`` has made.
    """
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def rest(module: nn.Module) -> None:
    """Bring all parts to where they are between two steps: sharded.

    Args:
        module: Any module.
    """
    for part in sharded_parts(module):
        part.reshard()


def same_replicas(module: nn.Module, mesh: DeviceMesh | None) -> None:
    """Give every replica the first one's shards.

    Args:
        module: A module with sharded parts.
        mesh: Of two dimensions, replicas and shards; of one there is nothing to do.
    """
    if mesh is None or mesh.ndim == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        broadcast(own.detach(), mesh.get_group(0))


def gathered_parameters(module: nn.Module, mesh: DeviceMesh | None) -> dict[str, nn.Parameter]:
    """The trainable parameters as operations see them; their memory is there while they run.

    From now on no backward adds up anything across ranks: whatever leaves a rank, the private step
    has clipped.

    Args:
        module: A module with sharded parts.
        mesh: Of the strategy, if it has one of its own: of replicas and shards.

    Returns:
        Whole parameters by name.

    Raises:
        UnsupportedOperationError: The parts are not sharded over all ranks and in one dimension, or
            as the strategy says.
    """
    rest(module)
    found = {n: p for n, p in module.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        _require_plain_shards(name, parameter, mesh)
    shards = [name for name, parameter in found.items() if isinstance(parameter, DTensor)]
    for part in sharded_parts(module):
        part.set_requires_gradient_sync(False)
        part.unshard()
        whole = dict(module.named_parameters())
        gathered = {n: whole[n] for n in shards if not isinstance(whole[n], DTensor)}
        for parameter in gathered.values():
            setattr(parameter, GATHERED, True)
        found.update(gathered)
        part.reshard()
    return found


def _require_plain_shards(name: str, parameter: nn.Parameter, own: DeviceMesh | None) -> None:
    if not isinstance(parameter, DTensor):
        if dist.get_world_size() == 1:
            return
        raise UnsupportedOperationError(
            must="every trainable parameter is sharded, so that one rank alone draws its noise",
            found=f"{name}, which is whole on every rank",
            cost="each rank would release the same sum with noise of its own: as many releases "
            "as ranks, of which one is accounted, and replicas that drift apart",
            remedy="freeze it; shard the module that owns it, too; or leave all of it to "
            'strategy="private_fsdp", which shards whatever is of a real type',
        )
    mesh = parameter.device_mesh
    wrong = mesh.ndim != 1 if own is None or own.ndim == 1 else mesh != own
    if wrong or mesh.size() != dist.get_world_size():
        raise UnsupportedOperationError(
            must="parameters are sharded over all ranks, each of which has its own examples",
            found=f"{name} on a mesh of shape {tuple(mesh.shape)}",
            cost="a part of the ranks' sums would be left out, or get another noise",
            remedy="use one data-parallel dimension: ModelParallelStrategy(data_parallel_size="
            '<all ranks>, tensor_parallel_size=1), or strategy="private_fsdp"; for replicas of '
            "shards PrivateFSDPStrategy(replicas=...) and its shard_mesh",
        )


def _bytes_refused(error: RuntimeError) -> UnsupportedOperationError:
    # torch 2.11 wants a gradient of every shard that it makes, and changes its mind afterwards.
    return UnsupportedOperationError(
        must="torch shards a base in 4 bits, which is bytes",
        found=f"torch {torch.__version__}: {error}",
        cost="a base that is whole on every device",
        remedy="use torch 2.13 or later; or private_ddp, where each device holds the whole base",
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.children():
        if isinstance(part, nn.ModuleList):
            yield from (block for block in part if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(part)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(
        mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
    )


def _can_be_sharded(parameter: nn.Parameter) -> bool:
    """Not one in 8 bits: its scales lie outside the parameter, and would not be sharded."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


_ROOT = "_root_of_shards"
