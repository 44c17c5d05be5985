"""Parameters and activations in the type in which an operation computes, each cast once."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_privacy.clipping.buffer import LARGEST
from lightning_privacy.clipping.revisit import recomputed

if TYPE_CHECKING:
    from collections.abc import Iterable

GATHERED = "is_gathered"
"""Attribute of a parameter whose memory is there only while its part of the module runs."""


class Casts:
    """What one micro-batch has cast.

    Args:
        parameters: the trainable ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._last: tuple[ref[Tensor], tuple[int, torch.dtype], Tensor] | None = None

    def parameter(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Detached and in ``dtype``; one copy for all its uses.

        One whose memory comes and goes is cast for each use, or all of a model would be held.
        """
        if tensor.dtype == dtype or getattr(tensor, GATHERED, False):
            return tensor.detach().to(dtype)
        key = (id(tensor), dtype)
        if key not in self._casts:
            trainable = id(tensor) in self._parameters and tensor.requires_grad
            if trainable and tensor.numel() <= LARGEST:
                self.small(tensor.device, tensor.dtype, dtype)
            elif recomputed():
                # Kept, it would be the memory that recomputing saves.
                return tensor.detach().to(dtype)
            else:
                self._casts[key] = tensor.detach().to(dtype)
        return self._casts[key]

    def small(self, device: torch.device, old: torch.dtype, new: torch.dtype) -> dict[int, Tensor]:
        """All small parameters at once, by their ids: one by one would take a launch each."""
        small = [p for p in self._parameters.values() if _small(p, device, old)]
        if old == new:
            return {id(parameter): parameter.detach() for parameter in small}
        if (id(small[0]), new) not in self._casts:
            flat = torch.cat([parameter.detach().flatten() for parameter in small]).to(new)
            pieces = flat.split([parameter.numel() for parameter in small])
            for parameter, piece in zip(small, pieces, strict=True):
                self._casts[id(parameter), new] = piece.view(parameter.shape)
        return {id(parameter): self._casts[id(parameter), new] for parameter in small}

    def activation(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """In ``dtype``; layers that read the same one share the copy."""
        if tensor.dtype == dtype:
            return tensor
        known, last = (tensor._version, dtype), self._last
        # A tensor that was written to since is another activation.
        if last is None or last[0]() is not tensor or last[1] != known:
            # Held itself, it would hold a recomputed layer's whole graph.
            last = self._last = ref(tensor), known, tensor.detach().to(dtype)
        return last[2]

    def clear(self) -> None:
        """Let go of everything."""
        self._casts.clear()
        self._last = None


def _small(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        parameter.numel() <= LARGEST
        and not getattr(parameter, GATHERED, False)
        and parameter.device == device
        and parameter.dtype == dtype
    )
