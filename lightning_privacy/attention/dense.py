"""Noise on logits as a matrix that is added to the mask: for the CPU, and where a mask is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_privacy.attention.counter import Seed, noise_matrix
from lightning_privacy.attention.realisation import LayerNoise, sampled

if TYPE_CHECKING:
    from collections.abc import Callable


def first_key(mask: Tensor | None, rows: int) -> Tensor | None:
    """Where each example begins, by its mask: the first key that any query may attend to.

    Args:
        mask: ``[B, ., Q, K]``: booleans, True where attention is allowed, or numbers to be added.
        rows: of the batch.

    Returns:
        ``[B]`` int32; None where the mask is the same for all rows.
    """
    if mask is None or mask.dim() != 4 or mask.shape[0] != rows:
        return None
    return allowed(mask).any(-2).any(1).to(torch.uint8).argmax(-1).to(torch.int32)


def allowed(mask: Tensor) -> Tensor:
    """The mask as booleans; numbers forbid below half of the lowest finite one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask ``[1, 1, Q, K]`` of attention to what came before, aligned at the first position."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril()


def logits_bias(
    noise: LayerNoise, query: Tensor, key: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The mask with noise in it, ``[B, H, Q, K]`` in the type of the query.

    Args:
        noise: of the layer.
        query: ``[B, H, Q, d]``.
        key: ``[B, H', K, d]``, where H' divides H.
        mask: broadcastable to ``[B, H, Q, K]``; booleans, True where allowed, or numbers to add.
        scale: of the logits.

    Returns:
        What to add to the logits.
    """
    seed, fresh = noise.seed(query.device)
    begin = first_key(mask, len(query))
    shape = (*query.shape[:3], key.shape[2])
    bias = noise_matrix(seed, shape, begin, dtype=query.dtype).mul_(noise.injection.std)
    if fresh and noise.measured is None:
        measure(noise, seed, query, key, scale, begin, rows_of_mask(mask))
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        # Not minus infinity: a query of padding alone would be the mean of nothing.
        return bias.masked_fill_(~mask, torch.finfo(bias.dtype).min)
    return bias.add_(mask)


@torch.no_grad()
def measure(
    noise: LayerNoise,
    seed: Seed,
    query: Tensor,
    key: Tensor,
    scale: float,
    begin: Tensor | None = None,
    part: Callable[[Tensor, Tensor], Tensor | None] = lambda _rows, _queries: None,
) -> None:
    """Measure the perturbation on a few rows and queries, without the matrix of them all.

    Args:
        noise: of the layer; gets the result.
        seed: of the matrix.
        query: ``[B, H, Q, d]``.
        key: ``[B, H', K, d]``.
        scale: of the logits.
        begin: ``[B]``, where each example begins.
        part: gives the mask of some rows ``[b, 1, 1]`` and queries ``[q, 1]``, ``[b, ., q, K]``.
    """
    rows, length, keys = min(8, len(query)), query.shape[2], key.shape[2]
    chosen = sampled(length, query.device)
    some = query[:rows, :, chosen].unflatten(1, (key.shape[1], -1))
    logits = (some @ key[:rows].unsqueeze(2).mT).flatten(1, 2).float() * scale
    mask = part(torch.arange(rows, device=query.device)[:, None, None], chosen[:, None])
    if mask is not None:
        logits = (
            torch.where(mask, logits, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    drawn = some_noise(seed, (rows, query.shape[1], length, keys), begin, chosen)
    noise.measure(logits, drawn * noise.injection.std)


def some_noise(
    seed: Seed, shape: tuple[int, int, int, int], begin: Tensor | None, chosen: Tensor
) -> Tensor:
    """The numbers of the first rows and of some queries."""
    positions = (chosen + max(0, shape[3] - shape[2])).to(torch.int32)
    return noise_matrix(seed, shape, None if begin is None else begin[: shape[0]], positions)


def rows_of_mask(mask: Tensor | None) -> Callable[[Tensor, Tensor], Tensor | None]:
    """What `measure` asks a mask held in memory."""
    return lambda rows, queries: None if mask is None else mask[: len(rows), :, queries[:, 0]]
