"""Kernels of our own for NVIDIA and AMD GPUs, where torch would need several passes over memory.

They compute what `products` computes with torch's operations; without Triton those are used.
Legend: ``U`` units, ``M`` positions of a unit.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LOW_PRECISION = (torch.bfloat16, torch.float16)
# How many factors the Gram kernel takes; more are put side by side first.
_MOST_LEFTS = 4
_TILE = 128


@cache
def _available() -> bool:
    return find_spec("triton") is not None


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: on a GPU, in one type whose products are fast there."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    device, dtype = kinds.pop()
    return not kinds and device.type == "cuda" and dtype in _LOW_PRECISION and _available()


def gram_products(
    layers: Sequence[tuple[Sequence[Tensor], Tensor]], hidden: float
) -> tuple[Tensor, Tensor]:
    """`products.gram_products` by tiles of the lower triangle, with no Gram matrix in memory.

    Layers of the same shapes share a launch.

    Args:
        layers: the lefts, each ``[U, M, a]``, and the right ``[U, M, b]`` of each; all of one type.
        hidden: what is added to the squared norm of a position, for each element.

    Returns:
        As `products.gram_products`, in float32, and in the order of the shapes.
    """
    from lightning_privacy.clipping import _triton

    alike: dict[tuple[tuple[int, ...], ...], list[list[Tensor]]] = {}
    for lefts, right in layers:
        own = [*lefts]
        if len(own) > _MOST_LEFTS:
            own[_MOST_LEFTS - 1 :] = [torch.cat(own[_MOST_LEFTS - 1 :], -1)]
        factors = [_rows_in_memory(tensor) for tensor in (*own, right)]
        kind = tuple((*factor.shape, *factor.stride()) for factor in factors)
        alike.setdefault(kind, []).append(factors)
    products, sizes = [], []
    for group in alike.values():
        *lefts, right = group[0]
        units, positions, width = right.shape
        side = -(-positions // _TILE)
        tiles = side * (side + 1) // 2
        product = right.new_empty(len(group), units, tiles, dtype=torch.float32)
        largest = torch.empty_like(product)
        least = hidden * sum(left.shape[2] for left in lefts), hidden * width
        _triton.launch_gram(group, product, largest, least, _TILE)
        # Summed by torch, in a fixed order: atomic additions would differ from run to run.
        products.append(product.sum(2))
        sizes.append(largest.sum(2))
    return torch.cat(products), torch.cat(sizes)


def scaled_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """``coefficients[u] * rows[u]``, in the type of ``rows`` and rounded once.

    Args:
        coefficients: ``[U]``.
        rows: ``[U, ..]``.
    """
    from lightning_privacy.clipping import _triton

    rows = rows.contiguous()
    scaled = torch.empty_like(rows)
    flat = rows.view(len(rows), -1), scaled.view(len(rows), -1)
    _triton.launch_scaled_rows(coefficients.float().contiguous(), *flat)
    return scaled


def weighted_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """`products.weighted_rows` in one pass; rows with a zero coefficient are not even read.

    Args:
        coefficients: ``[U]``.
        rows: ``[U, n]``, contiguous.

    Returns:
        ``[n]`` in float32.
    """
    from lightning_privacy.clipping import _triton

    total = rows.new_empty(rows.shape[1], dtype=torch.float32)
    _triton.launch_weighted_rows(coefficients.float().contiguous(), rows.contiguous(), total)
    return total


def _rows_in_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
