"""Dense layers: ``F.linear`` and ``addmm`` (transformers' ``Conv1D``), any input rank."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_privacy.clipping.registry import apply, once_differentiable, operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture, Slot
    from lightning_privacy.clipping.layout import RowDim


@dataclasses.dataclass(slots=True)
class _Site:
    """One use of a dense layer. ``transposed``: the weight is ``[in, out]`` as in ``addmm``."""

    capture: Capture
    weight: Slot | None
    bias: Slot | None
    rows: RowDim
    transposed: bool

    def record(self, x: Tensor, grad: Tensor) -> None:
        """``x [.., in]`` and the gradient of the output ``grad [.., out]``."""
        capture = self.capture
        grad = capture.positions(grad, self.rows)
        if self.weight is not None:
            x = capture.positions(x, self.rows)
            left, right = (x, grad) if self.transposed else (grad, x)
            capture.add_outer(self.weight, left, right)
        if self.bias is not None:
            capture.add_dense(self.bias, grad.sum(1))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[out, in]``."""
        return weight.t() if self.transposed else weight


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, site: _Site
    ) -> Tensor:
        ctx.site, ctx.dtype = site, x.dtype
        x = site.capture.casts.activation(x, weight.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, site.matrix(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        site: _Site = ctx.site
        x, weight = ctx.saved_tensors
        site.record(x, grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return (grad @ site.matrix(weight)).to(ctx.dtype), None, None, None, None


@operation(F.linear)
def linear(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``x W^T + b``."""
    x, weight, bias = args if len(args) == 3 else _bind(("input", "weight", "bias"), args, kwargs)
    if bias is None and type(x) is Tensor:
        matrix = capture.product(x, weight, _computed_in(x))
        if matrix is not None:
            return torch.bmm(x, matrix)
    return _dense(capture, func, x, weight, bias, transposed=False)


@operation(torch.addmm)
def addmm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``b + x W`` with the weight as second factor."""
    if len(args) != 3 or kwargs:
        return NotImplemented
    bias, x, weight = args
    if bias.dim() != 1:
        return NotImplemented
    return _dense(capture, func, x, weight, bias, transposed=True)


def _dense(
    capture: Capture,
    func: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
) -> Any:
    weight_slot, bias_slot = capture.slot(weight), capture.slot(bias)
    slot = weight_slot or bias_slot
    if slot is None or weight.dim() != 2 or x.dim() < 2:
        return NotImplemented
    if weight_slot is None and weight.requires_grad:
        return NotImplemented
    if bias is not None and bias_slot is None and bias.requires_grad:
        return NotImplemented
    rows = capture.rows_of(slot.name, func, x)
    if rows is None or rows.dim == x.dim() - 1:
        return NotImplemented
    dtype = _computed_in(x)
    if weight_slot is not None and not rows.dim and (bias is None or bias_slot is not None):
        result = _by_copies(capture, x, weight_slot, bias_slot, rows, dtype, transposed)
        if result is not None:
            return result
    plain_weight = capture.casts.parameter(weight, dtype)
    plain_bias = None if bias is None else capture.casts.parameter(bias, dtype)
    site = _Site(capture, weight_slot, bias_slot, rows, transposed)
    return apply(_Dense, x, capture.anchor_of(weight_slot, x, rows), plain_weight, plain_bias, site)


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _by_copies(
    capture: Capture,
    x: Tensor,
    weight: Slot,
    bias: Slot | None,
    rows: RowDim,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor | None:
    """With a copy of the weight per row, where each row's gradient is to be in memory anyway."""
    by_row = capture.positions(x, rows)
    if not capture.instantiates(by_row.shape[1], *weight.parameter.shape):
        return None
    matrix = capture.copy_of(weight, dtype)
    if matrix is None:
        return None
    if by_row is x and not transposed:
        capture.note_product(x, weight, dtype)
    if transposed:
        matrix = matrix.mT
    if bias is None:
        result = torch.bmm(by_row, matrix)
    else:
        added = capture.copy_of(bias, dtype)
        if added is None:
            return None
        result = torch.baddbmm(added.unsqueeze(1), by_row, matrix)
    return result if by_row is x else result.view(*x.shape[:-1], -1)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    values = list(args)
    return values + [kwargs.get(name) for name in names[len(args) :]]
