"""Noise on logits inside the attention kernel: no matrix anywhere. Needs a GPU.

`torch.nn.attention.flex_attention` calls a function on each logit; ours adds the number of the
counter. Compiled it is one kernel. Not compiled it would hold the whole matrix and be a hundred
times slower, so that is refused.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lightning_privacy.attention.counter import Seed, indices, number, query_key
from lightning_privacy.attention.dense import measure, rows_of_mask
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.attention.realisation import LayerNoise

# Shapes and variants that may be compiled in one process before torch would give up compiling.
_RECOMPILATIONS = 128


class Noise(NamedTuple):
    """What the kernel is told of the noise; tensors, so that no new value is compiled again."""

    keys: Tensor
    """``[B, H, Q]`` int32, from `query_key`."""
    std: Tensor
    start: Tensor
    """``[B]`` int32, where each example begins in its row."""


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    noise: Noise | None,
    mask: Tensor | None,
    softcap: float | None,
    options: dict[str, Any],
) -> Tensor:
    # Constant while compiling; true only where torch runs this function as it stands.
    if not torch.compiler.is_dynamo_compiling():
        raise _not_compiled()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            if mask.dtype == torch.bool:
                score = torch.where(mask[b, h, q, k], score, -float("inf"))
            else:
                score = score + mask[b, h, q, k]
        if noise is not None:
            score = score + noise.std * number(noise.keys[b, h, q], k - noise.start[b])
        return score

    plain = noise is None and mask is None and softcap is None
    output: Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=None if plain else score_mod,
        # torch's other kernel, for fewer than 128 queries, cannot be built for grouped queries.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        **options,
    )
    return output


def _query_keys(seed: Seed, start: Tensor, heads: int, length: int, first: int) -> Tensor:
    """The keys ``[B, H, Q]`` of all queries, of which the first stands at position ``first``.

    Not within the attention kernel: there the compiler would write a nested hash out again and
    again, and take hours.
    """
    return query_key(
        seed,
        indices(len(start), start.device)[:, None, None],
        indices(heads, start.device)[:, None],
        indices(length, start.device) + first - start[:, None, None],
    )


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILATIONS)
    compiled: Callable[..., Tensor] = torch.compile(function)
    return compiled


def _not_compiled() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        must="attention with noise is compiled",
        found="torch.compile left it uncompiled: too many different shapes in one process, or "
        "compilation is switched off",
        cost="a hundred times the time, and memory that grows with the square of the length",
        remedy="pad texts to a few lengths; or AttentionNoise(method='dense')",
    )


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    noise: Noise | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """`flex_attention`, compiled, whatever stance the training has towards compilation.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, H', K, d]``.
        value: ``[B, H', K, d]``.
        noise: on the logits.
        mask: ``[B, H, Q, K]``, expanded: booleans, True where allowed, or numbers to add.
        softcap: bound of the logits, before noise.
        **options: of `flex_attention`.

    Returns:
        ``[B, H, Q, d]``.

    Raises:
        UnsupportedOperationError: torch would not compile it.
    """
    # A private step keeps the user's compiled code eager; this is not the user's.
    with torch.compiler.set_stance("default"):
        return _compiled(_attention)(query, key, value, noise, mask, softcap, options)


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
        mask: or a mask as in `fused`.
        first_key: ``[B]`` int32, where each example begins in its row.
        softcap: as in `fused`.

    Returns:
        ``[B, H, Q, d]``.
    """
    told = None
    if noise is not None:
        seed, fresh = noise.seed(query.device)
        start = first_key
        if start is None:
            start = torch.zeros(len(query), dtype=torch.int32, device=query.device)
        # With fewer queries than keys the queries are the last ones.
        place = *query.shape[1:3], max(0, key.shape[2] - query.shape[2])
        with torch.compiler.set_stance("default"):
            keys = _compiled(_query_keys)(seed, start, *place)
        told = Noise(keys, noise.std(query), start)
        if fresh and noise.measured is None:
            measure(noise, seed, query, key, scale, start, _part(block_mask, mask, key.shape[2]))
    grouped = query.shape[1] != key.shape[1]
    return fused(
        query, key, value, told, mask, softcap,
        scale=scale, block_mask=block_mask, enable_gqa=grouped,
    )  # fmt: skip


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
