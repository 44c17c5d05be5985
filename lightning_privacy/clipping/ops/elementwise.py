"""Scaling and shifting a batch by a parameter: broadcast ``mul`` and ``add``; conversions.

What is not the common case (rows first, the parameter broadcast over them) goes to the general
rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.clipping import generic
from lightning_privacy.clipping.registry import operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture


@operation(
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
)
def broadcast(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``x * p`` or ``x + p`` for ``x [B, .., *shape]`` and a parameter ``p [*shape]``."""
    if len(args) != 2 or kwargs or capture.rows == 1:
        return NotImplemented
    first, second = args
    slot = capture.slot(second)
    x, swapped = first, False
    if slot is None:
        slot, x, swapped = capture.slot(first), second, True
    if slot is None or not isinstance(x, Tensor) or x.dim() <= slot.parameter.dim():
        return NotImplemented
    rows = capture.rows_of(slot.name, func, x)
    if rows is None or rows.dim or rows.flattened:
        return NotImplemented
    shape = slot.parameter.shape
    own = slot.leaf(capture.rows).view(-1, *[1] * (x.dim() - 1 - len(shape)), *shape)
    return func(own, x) if swapped else func(x, own)


@operation(Tensor.type_as, Tensor.to)
def conversion(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``p.type_as(x)``: what is asked of ``x`` is its type and device, not its rows."""
    if len(args) < 2 or not isinstance(args[1], Tensor):
        return NotImplemented
    other = args[1]
    plain = (args[0], other.device, other.dtype, *args[2:])
    return generic.apply(capture, Tensor.to, plain, kwargs)
