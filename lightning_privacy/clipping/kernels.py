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
    """Whether the kernels can take these: on a GPU, in a type whose products are fast there."""
    return (
        tensors[0].is_cuda
        and all(tensor.dtype in _LOW_PRECISION for tensor in tensors)
        and _available()
    )


def gram_product(
    lefts: Sequence[Tensor], right: Tensor, least: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """`products.gram_product` by tiles of the lower triangle, with no Gram matrix in memory.

    Args:
        lefts: each ``[U, M, a]``.
        right: ``[U, M, b]``.
        least: what is added to the squared norm of a position of all lefts, and of the right.

    Returns:
        As `products.gram_product`, in float32.
    """
    from lightning_privacy.clipping import _triton

    if len(lefts) > _MOST_LEFTS:
        lefts = [*lefts[: _MOST_LEFTS - 1], torch.cat([*lefts[_MOST_LEFTS - 1 :]], -1)]
    factors = [_rows_in_memory(tensor) for tensor in (*lefts, right)]
    units, positions, _ = right.shape
    side = -(-positions // _TILE)
    tiles = side * (side + 1) // 2
    product = right.new_empty(units, tiles, dtype=torch.float32)
    largest = torch.empty_like(product)
    _triton.launch_gram(factors, product, largest, positions, least, _TILE)
    # Summed by torch, in a fixed order: atomic additions would differ from run to run.
    return product.sum(1), largest.sum(1)


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
