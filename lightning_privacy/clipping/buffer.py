"""Per-row gradients of many small parameters, side by side in one buffer ``[B, P]``.

An adapter has hundreds of small matrices. Kept apart, each would need its own norm, weighted sum
and addition, and on a GPU the launches would cost more than the arithmetic. In one buffer all of
them are one norm over rows and one weighted sum.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Size, Tensor

# A larger gradient is worth its own launches, and is better freed on its own.
LARGEST = 2**20
# On the CPU nothing is launched, and bringing gradients together is a copy.
LARGEST_ON_CPU = 2**15


@dataclasses.dataclass(frozen=True, slots=True)
class BufferLayout:
    """Which parameters share a buffer, in which order and type.

    Attributes:
        shapes: the parameters' shapes by name.
        dtype: the type in which their rows' gradients are computed.
        offsets: where each parameter begins.
        size: elements of a row, ``P``.
    """

    shapes: Mapping[str, Size]
    dtype: torch.dtype
    offsets: Mapping[str, int] = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        *starts, size = accumulate(map(math.prod, self.shapes.values()), initial=0)
        object.__setattr__(self, "offsets", dict(zip(self.shapes, starts, strict=True)))
        object.__setattr__(self, "size", size)

    def pieces(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters' parts of ``flat [P]``, as views in the parameters' shapes."""
        for name, shape in self.shapes.items():
            start = self.offsets[name]
            yield name, flat[start : start + math.prod(shape)].view(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class RowBuffer:
    """The gradients of one micro-batch's rows: ``gradients [B, P]``, as ``layout`` says."""

    layout: BufferLayout
    gradients: Tensor
