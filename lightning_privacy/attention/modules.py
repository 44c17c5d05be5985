"""Noise in attention that is not transformers': torch's own, users of its kernel, own modules."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_privacy.attention.counter import noise_matrix
from lightning_privacy.attention.dense import allowed, causal, logits_bias
from lightning_privacy.attention.flex import noisy_flex
from lightning_privacy.attention.weights import weights_noise

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.attention.realisation import LayerNoise


@runtime_checkable
class NoisyAttention(Protocol):
    """An attention module that adds the noise itself.

    It has the attribute, None at first, and in its forward, where this is not None::

        logits = self.attention_noise.on_logits(logits, training=self.training)
        weights = self.attention_noise.on_weights(logits.softmax(-1), training=self.training)
    """

    attention_noise: LayerNoise | None


def give_own(module: NoisyAttention, noise: LayerNoise) -> Callable[[], None]:
    """Give an own module its noise.

    Args:
        module: the attention module.
        noise: what it calls.

    Returns:
        What takes the noise away again.
    """
    module.attention_noise = noise

    def take() -> None:
        module.attention_noise = None

    return take


_WRAPPED = "forward_with_noise"


def is_wrapped(module: nn.Module) -> bool:
    """Whether `wrap` was there."""
    return getattr(vars(module).get("forward"), "__name__", "") == _WRAPPED


def wrap(module: nn.Module, forward: Callable[..., Any], noise: LayerNoise) -> Callable[[], None]:
    """Replace the forward of one module, not of its class.

    Args:
        module: the attention module.
        forward: called with the original forward, the module, the noise, and the arguments.
        noise: of the layer.

    Returns:
        What restores the module.
    """
    own = vars(module).get("forward")
    original = module.forward

    def noisy(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if self is not module:  # a copy of the module, which has no noise
            return type(self).forward(self, *arguments, **named)
        return forward(original, module, noise, *arguments, **named)

    vars(module)["forward"] = MethodType(noisy, module)

    noisy.__name__ = _WRAPPED

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = own

    return restore


# ---------------------------------------------------------------------- torch's own module
def multihead(  # noqa: PLR0913 - the arguments of the forward that it stands for
    original: Callable[..., Any],
    module: nn.MultiheadAttention,
    noise: LayerNoise,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """The forward of `nn.MultiheadAttention`, with noise in its mask or on its weights."""
    named: dict[str, Any] = {
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "average_attn_weights": average_attn_weights,
        "is_causal": is_causal,
    }
    if not noise.due(module.training):
        return original(query, key, value, **named)
    rows, queries, keys = _extent(module, query, key)
    shape = (rows, module.num_heads, queries, keys)
    padded = _as_numbers(key_padding_mask, query)
    begin = None
    if padded is not None and padded.dim() == 2:
        begin = (padded == 0).to(torch.uint8).argmax(-1).to(torch.int32)
    mask = _as_numbers(attn_mask, query)
    if noise.injection.where == "weights":
        output, averaged = original(query, key, value, **named)
        permitted = _permitted(shape, mask, padded, query.device)
        return output + _weights_of_values(module, noise, value, permitted), averaged
    seed, fresh = noise.seed(query.device)
    bias = noise_matrix(seed, shape, begin, dtype=query.dtype).mul_(noise.injection.std)
    if fresh and noise.measured is None:
        _measure_multihead(module, noise, bias, query, key, mask, padded)
    bias = bias.flatten(0, 1) if mask is None else bias.flatten(0, 1) + mask
    named.update(key_padding_mask=padded, attn_mask=bias, is_causal=False)
    return original(query, key, value, **named)


def _extent(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    rows, length = (0, 1) if module.batch_first else (1, 0)
    return query.shape[rows], query.shape[length], key.shape[length]


def _as_numbers(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of this module, where True forbids, as numbers to be added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _permitted(
    shape: tuple[int, int, int, int], mask: Tensor | None, padded: Tensor | None, device: Any
) -> Tensor:
    """Where attention is allowed, ``[B, H, Q, K]``."""
    permitted = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        permitted &= allowed(mask if mask.dim() == 2 else mask.view(shape))
    if padded is not None:
        permitted &= allowed(padded if padded.dim() == 1 else padded[:, None, None])
    return permitted


def _weights_of_values(
    module: nn.MultiheadAttention, noise: LayerNoise, value: Tensor, permitted: Tensor
) -> Tensor:
    """``std E V`` through the module's own projections: what surrounds its weights is linear."""
    width = module.embed_dim
    if value.dim() == 3 and not module.batch_first:
        value = value.transpose(0, 1)
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight[2 * width :]
    else:
        weight = module.v_proj_weight
    offset = None if module.in_proj_bias is None else module.in_proj_bias[2 * width :]
    flat = F.linear(value if value.dim() == 3 else value[None], weight, offset)
    values = flat.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    mixed = weights_noise(noise, values, module.num_heads, permitted, noise.injection.std)
    projected = F.linear(mixed.transpose(1, 2).flatten(2), module.out_proj.weight)
    if value.dim() == 2:
        return projected[0]
    return projected if module.batch_first else projected.transpose(0, 1)


