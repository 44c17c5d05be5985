"""The Triton programs behind `kernels`. Imported only where there is a GPU to run them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@triton.jit
def _gram_tile(total, base, rows, columns, positions, width, stride, STEP: tl.constexpr):
    """``total + factor[rows] factor[columns]^T`` for one unit's ``factor [positions, width]``."""
    for start in range(0, width, STEP):
        inner = start + tl.arange(0, STEP)
        inside = (inner < width)[None, :]
        first = tl.load(
            base + rows[:, None] * stride + inner[None, :],
            mask=(rows < positions)[:, None] & inside,
            other=0.0,
        )
        second = tl.load(
            base + columns[:, None] * stride + inner[None, :],
            mask=(columns < positions)[:, None] & inside,
            other=0.0,
        )
        total = tl.dot(first, tl.trans(second), total)
    return total


@triton.jit
def _factor(memory, place, step, ALIGNED: tl.constexpr):
    """Where one unit's part of a factor begins: ``[place] + step`` elements behind ``memory``."""
    return memory + tl.multiple_of(tl.load(place), ALIGNED) + step


@triton.jit
def _triangle(tile):
    """Row and column of a tile of the lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The root is rounded: at a corner it may name the row before or after.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _gram_product(
    memory, places, product, largest,
    width0, width1, width2, width3, width,
    unit0, unit1, unit2, unit3, unit_right,
    stride0, stride1, stride2, stride3, stride_right,
    positions, tiles, units,
    least_left, least_right,
    LEFTS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of the lower triangle of one unit's two Gram matrices, multiplied and summed.

    Each layer has five ``places``: how many elements its factors lie behind ``memory``. Many layers
    in one launch fill a GPU on which one would leave half of the processors waiting.
    """
    tile = tl.program_id(0)
    unit, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, column = _triangle(tile)
    rows, columns = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    places += 5 * layer
    own, other = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE, TILE), tl.float32)
    base = _factor(memory, places, unit * unit0, ALIGNED)
    own = _gram_tile(own, base, rows, columns, positions, width0, stride0, STEP)
    if LEFTS > 1:
        base = _factor(memory, places + 1, unit * unit1, ALIGNED)
        own = _gram_tile(own, base, rows, columns, positions, width1, stride1, STEP)
    if LEFTS > 2:
        base = _factor(memory, places + 2, unit * unit2, ALIGNED)
        own = _gram_tile(own, base, rows, columns, positions, width2, stride2, STEP)
    if LEFTS > 3:
        base = _factor(memory, places + 3, unit * unit3, ALIGNED)
        own = _gram_tile(own, base, rows, columns, positions, width3, stride3, STEP)
    base = _factor(memory, places + 4, unit * unit_right, ALIGNED)
    other = _gram_tile(other, base, rows, columns, positions, width, stride_right, STEP)
    same = rows[:, None] == columns[None, :]
    left_squares = tl.maximum(tl.sum(tl.where(same, own, 0.0), 1), 0.0) + least_left
    right_squares = tl.maximum(tl.sum(tl.where(same, other, 0.0), 1), 0.0) + least_right
    sizes = tl.where(row == column, tl.sqrt(left_squares * right_squares), 0.0)
    # What lies below the diagonal counts for what lies above, too.
    total = tl.sum(tl.sum(own * other, 1), 0) * tl.where(row == column, 1.0, 2.0)
    place = (layer * units + unit) * tiles + tile
    tl.store(product + place, total)
    tl.store(largest + place, tl.sum(sizes, 0))


@triton.jit
def _scaled_rows(coefficients, rows, scaled, size, BLOCK: tl.constexpr):
    """A block of ``coefficients[u] * rows[u]``."""
    unit = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(rows + unit * size + places, mask=places < size, other=0.0)
    found = own.to(tl.float32) * tl.load(coefficients + unit)
    tl.store(scaled + unit * size + places, found.to(own.dtype), mask=places < size)


@triton.jit
def _weighted_rows(coefficients, rows, total, units, size, BLOCK: tl.constexpr):
    """A block of ``sum_u coefficients[u] * rows[u]``."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for unit in range(units):
        coefficient = tl.load(coefficients + unit)
        if coefficient != 0:
            own = tl.load(rows + unit * size + places, mask=inside, other=0.0)
            found += coefficient * own.to(tl.float32)
    tl.store(total + places, found, mask=inside)


def launch_gram(
    layers: Sequence[Sequence[Tensor]],
    product: Tensor,
    largest: Tensor,
    least: tuple[float, float],
    tile: int,
) -> None:
    """Run `_gram_product` for all layers, units and tiles.

    Args:
        layers: the factors of each, the last of them the right one; all of the same shapes and
            strides.
        product: ``[L, U, tiles]``.
        largest: the same.
        least: as in `kernels.gram_products`.
        tile: positions along a side of a tile.
    """
    filled = [[*factors[:-1], *[factors[-1]] * (6 - len(factors))] for factors in layers]
    like = filled[0]
    memory, size = like[-1], like[-1].element_size()
    behind = [[(f.data_ptr() - memory.data_ptr()) // size for f in factors] for factors in filled]
    steps = [stride for factor in like for stride in factor.stride()[:2]]
    places = torch.tensor(behind).pin_memory().to(memory.device, non_blocking=True)
    arguments: list[Any] = [memory, places, product, largest]
    arguments += [factor.shape[2] for factor in like]
    arguments += [factor.stride(0) for factor in like]
    arguments += [factor.stride(1) for factor in like]
    units, tiles = product.shape[1:]
    with torch.cuda.device(product.device):
        # Three stages of both operands fit the shared memory of data-centre GPUs only.
        stages = 3 if torch.cuda.get_device_capability(product.device)[0] in (8, 9, 10) else 2
        _gram_product[(tiles, units, len(layers))](
            *arguments,
            memory.shape[1],
            tiles,
            units,
            *least,
            LEFTS=len(layers[0]) - 1,
            TILE=tile,
            STEP=64,
            ALIGNED=1 if any(n % 8 for n in (*steps, *itertools.chain(*behind))) else 8,
            num_warps=8,
            num_stages=stages,
        )


def launch_scaled_rows(coefficients: Tensor, rows: Tensor, scaled: Tensor) -> None:
    """Run `_scaled_rows` over all rows."""
    units, size = rows.shape
    block = 4096
    with torch.cuda.device(rows.device):
        _scaled_rows[(triton.cdiv(size, block), units)](
            coefficients, rows, scaled, size, BLOCK=block
        )


def launch_weighted_rows(coefficients: Tensor, rows: Tensor, total: Tensor) -> None:
    """Run `_weighted_rows` over all columns."""
    units, size = rows.shape
    block = 1024
    with torch.cuda.device(total.device):
        _weighted_rows[(triton.cdiv(size, block),)](
            coefficients, rows, total, units, size, BLOCK=block
        )
