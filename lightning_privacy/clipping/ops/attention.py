"""``F.multi_head_attention_forward``: its projections by the rule for dense layers.

The function takes ``[T, B, E]`` whatever ``batch_first`` says and projects inside. Here the tagged
projections run outside, and the function runs on projected inputs with identity matrices in their
place, so that masks, dropout and averaged weights stay torch's own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_privacy.clipping import generic
from lightning_privacy.clipping.registry import operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@operation(F.multi_head_attention_forward)
def multi_head_attention(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Multi-head attention of ``query, key, value [T, B, E]`` (or ``[T, E]`` for one example)."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    if call["query"].dim() != 3 or call["static_k"] is not None or call["static_v"] is not None:
        return NotImplemented
    inputs = [call[name].transpose(0, 1) for name in ("query", "key", "value")]
    weights, biases = _projections(capture, call)
    projected = [
        capture.apply(F.linear, (x, weight, bias), {})
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    ]
    query, key, value = (tensor.transpose(0, 1) for tensor in projected)
    key, value = _with_extra_position(capture, call, key, value)
    width = query.shape[-1]
    identity = torch.eye(width, dtype=query.dtype, device=query.device)
    call.update(query=query, key=key, value=value, bias_k=None, bias_v=None)
    out_weight, out_bias = call["out_proj_weight"], call["out_proj_bias"]
    call.update(
        in_proj_weight=None,
        in_proj_bias=None,
        out_proj_weight=identity,
        out_proj_bias=None,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
    )
    output, attention = func(**call)
    output = capture.apply(F.linear, (output.transpose(0, 1), out_weight, out_bias), {})
    return output.transpose(0, 1), attention


@operation(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A trainable position bias or key: only torch's plain kernel differentiates all of them."""
    with sdpa_kernel(SDPBackend.MATH):
        return generic.apply(capture, func, args, kwargs)


def _projections(capture: Capture, call: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    if call["use_separate_proj_weight"]:
        weights = [call[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = _thirds(capture, call["in_proj_weight"])
    bias = call["in_proj_bias"]
    return weights, [None] * 3 if bias is None else _thirds(capture, bias)


def _thirds(capture: Capture, stacked: Any) -> list[Any]:
    size = stacked.shape[0] // 3
    return [capture.apply(torch.narrow, (stacked, 0, start * size, size), {}) for start in range(3)]


def _with_extra_position(
    capture: Capture, call: dict[str, Any], key: Tensor, value: Tensor
) -> tuple[Any, Any]:
    """Append ``bias_k`` and ``bias_v`` as a further position, which every query may attend to."""
    if call["bias_k"] is None:
        return key, value
    for name in ("attn_mask", "key_padding_mask"):
        if call[name] is not None:
            call[name] = F.pad(call[name], (0, 1))
    extended = []
    for tensor, extra in ((key, call["bias_k"]), (value, call["bias_v"])):
        by_row = tensor.transpose(0, 1)
        zeros = torch.zeros_like(by_row[:, :1])
        last = capture.apply(torch.add, (zeros, extra), {})
        extended.append(torch.cat((by_row, last), 1).transpose(0, 1))
    return extended[0], extended[1]
