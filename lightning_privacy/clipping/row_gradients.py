"""Single rows' gradients for the checks: computed, taken apart and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.contributions import (
    Contribution,
    Dense,
    Lookup,
    Outer,
    instantiated,
)
from lightning_privacy.clipping.products import accumulation_dtype

if TYPE_CHECKING:
    from lightning_privacy.clipping.layout import Layouts

LossOf = Callable[[Sequence[int]], Tensor | None]

# Relative difference that arithmetic alone may cause; models compute parts in float32 anyway.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1
# A gradient below this share of the row's whole gradient is compared on that scale.
_FLOOR = 1e-3


def tolerance_of(parameters: Mapping[str, nn.Parameter], low_precision: bool) -> float:
    """The relative difference that rounding may cause.

    Args:
        parameters: the covered parameters by name.
        low_precision: whether a part of the forward was computed in bfloat16 or float16.

    Returns:
        The largest difference that passes.
    """
    types = [torch.bfloat16] if low_precision else [p.dtype for p in parameters.values()]
    return max(_TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in types)


def captured(
    parameters: Mapping[str, nn.Parameter], loss_of: LossOf, rows: Sequence[int], layouts: Layouts
) -> dict[str, list[Contribution]] | None:
    """Per-row contributions of a batch, as the private step sees them.

    Args:
        parameters: the covered parameters by name.
        loss_of: the training loss of a batch of the given data set rows.
        rows: the batch.
        layouts: from `learn_layouts`.

    Returns:
        Contributions by parameter name; None where the loss has no gradient.
    """
    capture = Capture(parameters, rows=len(rows), layouts=layouts)
    with capture.opened():
        loss = loss_of(rows)
        if loss is None or not loss.requires_grad:
            return None
        capture.armed = True
        loss.backward()
        return capture.collect()


def row_of(
    found: Mapping[str, list[Contribution]],
    row: int,
    parameters: Mapping[str, nn.Parameter],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """One row's gradients by parameter name."""
    gradients = {}
    for name, items in found.items():
        shape = parameters[name].shape
        own = [_only(item, row) for item in items]
        gradients[name] = instantiated(own, shape)[0] * scale
    return gradients


def _only(item: Contribution, row: int) -> Contribution:
    own = slice(row, row + 1)
    if isinstance(item, Dense):
        return Dense(item.gradients[own])
    if isinstance(item, Outer):
        return Outer(item.left[own], item.right[own])
    return Lookup(item.index[own], item.values[own])


def difference(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], floor: float = 0.0
) -> tuple[float, str]:
    """Largest relative difference over parameters, and where. NaN counts as infinite.

    Args:
        first: gradients by parameter name.
        second: what they are compared with.
        floor: a smaller gradient is compared on this scale.
    """
    whole = max(norm(first.values()), norm(second.values()))
    worst, where = 0.0, ""
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            size = norm([t for t in (a, b) if t is not None])
            found = size / max(whole * _FLOOR, size, floor) if size else 0.0
        else:
            size = max(norm([a]), norm([b]), _FLOOR * whole, floor)
            dtype = accumulation_dtype(a.dtype)
            found = norm([a.to(dtype) - b.to(dtype)]) / size if size else 0.0
        if found != found:
            found = float("inf")
        if found > worst:
            worst, where = found, name
    return worst, where


def scaled_by(own: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> float | None:
    """The factor between two gradients; None if they differ by more than a factor."""
    sizes = norm(own.values()), norm(alone.values())
    both = [n for n in own if n in alone]
    product = sum(float((own[n].double() * alone[n].double()).sum()) for n in both)
    aligned = bool(sizes[0] and sizes[1]) and product / (sizes[0] * sizes[1]) > 0.999
    return sizes[0] / sizes[1] if aligned else None


def finite(gradients: Mapping[str, Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity."""
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all tensors."""
    squares = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors]
    return math.sqrt(sum(squares))
