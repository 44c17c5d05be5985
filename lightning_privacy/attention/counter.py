"""Near-normal numbers that are a pure function of a counter: no state, no memory, any order.

``z = standard_normal(seed, row, head, query, key)`` is the same number whenever it is asked for: in
the forward, in a checkpoint's recomputation, in a kernel that never holds the matrix, and whatever
else is in the batch. The hash is `lowbias32` (Wellons 2018, "Prospecting for hash functions"),
applied once for row and head, once for the query, once for the key, and only the last of them
once for each element of the matrix. The number is the standardised sum of the hash's four bytes:
mean 0, variance 1, excess kurtosis -0.3, never beyond 3.45. It is made to disturb attention cheaply
and has no place in a privacy mechanism: it is neither secret nor exactly normal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Odd, so that the products are one to one; and within int32, as every number here.
_ROW, _HEAD, _QUERY, _KEY = 0x3C6EF373, 0x1B873593, -1640531535, -862048943
# A byte that is uniform has mean 127.5 and variance (256^2 - 1) / 12; here are four of them.
_MEAN, _SCALE = 510.0, 1.0 / (4 * (256**2 - 1) / 12) ** 0.5
# How many elements are worked on at once where a matrix is made.
_CHUNK = 2**20


class Seed(NamedTuple):
    """Sixty-four bits that key one matrix, as two scalar tensors int32 on its device."""

    low: Tensor
    high: Tensor

    @staticmethod
    def of(value: int, device: torch.device) -> Seed:
        """Split a number of 64 bits; a launch each on a GPU, and no transfer to wait for."""
        low, high = (((value >> shift) & 0xFFFFFFFF) - 2**31 for shift in (0, 32))
        return Seed(*(torch.full((), w, dtype=torch.int32, device=device) for w in (low, high)))


def mix(x: Tensor) -> Tensor:
    """Hash 32 bits, one to one; integer operations alone, so that a kernel can inline them."""
    # The shift of a signed integer brings its sign along: the masks take it away.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def query_key(seed: Seed, row: Tensor, head: Tensor, query: Tensor) -> Tensor:
    """The key of one row of an attention matrix.

    Args:
        seed: of the matrix.
        row: number of the example in its batch, int32.
        head: number of the head, int32.
        query: position of the query within the example, int32; may be negative. All broadcast.

    Returns:
        int32 of the broadcast shape.
    """
    return mix(mix(mix(seed.low + row * _ROW) ^ (seed.high + head * _HEAD)) + query * _QUERY)


def number(key_of_query: Tensor, position: Tensor) -> Tensor:
    """The number of one place in a row. Once for each element, so it is as short as it can be.

    Args:
        key_of_query: from `query_key`.
        position: of the key within the example, int32; may be negative.

    Returns:
        float32 of the broadcast shape.
    """
    x = mix(key_of_query + position * _KEY)
    # Two sums of two bytes side by side, then their sum.
    pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    total = (pairs + (pairs >> 16)) & 0xFFFF
    found: Tensor = (total.to(torch.float32) - _MEAN) * _SCALE
    return found


def standard_normal(seed: Seed, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The number of one place in the attention matrix: `number` of `query_key`."""
    return number(query_key(seed, row, head, query), key)


def indices(count: int, device: torch.device, start: int = 0) -> Tensor:
    """``start, start + 1, …`` in int32."""
    return torch.arange(start, start + count, dtype=torch.int32, device=device)


def noise_matrix(
    seed: Seed,
    shape: tuple[int, int, int, int],
    first_key: Tensor | None = None,
    queries: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers of a whole attention matrix, for where it is held in memory anyway.

    Args:
        seed: of the matrix.
        shape: ``[B, H, Q, K]``: rows, heads, queries, keys. With fewer queries than keys the
            queries are the last ones, as with a cache of keys.
        first_key: ``[B]``, where each example begins in its row; positions count from there, so
            that padding on the left changes nothing. None: at 0.
        queries: which queries are wanted, ``[Q]`` int32; None for all of them.
        dtype: of the result.

    Returns:
        ``[B, H, Q, K]``, independent standard near-normal numbers.
    """
    rows, heads, length, keys = shape
    device = seed.low.device
    if queries is None:
        queries = indices(length, device, max(0, keys - length))
    start = torch.zeros(rows, dtype=torch.int32, device=device)
    if first_key is not None:
        start = first_key.to(torch.int32)
    result = torch.empty(rows, heads, len(queries), keys, dtype=dtype, device=device)
    at_once = max(1, _CHUNK // max(1, heads * len(queries) * keys))
    for row in range(0, rows, at_once):
        chosen = slice(row, row + at_once)
        begin = start[chosen, None, None, None]
        result[chosen] = standard_normal(
            seed,
            indices(len(begin), device, row)[:, None, None, None],
            indices(heads, device)[:, None, None],
            queries[:, None] - begin,
            indices(keys, device) - begin,
        )
    return result
