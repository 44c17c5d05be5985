"""A copy per row of every small parameter, all handed out by one node of the graph.

An adapter has hundreds of small matrices. Were each to catch its rows' gradients in a function of
its own, a GPU would wait for Python hundreds of times in a backward. An operation on copies needs
none: autograd computes each row's gradient where it computes everything else, and brings those of
all parameters to the one node, in one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.clipping.buffer import BufferLayout, RowBuffer
from lightning_privacy.clipping.registry import apply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class RowCopies:
    """Copies ``[B, *shape]`` without memory of their own, and the gradients that came for them.

    Those of a matrix are transposed, ``[B, in, out]``: as a dense layer uses it, without a node of
    the graph for each use.

    Args:
        values: the parameters' values by name, detached, of one type and device.
        rows: number of rows ``B``.
        anchor: a scalar that requires gradients.
        admit: called with the name of a parameter whose gradient came; raises to refuse it.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        rows: int,
        anchor: Tensor,
        admit: Callable[[str], None],
    ) -> None:
        self.rows = rows
        self._admit: Callable[[str], None] | None = admit
        self._gradients: dict[str, Tensor] = {}
        self._names = tuple(values)
        copies = apply(_HandOut, anchor, self, *values.values())
        self._copies: dict[str, Tensor] = dict(zip(self._names, copies, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """``[B, *shape]``, of a matrix ``[B, in, out]``; a part of the graph."""
        return self._copies[name]

    def deliver(self, gradients: tuple[Tensor | None, ...]) -> None:
        """What a backward brought, in the order of the parameters; None for one that is unused.

        Reentrant checkpoints come here once for each of their blocks.
        """
        if self._admit is None:
            return
        for name, gradient in zip(self._names, gradients, strict=True):
            if gradient is not None:
                self._admit(name)
                known = self._gradients.get(name)
                self._gradients[name] = gradient if known is None else known + gradient

    @property
    def brought(self) -> Iterable[str]:
        """Names of the parameters whose gradients are here."""
        return self._gradients.keys()

    def take(self, name: str) -> Tensor | None:
        """``[B, *shape]``: the gradient of one parameter, which is then no longer here."""
        gradient = self._gradients.pop(name, None)
        return None if gradient is None else _upright(gradient)

    def joined(self) -> RowBuffer | None:
        """All gradients side by side; they are then no longer here. None if there are none."""
        found, self._gradients = self._gradients, {}
        if not found:
            return None
        # In the parameters' order, whatever order they came in: a sum may depend on it.
        own = {name: _upright(found[name]) for name in self._names if name in found}
        shapes = {name: gradient.shape[1:] for name, gradient in own.items()}
        rows = torch.cat([gradient.flatten(1) for gradient in own.values()], 1)
        return RowBuffer(BufferLayout(shapes, rows.dtype), rows)

    def close(self) -> None:
        """Let go of the graph, which holds this object; gradients that came stay, others go."""
        self._copies.clear()
        self._admit = None


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, owner: RowCopies, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.inputs = owner, 2 + len(values)
        ctx.set_materialize_grads(False)
        copies = (value.expand(owner.rows, *value.shape) for value in values)
        return tuple(map(_upright, copies))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        owner: RowCopies = ctx.owner
        owner.deliver(tuple(None if g is None else g.detach() for g in gradients))
        return (None,) * int(ctx.inputs)


def _upright(copies: Tensor) -> Tensor:
    """``[B, in, out]`` as ``[B, out, in]``, and the reverse; what is no matrix as it is."""
    return copies.mT if copies.dim() == 3 else copies
