"""Noise on logits inside the attention kernel: no matrix anywhere. Needs a GPU.

`torch.nn.attention.flex_attention` calls a function on each logit; ours adds the number of the
counter. Compiled it is one kernel. Not compiled it would hold the whole matrix and be a hundred
times slower, so that is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.attention.counter import Seed, standard_normal
from lightning_privacy.attention.dense import measure, rows_of_mask
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.attention.realisation import LayerNoise

# Shapes and variants that may be compiled in one process before torch would give up compiling.
_RECOMPILATIONS = 128


class _Compiled:
    """The compiled attention; one for the process."""

    function: Callable[..., Tensor] | None = None


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Constant while compiling; true only where torch runs this function as it stands.
    if not torch.compiler.is_dynamo_compiling():
        raise UnsupportedOperationError(
            must="attention with noise is compiled",
            found="torch.compile left it uncompiled: too many different shapes in one process, or "
            "compilation is switched off",
            cost="a hundred times the time, and memory that grows with the square of the length",
            remedy="pad texts to a few lengths; or AttentionNoise(method='dense')",
        )
    output: Tensor = flex_attention(query, key, value, **options)
    return output


def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flex_attention`, compiled, whatever stance the training has towards compilation.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, H', K, d]``.
        value: ``[B, H', K, d]``.
        **options: of `flex_attention`.

    Returns:
        ``[B, H, Q, d]``.

    Raises:
        UnsupportedOperationError: torch would not compile it.
    """
    if _Compiled.function is None:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _RECOMPILATIONS)
        _Compiled.function = torch.compile(_attention)
    # A private step keeps the user's compiled code eager; this is not the user's.
    with torch.compiler.set_stance("default"):
        return _Compiled.function(query, key, value, **options)


def noisy_flex(  # noqa: PLR0913 - one for each thing that a kernel is told
    noise: LayerNoise | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    block_mask: Any = None,
    mask: Tensor | None = None,
    first_key: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention with noise on its logits.

    Args:
        noise: of the layer; None for attention without.
        query: ``[B, H, Q, d]``.
        key: ``[B, H', K, d]``, where H' divides H.
        value: as ``key``.
        scale: of the logits.
        block_mask: a `BlockMask`.
        mask: or a mask ``[B, H, Q, K]``, expanded: booleans, True where allowed, or numbers to add.
        first_key: ``[B]`` int32, where each example begins in its row.
        softcap: bound of the logits, before noise.

    Returns:
        ``[B, H, Q, d]``.
    """
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"scale": scale, "block_mask": block_mask, "enable_gqa": grouped}
    if noise is None and mask is None and softcap is None:
        return fused(query, key, value, **options)
    seed, start, std = _scalars(noise, query, first_key)
    # With fewer queries than keys the queries are the last ones.
    offset = max(0, key.shape[2] - query.shape[2])
    if noise is not None and noise.measured is None:
        measure(noise, seed, query, key, scale, start, _part(block_mask, mask, key.shape[2]))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            if mask.dtype == torch.bool:
                score = torch.where(mask[b, h, q, k], score, -float("inf"))
            else:
                score = score + mask[b, h, q, k]
        if noise is None:
            return score
        begin = start[b]
        return score + std * standard_normal(seed, b, h, q + offset - begin, k - begin)

    return fused(query, key, value, score_mod=score_mod, **options)


def _scalars(
    noise: LayerNoise | None, query: Tensor, first_key: Tensor | None
) -> tuple[Seed, Tensor, Tensor]:
    start = first_key
    if start is None:
        start = torch.zeros(len(query), dtype=torch.int32, device=query.device)
    if noise is None:
        return Seed.of(0, query.device), start, torch.zeros((), device=query.device)
    return noise.seed(query.device)[0], start, noise.std(query)


def _part(
    block_mask: Any, mask: Tensor | None, keys: int
) -> Callable[[Tensor, Tensor], Tensor | None]:
    if block_mask is None:
        return rows_of_mask(mask)

    def part(rows: Tensor, queries: Tensor) -> Tensor:
        at = torch.arange(keys, device=rows.device)
        permitted: Tensor = block_mask.mask_mod(rows, torch.zeros_like(rows), queries, at)
        return permitted.broadcast_to(len(rows), len(queries), keys)[:, None]

    return part
