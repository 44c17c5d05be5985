"""Normalisation layers.

Layer and group normalisation use torch's fused kernels. Their backward sums the affine parameters'
gradients over the batch, so it is asked for the input's gradient alone; the rows' own are
reductions over positions. Where that does not fit, and for the other layers: normalise
without the affine parameters, then scale and shift by row.

What is normalised may itself be an expression of parameters (a table of positions): `generic` runs
the first part, and simply calls torch where it is not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_privacy.clipping import generic
from lightning_privacy.clipping.registry import operation
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture, Slot
    from lightning_privacy.clipping.layout import RowDim


_ATEN = torch.ops.aten
_FUSED_TYPES = (torch.float32, torch.float64)

_SHAPED: dict[str, Any] = {"input": None, "normalized_shape": None, "weight": None}
_LAYER_NORM = {**_SHAPED, "bias": None, "eps": 1e-5}
_RMS_NORM = {**_SHAPED, "eps": None}
_GROUP_NORM = {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5}
_STATISTICS = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
}
_INSTANCE_NORM = {**_STATISTICS, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5}
_BATCH_NORM = {**_STATISTICS, "training": False, "momentum": 0.1, "eps": 1e-5}


@operation(F.layer_norm)
def layer_norm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Affine parameters have the shape of the last dimensions."""
    x, shape, weight, bias, eps = _bind(_LAYER_NORM, args, kwargs)
    first = x.dim() - len(shape)
    site = _site(capture, func, x, (weight, bias), eps, first_normalized=first)
    if site is not None:
        return _FusedLayerNorm.apply(x, capture.anchor(x.device), list(shape), site)  # type: ignore[no-untyped-call]
    normal = generic.apply(capture, func, (x, shape, None, None, eps), {})
    return _affine(capture, normal, weight, bias)


@operation(F.rms_norm)
def rms_norm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """As layer normalisation, without a bias."""
    x, shape, weight, eps = _bind(_RMS_NORM, args, kwargs)
    normal = generic.apply(capture, func, (x, shape, None, eps), {})
    return _affine(capture, normal, weight, None)


@operation(F.group_norm)
def group_norm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Affine parameters lie along dimension 1."""
    x, groups, weight, bias, eps = _bind(_GROUP_NORM, args, kwargs)
    site = _site(capture, func, x, (weight, bias), eps, first_normalized=1)
    if site is not None:
        return _FusedGroupNorm.apply(x, capture.anchor(x.device), groups, site)  # type: ignore[no-untyped-call]
    normal = generic.apply(capture, func, (x, groups, None, None, eps), {})
    return _by_channel(capture, normal, weight, bias)


@operation(F.instance_norm)
def instance_norm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Statistics of each example alone; running statistics are left to `generic`, which refuses."""
    x, mean, variance, weight, bias, own, _, eps = _bind(_INSTANCE_NORM, args, kwargs)
    if mean is not None or variance is not None or not own:
        return NotImplemented
    normal = generic.apply(capture, func, (x,), {"eps": eps})
    return _by_channel(capture, normal, weight, bias)


@operation(F.batch_norm)
def batch_norm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """With frozen statistics only: batch statistics couple the examples of a batch."""
    x, mean, variance, weight, bias, training, _, eps = _bind(_BATCH_NORM, args, kwargs)
    if training or mean is None or variance is None:
        slots = (capture.slot(weight), capture.slot(bias))
        names = ", ".join(slot.name for slot in slots if slot is not None) or "parameters"
        raise UnsupportedOperationError(
            must="an example's gradient depends on that example alone",
            found=f"batch normalisation with the statistics of the batch, scaled by {names}",
            cost="adding one example changes the gradients of all others beyond clip_norm",
            remedy="replace BatchNorm by GroupNorm, or freeze it and keep it in eval mode",
        )
    frozen = (x, mean, variance, None, None)
    normal = generic.apply(capture, func, frozen, {"training": False, "eps": eps})
    return _by_channel(capture, normal, weight, bias)


