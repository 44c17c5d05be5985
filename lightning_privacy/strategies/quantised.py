"""Shards of weights in 4 bits: one tensor of bytes for each, which FSDP2 shards like any other.

A layer of bitsandbytes keeps packed values in its weight and their scales beside it. Here both
become one frozen parameter of bytes; before the layer's forward, when these are gathered, they are
taken for what they are. Nothing is computed anew, so the values are those of one process, bit for
bit; and as the bytes are gathered into the same memory again for the backward, it sees them too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALIGNED = 16
"""Bytes to which values and scales are padded, so that kernels may read them in whole words."""


def pack_quantised(module: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Make each weight in 4 bits one parameter of bytes, quantising what is not yet quantised.

    Args:
        module: Any module; its weights are replaced.
        device: Where they go.

    Returns:
        The new parameters, of type uint8 and frozen.
    """
    return {_pack(layer, device) for layer in list(_layers(module))}


def _layers(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if _in_four_bits(part._parameters.get("weight")))


def _in_four_bits(weight: Any) -> bool:
    # On CPUs with AVX512 an evaluation packs a weight in another way, which is for inference only.
    state = getattr(weight, "quant_state", None)
    for_inference = getattr(state, "packing_format_for_cpu", False)
    return type(weight).__name__ == "Params4bit" and not for_inference


def _pack(layer: Any, device: torch.device) -> nn.Parameter:
    layer.to(device)  # this quantises a weight that is not quantised yet
    layer.support_avx512bf16_for_cpu = False
    weight, state = layer.weight, layer.weight.quant_state
    values, scales = _bytes(weight), _bytes(state.absmax)
    packed = nn.Parameter(torch.cat([_padded(values), _padded(scales)]), requires_grad=False)
    layer.register_forward_pre_hook(
        _Unpacking(
            kind=type(weight), dtype=weight.dtype, size=len(values), state=state,
            scales=state.absmax.dtype, scale_count=state.absmax.numel(),
        )
    )  # fmt: skip
    layer.weight, layer.quant_state = packed, state
    state.absmax = state.absmax.new_empty(0)
    return packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unpacking:
    """The hook that makes gathered bytes the weight that a layer of bitsandbytes expects."""

    kind: Any
    dtype: torch.dtype
    size: int
    state: Any
    scales: torch.dtype
    scale_count: int

    def __call__(self, layer: Any, _inputs: Any) -> None:
        held = layer.weight
        if isinstance(held, self.kind):
            return
        both = held.detach()
        scales = both[-(-self.size // _ALIGNED) * _ALIGNED :].view(self.scales)
        self.state.absmax = scales[: self.scale_count]
        # FSDP puts the shard into its place again.
        layer.weight = self.kind(
            both[: self.size].view(self.dtype).view(-1, 1), requires_grad=False,
            quant_state=self.state, quant_storage=self.dtype, bnb_quantized=True,
            blocksize=self.state.blocksize, quant_type=self.state.quant_type,
            compress_statistics=self.state.nested,
        )  # fmt: skip


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).contiguous().view(-1).view(torch.uint8)


def _padded(values: Tensor) -> Tensor:
    return nn.functional.pad(values, (0, -len(values) % _ALIGNED))
