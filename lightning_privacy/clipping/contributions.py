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
from typing import TYPE_CHECKING

import torch

from lightning_privacy.clipping.products import (
    accumulation_dtype,
    gram,
    gram_product,
    gram_products,
    scaled_rows,
    sum_of_products,
    weighted_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Size, Tensor

# A Gram norm is a difference of large terms where positions cancel: its error is a multiple of
# (sum_m |left_m| |right_m|)^2, and so is the rounding of the weighted sum. This share of it is
# added to the squared norm, so that rounding can never hide a gradient from the clip.
_MARGIN = {
    torch.float64: 1e-15,
    torch.float32: 2.5e-7,
    torch.bfloat16: 2.0**-17,
    torch.float16: 2.0**-20,
}
# So many squares are added up one after the other: rounding stays far below what is accounted.
_RUN = 2**14


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """Per-unit gradients in memory: ``gradients [U, *shape]``."""

    gradients: Tensor

    def squared_norm(self) -> Tensor:
        """``[U]``, in float32 or better."""
        return self.norm().square()

    def norm(self) -> Tensor:
        """``[U]``, in float32 or better."""
        return _norms(self.gradients.reshape(len(self.gradients), -1))

    def dense(self, shape: Size) -> Tensor:
        """``[U, *shape]``."""
        return self.gradients.view(-1, *shape)

    def weighted_sum(self, coefficients: Tensor, shape: Size) -> Tensor:
        """``sum_u coefficients[u] * gradient_u``, ``[*shape]``."""
        flat = self.gradients.reshape(len(self.gradients), -1)
        return weighted_rows(coefficients, flat).view(shape)

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
        return outer_norm([self.left], self.right)

    def dense(self, shape: Size) -> Tensor:
        """``[U, *shape]``."""
        return torch.bmm(self.left.mT, self.right).view(-1, *shape)

    def weighted_sum(self, coefficients: Tensor, shape: Size) -> Tensor:
        """``sum_u coefficients[u] * gradient_u``, ``[*shape]``."""
        left, right = self.left, self.right
        if left.numel() <= right.numel():
            left = scaled_rows(coefficients, left)
        else:
            right = scaled_rows(coefficients, right)
        return sum_of_products(left.flatten(0, 1), right.flatten(0, 1)).view(shape)

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
        total = torch.where(same, gram(self.values), 0).sum((1, 2)).clamp_min(0)
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
Found = dict[str, list[Contribution]]


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


def types_of(found: Mapping[str, Sequence[Contribution]]) -> set[torch.dtype]:
    """The types in which contributions came."""
    factors = {Dense: "gradients", Outer: "left", Lookup: "values"}
    return {getattr(item, factors[type(item)]).dtype for items in found.values() for item in items}


def instantiated(contributions: list[Contribution], shape: Size) -> Tensor:
    """``[U, *shape]``: the sum of the contributions to one parameter, in memory."""
    total = contributions[0].dense(shape)
    for item in contributions[1:]:
        total = total + item.dense(shape)
    return total


def outer_norm(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    """``[U]``: squared norm of ``left^T right`` for all lefts side by side, never too small."""
    if right.shape[1] == 1:
        squares = sum((_squares(left) for left in lefts[1:]), _squares(lefts[0]))
        return squares * _squares(right)
    return _never_too_small(*gram_product(lefts, right), right.dtype)


def _never_too_small(product: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    return product.clamp_min(0) + _MARGIN[dtype] * largest.square()


def squared_norms(
    found: Mapping[str, list[Contribution]],
) -> Iterator[Tensor]:
    """Squared norms ``[U]`` of (combined) contributions, of several parameters where that is less.

    Dense layers that read the same input (queries, keys and values) share its Gram matrix. What is
    small is computed for all layers at once: on a GPU hundreds of launches take longer than it.

    Yields:
        Squared norms over parts of the parameters, which add up to those over all of them.
    """
    sharing: dict[tuple[object, ...], list[Outer]] = {}
    norms: dict[torch.dtype, list[Tensor]] = {}
    for items in found.values():
        first = items[0]
        if len(items) > 1 or isinstance(first, Lookup):
            yield squared_norm(items)
        elif isinstance(first, Outer):
            right = first.right
            key = right.data_ptr(), right.shape, right.stride(), right.dtype, right.device
            sharing.setdefault(key, []).append(first)
        else:
            norm = first.norm()
            norms.setdefault(norm.dtype, []).append(norm)
    for alike in norms.values():
        yield torch.stack(alike).square().sum(0)
    products: dict[torch.dtype, list[tuple[list[Tensor], Tensor]]] = {}
    for outers in sharing.values():
        lefts, right = [item.left for item in outers], outers[0].right
        if right.shape[1] == 1:
            yield outer_norm(lefts, right)
        else:
            products.setdefault(right.dtype, []).append((lefts, right))
    for dtype, layers in products.items():
        yield _never_too_small(*gram_products(layers), dtype).sum(0)


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


def _dot(first: Tensor, second: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return products


def _norms(tensor: Tensor) -> Tensor:
    """Norms over the last dimension, in float32 or better."""
    size = tensor.shape[-1]
    if size > 2 * _RUN and not tensor.is_cuda:
        # One sum from end to end would stop to grow: of 10^8 elements it can miss 4 % of the norm.
        # A GPU adds up in parallel, each thread a few hundred.
        whole = size // _RUN * _RUN
        runs, rest = _norms(tensor[..., :whole].unflatten(-1, (-1, _RUN))), tensor[..., whole:]
        return _norms(torch.cat([runs, _norms(rest)[..., None]], -1))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=accumulation_dtype(tensor.dtype))
    return norms


def _squares(tensor: Tensor) -> Tensor:
    """``[U]``, never zero: what seems so may be multiplied by a large number."""
    squares = _norms(tensor).square().sum(1)
    return squares + tensor.shape[1:].numel() * torch.finfo(squares.dtype).tiny


def _zero_rows(tensor: Tensor, excluded: Tensor) -> Tensor:
    # Selection, not multiplication: zero times NaN is NaN.
    return tensor.masked_fill(excluded.view(-1, *[1] * (tensor.dim() - 1)), 0)
