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

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Size, Tensor

# A larger gradient is worth its own launches, and is better freed on its own.
LARGEST = 2**20


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


class RowBuffer:
    """The gradients of one micro-batch's rows.

    Args:
        layout: what lies where.
        rows: number of rows ``B``.
        device: where to allocate.
    """

    def __init__(self, layout: BufferLayout, rows: int, device: torch.device) -> None:
        self.layout = layout
        self.gradients = torch.empty(rows, layout.size, dtype=layout.dtype, device=device)
        self._written: set[str] = set()

    def place(self, name: str) -> Tensor:
        """``[B, n]``: the part of one parameter, a view."""
        start = self.layout.offsets[name]
        return self.gradients[:, start : start + math.prod(self.layout.shapes[name])]

    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add ``left^T right`` per row, from ``left [B, M, a]`` and ``right [B, M, b]``."""
        layout, rows = self.layout, self.gradients
        shape = len(rows), left.shape[2], right.shape[2]
        strides = layout.size, right.shape[2], 1
        # One view instead of a slice and a reshape: this runs hundreds of times in a backward.
        place = rows.as_strided(shape, strides, layout.offsets[name])
        if name in self._written:
            place.baddbmm_(left.mT, right)
        else:
            torch.bmm(left.mT, right, out=place)
            self._written.add(name)

    def holds(self, name: str, dtype: torch.dtype) -> bool:
        """Whether gradients of that type of a parameter belong here."""
        return name in self.layout.shapes and dtype == self.layout.dtype

    def wrote(self, name: str) -> bool:
        """Whether a parameter has a gradient here."""
        return name in self._written

    def take(self, name: str) -> Tensor:
        """``[B, n]``: the gradient of one parameter, which is then no longer here."""
        self._written.remove(name)
        return self.place(name).clone()

    def complete(self) -> Tensor:
        """``[B, P]``, with zeros for parameters that nothing reached."""
        for name in self.layout.shapes:
            if name not in self._written:
                self.place(name).zero_()
        return self.gradients
