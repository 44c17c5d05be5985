"""Gaussian noise added in one pass over memory, for GPUs that Triton compiles for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024


# Specialised on values, it would be compiled anew for every second key.
@triton.jit(do_not_specialize=["size", "key", "nonce_low", "nonce_high", "scale"])
def _add_noise(values, size, key, nonce_low, nonce_high, scale, BLOCK: tl.constexpr):
    """Add noise to two neighbouring blocks of ``values``, from one Philox call for two values."""
    block = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    counter = (block + lanes).to(tl.uint64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    first, second, third, _ = tl.philox(key, low, high, zero + nonce_low, zero + nonce_high)
    # Box and Muller. A small uniform number, which makes a large radius, has 64 bits: the radius
    # reaches 9.49, where 32 bits would end it at 6.76.
    unit = 2.3283064365386963e-10  # 2**-32
    uniform = (first.to(tl.float32) + (second.to(tl.float32) + 0.5) * unit) * unit
    radius = scale * tl.sqrt(-2.0 * tl.log(uniform))
    angle = 6.283185307179586 * (third.to(tl.float32) * unit)
    cosines, sines = radius * tl.cos(angle), radius * tl.sin(angle)
    places = 2 * block + lanes
    inside = places < size
    old = tl.load(values + places, mask=inside, other=0.0)
    tl.store(values + places, old + cosines, mask=inside)
    places += BLOCK
    inside = places < size
    old = tl.load(values + places, mask=inside, other=0.0)
    tl.store(values + places, old + sines, mask=inside)


def add_noise(values: Tensor, key: int, std: float) -> None:
    """Add independent normal values of standard deviation ``std`` to ``values``, in place.

    Args:
        values: Contiguous float32 on a GPU, any shape.
        key: 128 bits, which decide every value.
        std: The standard deviation.
    """
    half = 64
    seed = key & (2**half - 1)
    nonce = key >> half
    size = values.numel()
    with torch.cuda.device(values.device):
        _add_noise[(triton.cdiv(size, 2 * _BLOCK),)](
            values,
            size,
            _signed(seed, half),
            _signed(nonce & (2**32 - 1), 32),
            _signed(nonce >> 32, 32),
            std,
            BLOCK=_BLOCK,
        )


def _signed(number: int, bits: int) -> int:
    """The same bits as Triton takes them: two's complement."""
    return number - 2**bits if number >= 2 ** (bits - 1) else number