@torch.no_grad()
def _measure_multihead(
    module: nn.MultiheadAttention,
    noise: LayerNoise,
    bias: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    padded: Tensor | None,
) -> None:
    """Project once more, a few rows: the module keeps its logits to itself."""
    width, heads = module.embed_dim, module.num_heads
    if query.dim() == 3 and not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    rows = min(8, len(bias))
    query, key = (x[None] if x.dim() == 2 else x[:rows] for x in (query, key))
    if module.in_proj_weight is not None:
        of_query, of_key, _ = module.in_proj_weight.detach().chunk(3)
    else:
        of_query, of_key = module.q_proj_weight.detach(), module.k_proj_weight.detach()
    offsets = (None,) * 2 if module.in_proj_bias is None else module.in_proj_bias.detach().chunk(3)
    q, k = (
        F.linear(x, weight, offset).unflatten(-1, (heads, -1)).transpose(1, 2).float()
        for x, weight, offset in zip((query, key), (of_query, of_key), offsets[:2], strict=True)
    )
    logits = q @ k.mT * (width // heads) ** -0.5
    if mask is not None:
        own = mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads))[:rows]
        logits = logits + own
    if padded is not None:
        logits = logits + (padded[None] if padded.dim() == 1 else padded[:rows])[:, None, None]
    noise.measure(logits, bias[:rows])


# ---------------------------------------------------------------------- users of torch's kernel
def kernel_user(
    original: Callable[..., Any], module: nn.Module, noise: LayerNoise, *args: Any, **named: Any
) -> Any:
    """The forward of a module that calls ``F.scaled_dot_product_attention``."""
    if not noise.due(module.training):
        return original(*args, **named)
    # Entered in the thread that computes, which in a checkpoint's backward is another one.
    with _Kernel(noise):
        return original(*args, **named)


class _Kernel(TorchFunctionMode):
    """Sees the call under whatever name the module imported it."""

    def __init__(self, noise: LayerNoise) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(self._noise, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(  # noqa: PLR0913 - the arguments of the function that it stands for
    noise: LayerNoise,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's attention of ``[..., H, Q, d]``, with noise."""
    lead = query.shape[:-3]
    four = [x.reshape(-1, *x.shape[-3:]) if x.dim() > 3 else x[None] for x in (query, key, value)]
    if query.dim() == 3:  # rows and no heads
        four = [x.transpose(0, 1) for x in four]
    q, k, v = four
    mask = _four(attn_mask, query)
    if mask is None and is_causal:
        mask = causal(q.shape[2], k.shape[2], q.device)
    size = query.shape[-1] ** -0.5 if scale is None else scale
    named: dict[str, Any] = {"dropout_p": dropout_p, "scale": size, "enable_gqa": enable_gqa}
    if noise.injection.where == "weights":
        full = q.new_ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask
        output = F.scaled_dot_product_attention(q, k, v, mask, **named)
        output = output + weights_noise(noise, v, q.shape[1], full, noise.injection.std)
    elif noise.injection.flexible(query.device) and not dropout_p:
        wide = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        output = noisy_flex(noise, q, k, v, scale=size, mask=wide)
    else:
        output = F.scaled_dot_product_attention(
            q, k, v, logits_bias(noise, q, k, mask, size), **named
        )
    if query.dim() == 3:
        output = output.transpose(0, 1)
    return output.reshape(*lead, *output.shape[1:]) if query.dim() > 3 else output[0]


def _four(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as ``[B or 1, H or 1, Q, K]``."""
    if mask is None or mask.dim() == 2:
        return None if mask is None else mask[None, None]
    if query.dim() == 3:
        return mask[:, None]
    mask = mask.expand(*query.shape[:-3], *mask.shape[-3:]) if query.dim() > 4 else mask
    return mask.reshape(-1, *mask.shape[-3:]) if mask.dim() > 3 else mask[None]
