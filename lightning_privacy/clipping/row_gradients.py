"""Single rows' gradients for the checks: computed, taken apart and compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# In low precision the kernels for one row and for several round small gradients apart.
_LOW_PRECISION_FLOOR = 3e-2
# In low precision rounding shows below this many times `negligible`.
_LOW_PRECISION = 100.0
# Small gradients of what is learnt already round badly; more than this is no rounding.
MOST_ROUNDING = 0.25
# Parameters are moved by this share of themselves: some units in the last place of float32.
_MOVE = 2.0**-20
# Rounding beside other rows may be this much more than four such moves show.
_MORE = 5.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientCheck:
    """What a check of rows' gradients compares, and how.

    Args:
        module: in training mode, as the training uses it.
        parameters: the covered parameters by name.
        loss_of: the training loss of a batch of the given data set rows.
        layouts: from `learn_layouts`.
        loss_reduction: ``"mean"`` or ``"sum"`` over rows.
        negligible: a row's gradient below this norm is compared on that scale, because of rounding.
    """

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss_of: LossOf
    layouts: Layouts
    loss_reduction: str = "mean"
    negligible: float = 0.0


def floor_of(negligible: float, low_precision: bool) -> float:
    """The scale on which one row's smaller gradients are compared.

    Args:
        negligible: a row's gradient below this norm is learnt already, and rounds badly.
        low_precision: whether a part of the forward was computed in bfloat16 or float16.

    Returns:
        The floor, for `difference`.
    """
    return negligible * (_LOW_PRECISION if low_precision else 1.0)


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


def rounding_of(
    parameters: Mapping[str, nn.Parameter], difference_now: Callable[[], float]
) -> float:
    """How much rounding alone can do: as much as the last places of the parameters do.

    Where a gradient is what is left of large terms, or a unit is about to be switched on, batches
    of different sizes round apart. Who shares the batch is not asked here: no coupling shows.

    Args:
        parameters: the covered parameters by name; given back as they were.
        difference_now: computes what is asked for anew, and how much it differs from before.

    Returns:
        Some times the largest difference, `MOST_ROUNDING` at most.
    """
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    found = 0.0
    try:
        # Two directions, each there and back: one alone may be the one that changes nothing.
        for quarter in range(4):
            for parameter, value in kept:
                # As good as random signs, in any layout and without drawing any.
                signs = (1e5 * value + quarter * math.pi / 2).sin().sign()
                parameter.data.copy_(value * (1 + _MOVE * signs))
            found = max(found, difference_now())
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)
    return min(_MORE * found, MOST_ROUNDING)


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


class Gradients(Mapping[str, Tensor]):
    """Gradients by parameter name, each computed when it is asked for and not kept.

    All of a large model's at once would take the memory of the model, for each row.

    Args:
        names: the parameters that have a gradient.
        compute: gives the gradient of one.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def row_of(
    found: Mapping[str, list[Contribution]],
    row: int,
    parameters: Mapping[str, nn.Parameter],
    scale: float = 1.0,
) -> Gradients:
    """One row's gradients by parameter name."""

    def own(name: str) -> Tensor:
        items = [_only(item, row) for item in found[name]]
        return instantiated(items, parameters[name].shape)[0] * scale

    return Gradients(found, own)


def _only(item: Contribution, row: int) -> Contribution:
    own = slice(row, row + 1)
    if isinstance(item, Dense):
        return Dense(item.gradients[own])
    if isinstance(item, Outer):
        return Outer(item.left[own], item.right[own])
    return Lookup(item.index[own], item.values[own])


def difference(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    floor: float = 0.0,
    low_precision: bool = False,
    sizes: Mapping[str, float] | None = None,
) -> tuple[float, str]:
    """Largest relative difference over parameters, and where. NaN counts as infinite.

    Args:
        first: gradients by parameter name.
        second: what they are compared with.
        floor: a smaller gradient is compared on this scale.
        low_precision: whether a part of the forward was computed in bfloat16 or float16.
        sizes: what a difference is relative to, by parameter name, where it is more than the norms:
            of sums in which gradients may cancel.
    """
    scales: dict[str, float] = {}
    differences: dict[str, float] = {}
    whole = [0.0, 0.0, 0.0]
    for name in dict.fromkeys((*first, *second)):
        own = [gradients.get(name) for gradients in (first, second)]
        norms = [0.0 if gradient is None else norm([gradient]) for gradient in own]
        differences[name] = max(norms)
        norms.append(0.0 if sizes is None else sizes.get(name, 0.0))
        whole = [total + size**2 for total, size in zip(whole, norms, strict=True)]
        scales[name] = max(norms)
        a, b = own
        if a is not None and b is not None:
            dtype = accumulation_dtype(a.dtype)
            differences[name] = norm([a.to(dtype) - b.to(dtype)])
    share = _LOW_PRECISION_FLOOR if low_precision else _FLOOR
    floor = max(floor, share * math.sqrt(max(whole)))
    worst, where = 0.0, ""
    for name, scale in scales.items():
        found = differences[name] / max(scale, floor) if differences[name] else 0.0
        if found != found:
            found = float("inf")
        if found > worst:
            worst, where = found, name
    return worst, where


def scaled_by(own: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> float | None:
    """The factor between two gradients; None if they differ by more than a factor, or by a turn."""
    sizes = norm(own.values()), norm(alone.values())
    both = [n for n in own if n in alone]
    product = sum(float((own[n].double() * alone[n].double()).sum()) for n in both)
    if not sizes[0] or not sizes[1]:
        return None
    cosine, factor = product / (sizes[0] * sizes[1]), sizes[0] / sizes[1]
    turn = math.sqrt(max(0.0, 1 - cosine**2))
    return factor if cosine > 0.999 and abs(factor - 1) > turn else None


def finite(gradients: Mapping[str, Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity."""
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all tensors."""
    squares = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors]
    return math.sqrt(sum(squares))
