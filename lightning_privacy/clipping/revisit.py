"""Large layers whose activations are computed again: norms in one backward, sums in another.

Under gradient checkpointing an activation is there for a moment only, but a clipped sum needs the
factors of every layer's gradient (Li et al. 2022, arXiv 2110.05679, section 4) until all norms are
known. To keep them takes back half of what checkpointing gave. As far as a GPU has no room for
that, layers give their norms and let their factors go: those that a backward meets first. A second
backward, which goes no deeper than these layers, brings the factors once more, and each is weighted
and added up at once.

Legend: ``B`` rows, each of which is a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.clipping.buffer import LARGEST
from lightning_privacy.clipping.contributions import Outer, outer_norm
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from torch import nn

    from lightning_privacy.clipping.units import ClippedSum

# Free memory for each byte of factors that is kept: sums and a layer's activations need some, too.
_ROOM = 1.5


def large_matrices(parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Names of the parameters whose factors are worth a second backward."""
    return frozenset(n for n, p in parameters.items() if p.dim() == 2 and p.numel() > LARGEST)


def recomputed() -> bool:
    """Whether what a forward saves now is dropped, and computed again by every backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def room(device: torch.device) -> float:
    """Bytes that can still be allocated; infinite on the CPU, whose memory nobody counts."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    cap = total * torch.cuda.get_per_process_memory_fraction(device)
    return float(min(free, cap - reserved) + reserved - torch.cuda.memory_allocated(device))


class Revisit:
    """What one micro-batch leaves to a second backward. For rows that are clipped as a whole.

    Args:
        names: the parameters that may be left.
        slack: by how much, relatively, a unit's norm may exceed the clip norm: what is accounted.

    Attributes:
        types: in which types factors came that were left.
    """

    def __init__(self, names: frozenset[str], slack: float) -> None:
        self._slack = slack
        self._names, self._used, self._brought = names, set[str](), set[str]()
        self._anchors: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._pending: list[tuple[str, Outer]] = []
        self._norms: dict[tuple[str, ...], Tensor] = {}
        self._first: dict[tuple[str, ...], Tensor] = {}
        self._take: Callable[[str, Outer], None] | None = None
        self.types: set[torch.dtype] = set()

    # ------------------------------------------------------------------ forward
    def anchor(self, name: str, device: torch.device, size: int) -> Tensor | None:
        """A leaf for this parameter's use; None where its factors are kept.

        The second backward goes as deep as there are leaves.

        Args:
            name: of the parameter.
            device: where it is.
            size: of its factors, in bytes.
        """
        if name not in self._names or not recomputed():
            return None
        self._sizes[name] = size
        return self._anchors.setdefault(name, torch.zeros((), device=device, requires_grad=True))

    def used(self, name: str) -> None:
        """Keep the factors of what is used a second time: a sum's norm is not that of its parts."""
        if name in self._used:
            self._anchors.pop(name, None)
            self._names -= {name}
        self._used.add(name)

    def keep_what_fits(self) -> bool:
        """After the forward: keep factors as far as there is room, from the first layer on.

        Returns:
            Whether others are left.
        """
        if not self._anchors:
            return False
        free = room(next(iter(self._anchors.values())).device)
        for name in [*self._anchors]:
            free -= _ROOM * self._sizes[name]
            if free < 0:
                return True
            del self._anchors[name]
        return False

    # ------------------------------------------------------------------ both backwards
    def left(self, name: str) -> bool:
        """Whether this parameter's factors come in the second backward."""
        return name in self._anchors

    def leave(self, name: str, outer: Outer) -> bool:
        """Take the norm of these factors, which the caller then lets go; False if it keeps them."""
        if not self.left(name):
            return False
        if name in self._brought:
            raise _brought_twice(name)
        self._brought.add(name)
        self.types.add(outer.left.dtype)
        # Layers that read the same input (queries, keys and values) share its Gram matrix.
        if self._pending and not _same(self._pending[-1][1].right, outer.right):
            self._settle()
        self._pending.append((name, outer))
        return True

    def _settle(self) -> None:
        if self._pending:
            names = tuple(name for name, _ in self._pending)
            lefts = [outer.left for _, outer in self._pending]
            with full_precision():
                self._norms[names] = outer_norm(lefts, self._pending[0][1].right)
                # Together with the norms: what else reads a gradient may write to it in between.
                for name, outer in self._pending if self._take is not None else ():
                    self._take(name, outer)  # type: ignore[misc]
        self._pending.clear()

    def norms(self, found: Container[str]) -> list[Tensor]:
        """Squared norms ``[B]`` over parts of what was left.

        Args:
            found: names of the parameters whose gradients were kept.

        Raises:
            GuaranteeError: a gradient was left in part and kept in part.
        """
        self._settle()
        for name in self._brought:
            if name in found:
                raise _brought_twice(name)
        return list(self._norms.values())

    # ------------------------------------------------------------------ second backward
    @property
    def revisiting(self) -> bool:
        """Whether the second backward runs: what was not left is there already."""
        return self._take is not None

    def run(
        self,
        roots: Any,
        clipped: ClippedSum,
        parameters: Mapping[str, nn.Parameter],
        add: Callable[[str, Tensor], None],
        scale: Tensor,
    ) -> None:
        """Run the second backward and add up what it brings, with the weights of the first.

        Args:
            roots: where the backward starts; their graph was kept.
            clipped: the clipped sum of everything else, by the norms of everything.
            parameters: the covered parameters by name.
            add: takes each parameter's sum.
            scale: ``[B]`` what a row's gradient is multiplied by.

        Raises:
            GuaranteeError: the second backward brought other gradients than the first.
        """
        weights, excluded = clipped.weights, clipped.excluded
        assert weights is not None

        def take(name: str, outer: Outer) -> None:
            if excluded is not None:
                outer = outer.without(excluded)
            add(name, outer.weighted_sum(weights[0], parameters[name].shape))

        self._first, self._norms, self._take = self._norms, {}, take
        self._brought.clear()
        try:
            torch.autograd.backward(roots, inputs=list(self._anchors.values()))
            self._settle()
        finally:
            self._take = None
        if self._first.keys() != self._norms.keys():
            raise _unlike()
        growth = (torch.stack([*self._norms.values()]) - torch.stack([*self._first.values()])).sum(
            0
        )
        most = ((1 + self._slack) ** 2 - 1) * clipped.norms.square()
        # A unit whose first norm is not finite adds nothing, whatever comes now.
        if not bool(((growth * scale.square() <= most) | clipped.nonfinite).all()):
            raise _unlike()

    def close(self) -> None:
        """Let go of everything."""
        for held in (self._anchors, self._pending, self._norms, self._first, self._brought):
            held.clear()


def _same(first: Tensor, second: Tensor) -> bool:
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _unlike() -> GuaranteeError:
    return GuaranteeError(
        must="a second backward over the same graph brings the same gradients",
        found="larger gradients, or others: a hook or a function of autograd changes them at "
        "random, or counts its calls",
        cost="what is added up would not be what was clipped",
        remedy="take that hook away; or train without gradient checkpointing, which needs one "
        "backward",
    )


def _brought_twice(name: str) -> GuaranteeError:
    return GuaranteeError(
        must="a layer that is left to a second backward has one use",
        found=f"a second gradient for {name}, of a use that the forward did not show: in what a "
        "reentrant checkpoint or an autograd.Function computes again in its backward",
        cost="the norm of a sum of two gradients is not that of either: clipping would be too weak",
        remedy="use torch.utils.checkpoint with use_reentrant=False for all uses of that layer, or "
        "for none",
    )
