"""Noise on the attention weights: ``(A + std E) V = A V + std E V``, without the matrix E.

E is made a few queries at a time and made again in the backward, so that memory grows with the
length of a text and not with its square; whatever computes ``A V`` stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_privacy.attention.counter import Seed, indices, noise_matrix
from lightning_privacy.attention.dense import allowed, first_key, some_noise
from lightning_privacy.attention.realisation import LayerNoise, sampled

# Elements of E at once.
_CHUNK = 2**24


def weights_noise(noise: LayerNoise, value: Tensor, heads: int, mask: Tensor, std: float) -> Tensor:
    """``std E V``, to be added to what attention gave.

    Args:
        noise: of the layer.
        value: ``[B, H', K, d]``, where H' divides the number of heads.
        heads: of the queries.
        mask: ``[B or 1, H or 1, Q, K]``; E is zero where it forbids attention.
        std: standard deviation.

    Returns:
        ``[B, H, Q, d]`` in the type of ``value``.
    """
    seed, fresh = noise.seed(value.device)
    mask = allowed(mask)
    begin = first_key(mask, len(value))
    if fresh and noise.measured is None:
        _measure(noise, seed, value, heads, mask, begin, std)
    result: Tensor = _Product.apply(value, heads, mask, begin, seed, std)  # type: ignore[no-untyped-call]
    return result


def _chunks(value: Tensor, heads: int, mask: Tensor, begin: Tensor | None, seed: Seed) -> Any:
    rows, _, keys, _ = value.shape
    length = mask.shape[2]
    at_once = max(1, _CHUNK // max(1, rows * heads * keys))
    for start in range(0, length, at_once):
        part = mask[:, :, start : start + at_once]
        queries = indices(part.shape[2], value.device, start + max(0, keys - length))
        matrix = noise_matrix(seed, (rows, heads, length, keys), begin, queries, value.dtype)
        yield slice(start, start + at_once), matrix.masked_fill_(~part, 0.0)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        heads: int,
        mask: Tensor,
        begin: Tensor | None,
        seed: Seed,
        std: float,
    ) -> Tensor:
        ctx.save_for_backward(value, mask, begin, *seed)
        ctx.heads, ctx.std = heads, std
        rows, groups, _, width = value.shape
        result = value.new_empty(rows, heads, mask.shape[2], width)
        for part, matrix in _chunks(value, heads, mask, begin, seed):
            product = matrix.unflatten(1, (groups, -1)) @ value.unsqueeze(2)
            result[:, :, part] = product.flatten(1, 2).mul_(std)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, mask, begin, low, high = ctx.saved_tensors
        groups = value.shape[1]
        total = torch.zeros_like(value, dtype=torch.float32)
        for part, matrix in _chunks(value, ctx.heads, mask, begin, Seed(low, high)):
            own = gradient[:, :, part].unflatten(1, (groups, -1))
            total += (matrix.unflatten(1, (groups, -1)).mT @ own).sum(2)
        return total.mul_(ctx.std).to(value.dtype), None, None, None, None, None


@torch.no_grad()
def _measure(
    noise: LayerNoise,
    seed: Seed,
    value: Tensor,
    heads: int,
    mask: Tensor,
    begin: Tensor | None,
    std: float,
) -> None:
    rows, chosen = min(8, len(value)), sampled(mask.shape[2], value.device)
    drawn = some_noise(seed, (rows, heads, mask.shape[2], value.shape[2]), begin, chosen)
    noise.measured = (drawn * mask[:rows, :, chosen] * std).abs().sum(-1).mean() / 2
