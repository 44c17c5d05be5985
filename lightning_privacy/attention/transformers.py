"""Noise in the models of transformers, by its own interface for attention and for masks.

A model looks its attention function and its mask function up by the name in its configuration. Both
are registered under our names: a name without a mask function would silently lose the padding. The
configuration gets its old name back afterwards.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_privacy.attention.dense import causal, logits_bias
from lightning_privacy.attention.flex import noisy_flex
from lightning_privacy.attention.weights import weights_noise
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_privacy.attention.realisation import Injection, LayerNoise

# Our names hold transformers' own, which check by these whether a model can do it.
_EAGER, _SDPA = "lightning_privacy_eager", "lightning_privacy_sdpa"
_FLEX = "lightning_privacy_flex_attention"
# A dense matrix of more elements is worth a warning on a GPU.
_LARGE = 2**26

_noised: WeakKeyDictionary[nn.Module, LayerNoise] = WeakKeyDictionary()
_active: list[Injection] = []


def calls_interface(module: nn.Module) -> bool:
    """Whether transformers' own code computes attention in this module, by a function by name."""
    transformers = sys.modules.get("transformers")
    if transformers is None or isinstance(module, transformers.PreTrainedModel):
        return False
    return mentions(module, "ALL_ATTENTION_FUNCTIONS")


def is_noised(module: nn.Module) -> bool:
    """Whether a layer has noise already."""
    return module in _noised


def mentions(module: nn.Module, name: str) -> bool:
    """Whether the code of the module's class uses a name."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        codes = (
            getattr(inspect.unwrap(m), "__code__", None) for m in vars(kind).values() if callable(m)
        )
        if any(code is not None and _uses(code, name) for code in codes):
            return True
    return False


def _uses(code: CodeType, name: str) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return name in code.co_names or any(_uses(part, name) for part in inner)


def switch(
    root: nn.Module, layers: dict[nn.Module, LayerNoise], injection: Injection
) -> Callable[[], None]:
    """Let models of transformers call our functions.

    Args:
        root: what holds the models.
        layers: the attention modules to noise.
        injection: shared by them.

    Returns:
        What gives the models their functions back.
    """
    _register()
    kept: list[tuple[Any, str]] = []

    def restore() -> None:
        for config, name in reversed(kept):
            config._attn_implementation_internal = name
        for module in layers:
            _noised.pop(module, None)
        if injection in _active:
            _active.remove(injection)

    try:
        for model, config in _configurations(root, layers):
            name = _name_for(config._attn_implementation, injection, _device_of(layers))
            if model is not None:
                model.get_correct_attn_implementation(name)  # raises if the model cannot
            kept.append((config, config._attn_implementation))
            # Not through `set_attn_implementation`, which would reach into parts of other methods.
            config._attn_implementation_internal = name
    except BaseException:
        restore()
        raise
    _noised.update(layers)
    _active.append(injection)
    return restore


def _device_of(layers: Iterable[nn.Module]) -> torch.device:
    parameters = (p for module in layers for p in module.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def _configurations(root: nn.Module, layers: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """The models around the layers with their configurations, and those of the layers alone."""
    from transformers import PreTrainedModel

    found: dict[int, tuple[Any, Any]] = {}
    chosen = set(layers)
    for part in root.modules():
        if isinstance(part, PreTrainedModel) and not chosen.isdisjoint(part.modules()):
            found.setdefault(id(part.config), (part, part.config))
    for layer in chosen:
        config = getattr(layer, "config", None)
        if config is not None:
            found.setdefault(id(config), (None, config))
    return list(found.values())


def _name_for(current: str, injection: Injection, device: torch.device) -> str:
    if current == "eager":
        if device.type == "cuda":
            warnings.warn(
                "AttentionNoise: the model computes attention eagerly, so its noise is a dense "
                "matrix, too: slow, and memory grows with the square of the length. Load the model "
                "with attn_implementation='sdpa' to have both in one kernel.",
                stacklevel=2,
            )
        return _EAGER
    if injection.where == "logits" and injection.flexible(device):
        return _FLEX
    return _SDPA


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, function, mask in (
        (_EAGER, _eager, eager_mask),
        (_SDPA, _sdpa, _dense_mask),
        (_FLEX, _flex, _flex_mask),
    ):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def _due(module: nn.Module) -> LayerNoise | None:
    noise = _noised.get(module)
    return noise if noise is not None and noise.due(module.training) else None


# ---------------------------------------------------------------------- masks
def _dense_mask(**named: Any) -> Any:
    """The whole mask always: noise has to know where attention is allowed."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        **{**named, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


