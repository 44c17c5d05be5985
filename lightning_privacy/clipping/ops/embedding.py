"""Lookup tables: ``F.embedding``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_privacy.clipping.registry import operation
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture, Slot
    from lightning_privacy.clipping.layout import RowDim


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    capture: Capture
    table: Slot
    rows: RowDim
    padding_index: int | None

    def record(self, index: Tensor, grad: Tensor) -> None:
        """``index [..]`` and the gradient of the output ``grad [.., d]``."""
        values = self.capture.by_row(grad, self.rows).flatten(1, -2)
        index = self.capture.by_row(index, self.rows).flatten(1)
        if self.padding_index is not None:
            # torch gives the padding row no gradient.
            values = values.masked_fill((index == self.padding_index)[:, :, None], 0)
        self.capture.add_lookup(self.table, index, values)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, anchor: Tensor, table: Tensor, site: _Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(index)
        return F.embedding(index, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.site.record(ctx.saved_tensors[0], grad)
        return None, None, None, None


@operation(F.embedding)
def embedding(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rows of the table; ids that all examples share (positions) go to the general rule."""
    index, table, padding, max_norm, _, by_frequency, _sparse = _bind(args, kwargs)
    slot = capture.slot(table)
    if slot is None:
        return NotImplemented
    if max_norm is not None or by_frequency:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedOperationError(
            must="an embedding's gradient for an example depends on that example alone",
            found=f"{slot.name} is looked up with {option}",
            cost="max_norm rewrites the table from the batch's ids outside the private optimizer "
            "step; scale_grad_by_freq scales an example's gradient by the others' ids",
            remedy=f"construct nn.Embedding without {option}",
        )
    rows = capture.rows_of(slot.name, func, index)
    if rows is None:
        return NotImplemented
    if padding is not None and padding < 0:
        padding += table.shape[0]
    site = _Site(capture, slot, rows, padding)
    return _Lookup.apply(index, capture.anchor(table.device), table.detach(), site)  # type: ignore[no-untyped-call]


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    names = (
        ("input", None),
        ("weight", None),
        ("padding_idx", None),
        ("max_norm", None),
        ("norm_type", 2.0),
        ("scale_grad_by_freq", False),
        ("sparse", False),
    )
    return list(args) + [kwargs.get(name, default) for name, default in names[len(args) :]]
