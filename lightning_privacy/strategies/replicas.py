"""Replicas of one module on all ranks, without `DistributedDataParallel`.

That wrapper's hooks add up raw gradients during the backward. Here the ranks start from the same
parameters, and only the private step adds up: clipped sums with noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lightning_privacy.distributed import World


def replicate(strategy: Any) -> None:
    """Give every rank rank 0's parameters and buffers; what ``configure_ddp`` does here.

    Args:
        strategy: A private `DDPStrategy`, with its module on the device.

    Raises:
        UnsupportedOperationError: The strategy is set to communicate gradients in its own way.
    """
    for name in _OWN_WAYS:
        if getattr(strategy, f"_{name}", None) is not None:
            raise UnsupportedOperationError(
                must="the private step alone adds up gradients across ranks",
                found=f"{type(strategy).__name__}({name}=...)",
                cost="raw gradients that leave a rank, or replicas that drift apart",
                remedy="leave it out; clipped sums are reduced once for each private step",
            )
    for tensor in [*strategy.model.parameters(), *strategy.model.buffers()]:
        # A quantised parameter's scale lies elsewhere; `require_same` compares both.
        if getattr(tensor, "quant_state", None) is None:
            broadcast(tensor.detach())


def broadcast(tensor: Tensor, group: Any = None) -> None:
    """Take over the bytes of the group's first rank: not every backend knows every type.

    Args:
        tensor: Of the same shape and type on every rank.
        group: A process group; None: of all ranks.
    """
    if not tensor.numel():
        return
    whole = tensor.contiguous()
    dist.broadcast(whole.view(-1).view(torch.uint8), group_src=0, group=group)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


def require_same(world: World, fingerprints: Mapping[str, int]) -> None:
    """Refuse ranks whose modules differ.

    Args:
        world: The ranks; all of them call this at the same moment.
        fingerprints: Of parameters and buffers, by name: their bits, or their sizes; empty where
            there is nothing to compare.

    Raises:
        GuaranteeError: One of them has other bits on another rank.
    """
    if world.alone or not fingerprints:
        return
    everywhere = world.gathered([list(fingerprints), list(fingerprints.values())])
    if all(other == everywhere[0] for other in everywhere):
        return
    raise GuaranteeError(
        must="all ranks hold the same parameters and buffers",
        found="differences in " + ", ".join(_differing(everywhere)[:5]),
        cost="a clipped sum of gradients of different models",
        remedy="let no rank change them by itself; a frozen base loads the same checkpoint on "
        "every rank",
    )


def _differing(everywhere: list[Any]) -> list[str]:
    names, first = everywhere[0]
    for other_names, other in everywhere[1:]:
        if other_names != names:
            return sorted(set(names) ^ set(other_names)) or ["the order of the parameters"]
        if other != first:
            return [n for n, a, b in zip(names, first, other, strict=True) if a != b]
    return []


_OWN_WAYS = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")
