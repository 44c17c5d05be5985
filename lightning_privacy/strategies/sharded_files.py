"""One checkpoint file, of any strategy, into sharded parameters.

Lightning's own reader wants every parameter in the file, and takes an optimizer's numbers as those
of all parameters. With adapters neither is so: the frozen base is read elsewhere, and the optimizer
holds the trained parameters only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch.optim import Optimizer


def load_file(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Give each rank its shards of what a file holds. Every rank reads the file itself.

    Args:
        path: A checkpoint of Lightning, one file.
        module: Gets its state.
        optimizers: Get theirs, in the order of the file.
        strict: Whether the file holds exactly the names of ``module.state_dict()``.
        weights_only: As for `torch.load`.

    Returns:
        What else the file holds, and the states of the optimizers.
    """
    held = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    own = module.state_dict()
    state = {name: _sharded_as(own.get(name), value) for name, value in held["state_dict"].items()}
    module.load_state_dict(state, strict=strict)
    del held["state_dict"]
    for optimizer, saved in zip(optimizers, held.get("optimizer_states", []), strict=False):
        optimizer.load_state_dict(_sharded_states(optimizer, saved))
    return held


def _sharded_states(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    states = {
        number: {key: _sharded_as(by_number.get(number), value) for key, value in state.items()}
        for number, state in saved["state"].items()
    }
    return {**saved, "state": states}


def _sharded_as(like: Any, value: Any) -> Any:
    """The shard of a tensor; anything that is no tensor of that shape stays as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or like.shape != value.shape:
        return value
    mesh, placements = like.device_mesh, like.placements
    whole = value.to(like.device)
    shard = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
