"""Parameters and activations in the type in which an operation computes, each cast once."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Cast:
    """A tensor's values in another type; the tensor is not held, and its id may be used again."""

    of: ref[Tensor]
    version: int
    value: Tensor

    @classmethod
    def made(cls, tensor: Tensor, dtype: torch.dtype) -> _Cast:
        return cls(ref(tensor), tensor._version, tensor.detach().to(dtype))

    def fits(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is a cast of this tensor, which was not written to since."""
        same = self.of() is tensor and self.value.dtype == dtype
        return same and self.version == tensor._version


class Casts:
    """What one micro-batch has cast.

    Args:
        parameters: the trainable ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._others: dict[tuple[int, torch.dtype], _Cast] = {}
        self._last: _Cast | None = None

    def parameter(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Detached and in ``dtype``; one copy for all its uses.

        One whose memory comes and goes is cast for each use, or all of a model would be held.
        """
        if tensor.dtype == dtype or getattr(tensor, GATHERED, False):
            return tensor.detach().to(dtype)
        key = (id(tensor), dtype)
        trainable = id(tensor) in self._parameters and tensor.requires_grad
        if trainable and tensor.numel() <= LARGEST:
            if key not in self._casts:
                self.small(tensor.device, tensor.dtype, dtype)
            return self._casts[key]
        known = self._others.get(key)
        if known is not None and known.fits(tensor, dtype):
            return known.value
        if recomputed() or tensor.is_inference():
            # Kept, it would be the memory that recomputing saves.
            return tensor.detach().to(dtype)
        known = self._others[key] = _Cast.made(tensor, dtype)
        return known.value

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
        if tensor.is_inference():  # nothing tells whether it was written to
            return tensor.detach().to(dtype)
        last = self._last
        if last is None or not last.fits(tensor, dtype):
            # Held itself, it would hold a recomputed layer's whole graph.
            last = self._last = _Cast.made(tensor, dtype)
        return last.value

    def clear(self) -> None:
        """Let go of everything."""
        self._casts.clear()
        self._others.clear()
        self._last = None


def _small(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        parameter.numel() <= LARGEST
        and not getattr(parameter, GATHERED, False)
        and parameter.device == device
        and parameter.dtype == dtype
    )