def _flex_mask(**named: Any) -> Any:
    """A block mask for training; plain attention has an ordinary one, and so has one query."""
    shared = _active[-1] if _active else None
    wanted = shared is not None and not shared.quiet()
    wanted &= torch.is_grad_enabled() or (shared is not None and shared.at_inference)
    if not wanted or named["q_length"] == 1:
        return _dense_mask(**named)
    from transformers.masking_utils import flex_attention_mask

    with torch.compiler.set_stance("default"):
        block = flex_attention_mask(**named)
    padding = named.get("attention_mask")
    begin = None if padding is None else padding.to(torch.uint8).argmax(-1).to(torch.int32)
    block.first_key = begin
    return block


# ---------------------------------------------------------------------- attention functions
def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any
) -> Any:
    """The model's own function, with noise in its mask."""
    base = sys.modules[type(module).__module__].eager_attention_forward
    noise = _due(module)
    if noise is None:
        return base(module, query, key, value, mask, **named)
    mask = _cut(mask, key)
    if noise.injection.where == "logits":
        mask = logits_bias(noise, query, key, mask, _scale(query, named))
        return base(module, query, key, value, mask, **named)
    output, weights = base(module, query, key, value, mask, **named)
    return _with_weights(noise, query, value, mask, output), weights


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any
) -> Any:
    """Torch's attention, with noise in its mask or on its weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    noise = _due(module)
    if noise is None:
        return sdpa_attention_forward(module, query, key, value, mask, **named)
    mask = _cut(mask, key)
    if mask is None and _is_causal(module, query, named):
        mask = causal(query.shape[2], key.shape[2], query.device)
    if noise.injection.where == "logits":
        mask = logits_bias(noise, query, key, mask, _scale(query, named))
        return sdpa_attention_forward(module, query, key, value, mask, **named)
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **named)
    return _with_weights(noise, query, value, mask, output), None


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any
) -> Any:
    """Attention and noise in one kernel, where `_flex_mask` made its mask."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    noise = _due(module)
    if isinstance(mask, Tensor) or (noise is None and mask is None):
        if noise is not None and mask is not None and mask.numel() * query.shape[1] > _LARGE:
            _warn_dense(noise)
        return _sdpa(module, query, key, value, mask, **named)
    _refuse_extras(module, noise, named)
    if mask is None and _is_causal(module, query, named):
        mask = create_block_mask(
            lambda _b, _h, q, k: q >= k, None, None, query.shape[2], key.shape[2], query.device
        )
    assert mask is None or isinstance(mask, BlockMask)
    output = noisy_flex(
        noise,
        query,
        key,
        value,
        scale=_scale(query, named),
        block_mask=mask,
        first_key=getattr(mask, "first_key", None),
        softcap=named.get("softcap"),
    )
    return output.transpose(1, 2).contiguous(), None


def _refuse_extras(module: nn.Module, noise: LayerNoise | None, named: dict[str, Any]) -> None:
    found = [n for n in ("s_aux", "position_bias") if named.get(n) is not None]
    if named.get("dropout"):
        found.append(f"attention dropout {named['dropout']}")
    if found:
        name = noise.name if noise is not None else type(module).__name__
        raise UnsupportedOperationError(
            must="what an attention layer does besides masking fits into the kernel with noise",
            found=f"{name} with {', '.join(found)}",
            cost="that part would be left out silently",
            remedy="set attention_dropout=0, or AttentionNoise(method='dense')",
        )


def _warn_dense(noise: LayerNoise) -> None:
    warnings.warn(
        f"AttentionNoise: {noise.name} gets a mask as a tensor, so its noise is a dense matrix: "
        "slow, and memory grows with the square of the length.",
        stacklevel=2,
    )


def _scale(query: Tensor, named: dict[str, Any]) -> float:
    scale: float = named.get("scaling") or query.shape[-1] ** -0.5
    return scale


def _cut(mask: Tensor | None, key: Tensor) -> Tensor | None:
    return None if mask is None else mask[..., : key.shape[-2]]


def _is_causal(module: nn.Module, query: Tensor, named: dict[str, Any]) -> bool:
    """As transformers decides where there is no mask."""
    wanted = named.get("is_causal")
    wanted = getattr(module, "is_causal", True) if wanted is None else wanted
    return bool(wanted) and query.shape[2] > 1


def _with_weights(
    noise: LayerNoise, query: Tensor, value: Tensor, mask: Tensor | None, output: Tensor
) -> Tensor:
    if mask is None:
        mask = query.new_ones(1, 1, query.shape[2], value.shape[2], dtype=torch.bool)
    added = weights_noise(noise, value, query.shape[1], mask, noise.injection.std)
    return output + added.transpose(1, 2)