def _site(
    capture: Capture,
    func: Callable[..., Any],
    x: Tensor,
    affine: tuple[Any, Any],
    eps: float,
    *,
    first_normalized: int,
) -> _Site | None:
    """What the fused kernels need, None where they do not fit."""
    slots = [capture.slot(value) for value in affine]
    named = next((slot for slot in slots if slot is not None), None)
    if named is None or x.dtype not in _FUSED_TYPES or torch.is_autocast_enabled(x.device.type):
        return None
    for value, slot in zip(affine, slots, strict=True):
        if value is not None and (value.dtype != x.dtype or (slot is None and value.requires_grad)):
            return None
    rows = capture.rows_of(named.name, func, x)
    if rows is None or rows.dim >= first_normalized:
        return None
    weight, bias = (None if value is None else value.detach() for value in affine)
    return _Site(capture, slots[0], slots[1], weight, bias, rows, eps)


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """One use of a normalisation layer; ``weight`` and ``bias`` are None where not trainable."""

    capture: Capture
    weight: Slot | None
    bias: Slot | None
    plain_weight: Tensor | None
    plain_bias: Tensor | None
    rows: RowDim
    eps: float


class _FusedLayerNorm(torch.autograd.Function):
    """``F.layer_norm`` over ``shape`` with per-row gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, shape: list[int], site: _Site) -> Tensor:
        """``x [.., *shape]``."""
        output, mean, rstd = torch.native_layer_norm(
            x, shape, site.plain_weight, site.plain_bias, site.eps
        )
        ctx.site, ctx.shape = site, shape
        ctx.save_for_backward(x, mean, rstd)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Deliver the rows' gradients and return the input's."""
        x, mean, rstd = ctx.saved_tensors
        site, shape = ctx.site, ctx.shape
        by_row = site.capture.by_row
        rows = by_row(grad, site.rows).flatten(1, -1 - len(shape))
        if site.bias is not None:
            site.capture.add_dense(site.bias, rows.sum(1))
        if site.weight is not None:
            scaled = grad * ((x - mean) * rstd)
            scaled = by_row(scaled, site.rows).flatten(1, -1 - len(shape))
            site.capture.add_dense(site.weight, scaled.sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        gradient, _, _ = _ATEN.native_layer_norm_backward(
            grad.contiguous(),
            x,
            shape,
            mean,
            rstd,
            site.plain_weight,
            site.plain_bias,
            [True, False, False],
        )
        return gradient, None, None, None


class _FusedGroupNorm(torch.autograd.Function):
    """``F.group_norm`` with per-row gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, groups: int, site: _Site) -> Tensor:
        """``x [N, C, *size]``."""
        x = x.contiguous()
        count, channels = x.shape[:2]
        size = math.prod(x.shape[2:])
        output, mean, rstd = torch.native_group_norm(
            x, site.plain_weight, site.plain_bias, count, channels, size, groups, site.eps
        )
        ctx.site, ctx.groups = site, groups
        ctx.save_for_backward(x, mean, rstd)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Deliver the rows' gradients and return the input's."""
        x, mean, rstd = ctx.saved_tensors
        site, groups = ctx.site, ctx.groups
        grad = grad.contiguous()
        count, channels = x.shape[:2]
        flat = grad.reshape(count, channels, -1)
        sums = flat.sum(2)  # [N, C]
        if site.bias is not None:
            site.capture.add_dense(site.bias, site.capture.by_row(sums, site.rows).sum(1))
        if site.weight is not None:
            products = (flat * x.reshape(count, channels, -1)).sum(2)
            centred = (
                products.view(count, groups, -1) - sums.view(count, groups, -1) * mean[..., None]
            )
            own = (centred * rstd[..., None]).view(count, channels)
            site.capture.add_dense(site.weight, site.capture.by_row(own, site.rows).sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        gradient, _, _ = _ATEN.native_group_norm_backward(
            grad,
            x,
            mean,
            rstd,
            site.plain_weight,
            count,
            channels,
            flat.shape[2],
            groups,
            [True, False, False],
        )
        return gradient, None, None, None


def _affine(capture: Capture, normal: Tensor, weight: Any, bias: Any) -> Any:
    if weight is not None:
        normal = capture.apply(torch.mul, (normal, weight), {})
    return normal if bias is None else capture.apply(torch.add, (normal, bias), {})


def _by_channel(capture: Capture, normal: Tensor, weight: Any, bias: Any) -> Any:
    shape = (-1, *[1] * (normal.dim() - 2))
    wide = [
        None if value is None else capture.apply(torch.Tensor.view, (value, shape), {})
        for value in (weight, bias)
    ]
    return _affine(capture, normal, *wide)


def _bind(defaults: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments in the order of ``defaults``, which holds the torch function's own."""
    return [
        args[i] if i < len(args) else kwargs.get(name, default)
        for i, (name, default) in enumerate(defaults.items())
    ]
