"""Three forms in which an operation knows the gradient of each unit, and their algebra.

Legend: ``U`` units, ``M`` positions of a unit, ``*shape`` the parameter's shape. Norms come without
per-unit gradients in memory where the form allows it: for an outer-product sum,
``|l^T r|^2 = sum((l l^T) * (r r^T))``
(the "ghost norm", Li et al. 2022, arXiv 2110.05679, section 4).
The forms of one parameter that is used several times are combined by their inner products, so that
tied weights are exact.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Size, Tensor

# Below twice this many positions a blocked, symmetric Gram costs more in launches than it saves.
_BLOCK = 64

# A Gram norm is a difference of large terms where positions cancel: its error is a multiple of
# (sum_m |left_m| |right_m|)^2, and so is the rounding of the weighted sum. This share of it is
# added to the squared norm, so that rounding can never hide a gradient from the clip.
_MARGIN = {
    torch.float64: 1e-15,
    torch.float32: 2.5e-7,
    torch.bfloat16: 2.0**-17,
    torch.float16: 2.0**-20,
}


@contextmanager
def full_precision() -> Iterator[None]:
    """Context in which products and convolutions of float32 are float32.

    With `torch.set_float32_matmul_precision`, "high" or "medium", their factors are rounded to 11
    or 8 bits: a norm by Gram products could then be far below the norm of what is added.
    """
    found: Any = torch.backends
    cudnn = (found.cudnn.conv, found.cudnn.rnn)
    backends = (found.cuda.matmul, found.mkldnn.matmul, *cudnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are kept in float32 or better, whatever the gradients' type."""
    return torch.promote_types(dtype, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """Per-unit gradients in memory: ``gradients [U, *shape]``."""

    gradients: Tensor

    def squared_norm(self) -> Tensor:
        """``[U]``, in float32 or better."""
        flat = self.gradients.reshape(len(self.gradients), -1)
        norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=accumulation_dtype(flat.dtype))
        return norm.square()

    def dense(self, shape: Size) -> Tensor:
        """``[U, *shape]``."""
        return self.gradients.view(-1, *shape)

    def weighted_sum(self, coefficients: Tensor, shape: Size) -> Tensor:
        """``sum_u coefficients[u] * gradient_u``, ``[*shape]``."""
        flat = self.gradients.reshape(len(self.gradients), -1)
        return _sum_of_products(coefficients[:, None], flat).view(shape)

    def without(self, excluded: Tensor) -> Dense:
        """The same with exact zeros for the units in ``excluded [U]``, where NaN was too."""
        return Dense(_zero_rows(self.gradients, excluded))


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
    """Sums of outer products: gradient of unit u is ``left[u]^T right[u]``.

    ``left [U, M, a]``, ``right [U, M, b]``; ``a * b`` is the number of the parameter's elements.
    """

    left: Tensor
    right: Tensor

    def squared_norm(self) -> Tensor:
        """``[U]``, in float32 or better, never below the norm of what `weighted_sum` adds."""
        left, right = self.left, self.right
        if left.shape[1] == 1:
            return _norms(left).square().sum(1) * _norms(right).square().sum(1)
        largest = (_norms(left) * _norms(right)).sum(1).square()
        return _gram_product(left, right).clamp_min(0) + _MARGIN[left.dtype] * largest

    def dense(self, shape: Size) -> Tensor:
        """``[U, *shape]``."""
        return torch.bmm(self.left.mT, self.right).view(-1, *shape)

    def weighted_sum(self, coefficients: Tensor, shape: Size) -> Tensor:
        """``sum_u coefficients[u] * gradient_u``, ``[*shape]``."""
        left, right = self.left, self.right
        scale = coefficients.to(accumulation_dtype(left.dtype))[:, None, None]
        if left.numel() <= right.numel():
            left = _scaled(left, scale)
        else:
            right = _scaled(right, scale)
        return _sum_of_products(left.flatten(0, 1), right.flatten(0, 1)).view(shape)

    def without(self, excluded: Tensor) -> Outer:
        """The same with exact zeros for the units in ``excluded [U]``."""
        return Outer(_zero_rows(self.left, excluded), _zero_rows(self.right, excluded))

    @classmethod
    def joined(cls, items: Sequence[Outer]) -> Outer:
        """The sum of all: positions side by side."""
        left = torch.cat([item.left for item in items], 1)
        return cls(left, torch.cat([item.right for item in items], 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of a table: gradient of unit u has ``values[u, m]`` added to row ``index[u, m]``.

    ``index [U, M]`` integers, ``values [U, M, d]``.
    """

    index: Tensor
    values: Tensor

    def squared_norm(self) -> Tensor:
        """``[U]``, in float32 or better: positions that share a row are summed before squaring."""
        same = self.index[:, :, None] == self.index[:, None, :]
        every = slice(None)
        total = torch.where(same, _block(self.values, every, every), 0).sum((1, 2)).clamp_min(0)
        return total + _MARGIN[self.values.dtype] * _norms(self.values).sum(1).square()

    def dense(self, shape: Size) -> Tensor:
        """``[U, *shape]``."""
        units = self.index.shape[0]
        table = self.values.new_zeros(units * shape[0], math.prod(shape[1:]))
        offsets = torch.arange(units, device=self.index.device)[:, None] * shape[0]
        table.index_add_(0, (self.index + offsets).flatten(), self.values.flatten(0, 1))
        return table.view(units, *shape)

    def weighted_sum(self, coefficients: Tensor, shape: Size) -> Tensor:
        """``sum_u coefficients[u] * gradient_u``, ``[*shape]``, summed in float32 or better."""
        dtype = accumulation_dtype(self.values.dtype)
        scaled = self.values.to(dtype) * coefficients.to(dtype)[:, None, None]
        total = scaled.new_zeros(shape[0], scaled.shape[-1])
        total.index_add_(0, self.index.flatten(), scaled.flatten(0, 1))
        return total.view(shape)

    def without(self, excluded: Tensor) -> Lookup:
        """The same with exact zeros for the units in ``excluded [U]``."""
        return Lookup(self.index, _zero_rows(self.values, excluded))

    @classmethod
    def joined(cls, items: Sequence[Lookup]) -> Lookup:
        """The sum of all: positions side by side."""
        index = torch.cat([item.index for item in items], 1)
        return cls(index, torch.cat([item.values for item in items], 1))


Contribution = Dense | Outer | Lookup


def combine(contributions: list[Contribution], shape: Size) -> list[Contribution]:
    """Join what can be joined: afterwards at most one `Outer` and one `Lookup`, or one `Dense`."""
    if len(contributions) == 1:
        return contributions
    outers = [item for item in contributions if isinstance(item, Outer)]
    lookups = [item for item in contributions if isinstance(item, Lookup)]
    rest: list[Contribution] = []
    if outers:
        rest.append(Outer.joined(outers))
    if lookups:
        rest.append(Lookup.joined(lookups))
    dense = [item.dense(shape) for item in contributions if isinstance(item, Dense)]
    if not dense:
        return rest
    total = dense[0]
    for part in (*dense[1:], *(item.dense(shape) for item in rest)):
        total = total + part.to(total.dtype)
    return [Dense(total)]


def instantiated(contributions: list[Contribution], shape: Size) -> Tensor:
    """``[U, *shape]``: the sum of the contributions to one parameter, in memory."""
    total = contributions[0].dense(shape)
    for item in contributions[1:]:
        total = total + item.dense(shape)
    return total


def squared_norm(contributions: list[Contribution]) -> Tensor:
    """``[U]``: squared norm of the sum of the (combined) contributions to one parameter."""
    total = sum(
        (item.squared_norm() for item in contributions[1:]), contributions[0].squared_norm()
    )
    if len(contributions) == 2:
        outer, lookup = contributions
        if not (isinstance(outer, Outer) and isinstance(lookup, Lookup)):
            raise AssertionError("combine() leaves an outer-product sum and a lookup at most")
        total = (total + 2 * _cross(outer, lookup)).clamp_min(0)
    return total


def _cross(outer: Outer, lookup: Lookup) -> Tensor:
    """Inner product of both gradients, ``[U]``: a tied table used as input and as output layer."""
    units, positions = lookup.index.shape
    index = lookup.index[:, None, :].expand(units, outer.left.shape[1], positions)
    picked = outer.left.gather(2, index)
    dtype = accumulation_dtype(outer.right.dtype)
    products = torch.bmm(outer.right.to(dtype), lookup.values.to(dtype).mT)
    return _dot(products, picked.to(dtype))


def _gram_product(left: Tensor, right: Tensor) -> Tensor:
    """``sum((left left^T) * (right right^T))`` per unit; the symmetric half counts twice."""
    positions = left.shape[1]
    every = slice(None)
    if positions < 2 * _BLOCK or left.is_cuda:
        return _dot(_block(left, every, every), _block(right, every, every))
    total = left.new_zeros(left.shape[0], dtype=accumulation_dtype(left.dtype))
    for start in range(0, positions, _BLOCK):
        rows, before = slice(start, start + _BLOCK), slice(0, start)
        total += _dot(_block(left, rows, rows), _block(right, rows, rows))
        if start:
            total += 2 * _dot(_block(left, rows, before), _block(right, rows, before))
    return total


def _block(tensor: Tensor, rows: slice, columns: slice) -> Tensor:
    """``tensor[rows] tensor[columns]^T`` per unit, in float32 or better."""
    dtype = accumulation_dtype(tensor.dtype)
    if tensor.dtype != dtype and tensor.is_cuda:
        return torch.bmm(tensor[:, rows], tensor[:, columns].mT, out_dtype=dtype)
    tensor = tensor.to(dtype)
    return torch.bmm(tensor[:, rows], tensor[:, columns].mT)


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """In float32 or better; on a GPU in the tensor's own type, in which its products are fast."""
    return tensor * (scale.to(tensor.dtype) if tensor.is_cuda else scale)


def _sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """``first^T second``, summed and returned in float32 or better.

    A sum rounded to bfloat16 would be off by 0.4 % of all units' gradients together, which is far
    more than 0.4 % of one unit's.
    """
    dtype = accumulation_dtype(second.dtype)
    if second.is_cuda and second.dtype != dtype:
        return torch.mm(first.to(second.dtype).t(), second, out_dtype=dtype)
    return torch.mm(first.to(dtype).t(), second.to(dtype))


def _dot(first: Tensor, second: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return products


def _norms(tensor: Tensor) -> Tensor:
    """``[U, M]`` norms over the last dimension, in float32 or better."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=2, dtype=accumulation_dtype(tensor.dtype))
    return norms


def _zero_rows(tensor: Tensor, excluded: Tensor) -> Tensor:
    # Selection, not multiplication: zero times NaN is NaN.
    return tensor.masked_fill(excluded.view(-1, *[1] * (tensor.dim() - 1)), 0)
