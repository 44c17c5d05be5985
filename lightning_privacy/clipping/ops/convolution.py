"""Convolutions of one, two and three dimensions, with stride, padding, dilation and groups."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_privacy.clipping import generic
from lightning_privacy.clipping.registry import operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture, Slot
    from lightning_privacy.clipping.layout import RowDim

_DEFAULTS = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}
# On the CPU: windows of one row, in numbers, that no longer fit into a core's cache.
_WINDOWS = 2**17


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    capture: Capture
    weight: Slot | None
    bias: Slot | None
    plain_weight: Tensor
    plain_bias: Tensor | None
    rows: RowDim
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def run(self, x: Tensor) -> Tensor:
        nothing = [0] * len(self.stride)
        return torch.convolution(
            x,
            self.plain_weight,
            self.plain_bias,
            self.stride,
            self.padding,
            self.dilation,
            False,
            nothing,
            self.groups,
        )

    def gradients(self, x: Tensor, grad: Tensor, wanted: list[bool]) -> list[Tensor]:
        """Gradients of input, weight and bias as torch has them: summed over the images."""
        nothing = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            grad,
            x,
            self.plain_weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            nothing,
            self.groups,
            wanted,
        )

    def record(self, x: Tensor, grad: Tensor) -> None:
        """``x [N, C, *size]`` and the gradient of the output ``grad [N, O, *out]``."""
        capture = self.capture
        by_row = capture.by_row(grad, self.rows)  # [B, images, O, *out]
        if self.bias is not None:
            capture.add_dense(self.bias, by_row.flatten(3).sum((1, 3)))
        if self.weight is None:
            return
        if self._large_windows(x, grad):
            capture.add_dense(self.weight, self.one_by_one(x, grad))
            return
        patches = self.patches(x, grad.shape[2:])  # [N, G, C/G * kernel, L]
        left = grad.unflatten(1, (self.groups, -1)).flatten(3)  # [N, G, O/G, L]
        left, right = (capture.by_row(tensor.mT, self.rows) for tensor in (left, patches))
        left, right = (tensor.transpose(1, 2).flatten(2, 3) for tensor in (left, right))
        if self.groups == 1:
            capture.add_outer(self.weight, left[:, 0], right[:, 0])
        else:
            capture.add_dense(self.weight, torch.matmul(left.mT, right))

    def _large_windows(self, x: Tensor, grad: Tensor) -> bool:
        """Whether a copy of the windows costs more than a call for each row."""
        outputs, *weight = self.plain_weight.shape  # [O, C/G, *kernel]
        positions, window = math.prod(grad.shape[2:]), math.prod(weight)
        large = window * positions * self.groups * len(x) >= _WINDOWS * self.capture.rows
        if x.device.type != "cpu" or not large or math.prod(weight[1:]) == 1:
            return False
        return self.groups > 1 or self.capture.instantiates(positions, outputs, window)

    def one_by_one(self, x: Tensor, grad: Tensor) -> Tensor:
        """``[B, O, C/G, *kernel]``: of each row the gradient of the weight that torch computes."""
        rows = zip(x.chunk(self.capture.rows), grad.chunk(self.capture.rows), strict=True)
        wanted = [False, True, False]
        return torch.stack([self.gradients(*row, wanted)[1] for row in rows])

    def patches(self, x: Tensor, out: torch.Size) -> Tensor:
        """The window under each output position, ``[N, groups, C/groups * kernel, positions]``.

        On the CPU positions lie side by side in memory, as in ``x``: that is the faster copy.
        """
        kernel = self.plain_weight.shape[2:]
        pads = [pad for size in reversed(self.padding) for pad in (size, size)]
        x = F.pad(x, pads).unflatten(1, (self.groups, -1))  # [N, G, C/G, *size]
        strides = x.stride()
        spatial = strides[3:]
        view = x.as_strided(
            (*x.shape[:3], *kernel, *out),
            (
                *strides[:3],
                *(s * step for s, step in zip(spatial, self.dilation, strict=True)),
                *(s * step for s, step in zip(spatial, self.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        if not x.is_cuda:
            return view.flatten(3 + len(kernel)).flatten(2, -2)
        last = view.dim() - len(out)
        by_position = view.movedim(list(range(last, view.dim())), list(range(2, 2 + len(out))))
        return by_position.flatten(2 + len(out)).flatten(2, -2).mT


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, site: _Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x)
        return site.run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.site.record(x, grad)
        wanted = [True, False, False]
        gradient = ctx.site.gradients(x, grad, wanted)[0] if ctx.needs_input_grad[0] else None
        return gradient, None, None


@operation(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Each window is a position of a dense layer: the weight's gradient is a sum over windows."""
    values: list[Any] = [
        args[i] if i < len(args) else kwargs.get(name, default)
        for i, (name, default) in enumerate(_DEFAULTS.items())
    ]
    x, weight, bias, stride, padding, dilation, groups = values
    weight_slot, bias_slot = capture.slot(weight), capture.slot(bias)
    slot = weight_slot or bias_slot
    if x.dim() != weight.dim():
        return NotImplemented
    x = _plainly_strided(x)
    for tensor, known in ((weight, weight_slot), (bias, bias_slot)):
        if tensor is not None and known is None and tensor.requires_grad:
            return generic.apply(capture, func, (x, *values[1:]), {})
    if slot is None:
        return NotImplemented
    rows = capture.rows_of(slot.name, func, x)
    if rows is None or rows.dim:
        return NotImplemented
    stride, dilation = (_each(value, weight.dim() - 2) for value in (stride, dilation))
    x, padding = _padded(x, weight.shape[2:], padding, dilation)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    plain_bias = None if bias is None else capture.casts.parameter(bias, x.dtype)
    plain_weight = capture.casts.parameter(weight, x.dtype)
    site = _Site(
        capture,
        weight_slot,
        bias_slot,
        plain_weight,
        plain_bias,
        rows,
        stride,
        padding,
        dilation,
        groups,
    )
    return _Convolution.apply(x, capture.anchor(x.device), site)  # type: ignore[no-untyped-call]


def _plainly_strided(x: Tensor) -> Tensor:
    """Without strides that only a dimension of size one has: torch takes them for channels last.

    Its grouped convolution of float64 then refuses to compute the gradient of the weight.
    """
    if x.is_cuda or x.dtype != torch.float64 or 1 not in x.shape:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _padded(
    x: Tensor, kernel: torch.Size, padding: Any, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Named paddings as numbers; ``"same"`` may be uneven and then pads the input itself."""
    spatial = len(kernel)
    if padding == "valid":
        return x, [0] * spatial
    if padding != "same":
        return x, _each(padding, spatial)
    total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    pads = [pad for size in reversed(total) for pad in (size // 2, size - size // 2)]
    return F.pad(x, pads), [0] * spatial


def _each(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values
