"""Per-example gradients, captured where a parameter enters an operation.

An operation that a tagged parameter enters (`tagging`) is rewritten so that autograd delivers each
row's gradient to the capture and nothing to the parameter: by the operation's own rule (`ops`), or
by the general one (`generic`).
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_privacy.clipping import generic, tagging
from lightning_privacy.clipping.buffer import LARGEST, LARGEST_ON_CPU, RowBuffer
from lightning_privacy.clipping.casts import Casts
from lightning_privacy.clipping.contributions import (
    Contribution,
    Dense,
    Lookup,
    Outer,
    combine,
    types_of,
)
from lightning_privacy.clipping.copies import RowCopies
from lightning_privacy.clipping.layout import Layouts, RowDim, default_rows
from lightning_privacy.clipping.registry import RULES, name_of
from lightning_privacy.clipping.tagging import RowTensor, TaggedParameter
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lightning_privacy.clipping.revisit import Revisit

_UNKNOWN = object()


class Slot:
    """What one capture knows about one parameter."""

    __slots__ = ("_leaf", "contributions", "name", "parameter")

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.contributions: list[Contribution] = []
        self._leaf: Tensor | None = None

    def leaf(self, rows: int) -> Tensor:
        """One copy per row, ``[B, *shape]``, without memory of its own; a leaf of the graph."""
        if self._leaf is None:
            value = self.parameter.detach()
            self._leaf = value.unsqueeze(0).expand(rows, *value.shape).requires_grad_()
        return self._leaf

    @property
    def reached(self) -> bool:
        """Whether anything was delivered here, and not to a buffer."""
        leaf = self._leaf is not None and self._leaf.grad is not None
        return leaf or bool(self.contributions)

    def collect(self) -> list[Contribution]:
        """All contributions, joined; the leaf's gradient is one of them."""
        if self._leaf is not None and self._leaf.grad is not None:
            self.contributions.append(Dense(self._leaf.grad))
        items, self.contributions, self._leaf = self.contributions, [], None
        return combine(items, self.parameter.shape) if items else []


class Capture:
    """One forward and backward over ``rows`` rows with per-row gradients.

    Args:
        parameters: the trainable parameters by name. Others are left alone.
        rows: number of rows ``B`` in the batch.
        layouts: where the rows lie, from `learn_layouts`; None keeps to "rows come first".
        instantiate: keep per-row gradients always, never the factors of a Gram norm.
        buffering: let the gradients of small parameters lie side by side in a `buffer`.
        revisit: what may be left to a second backward; None if there is only one.

    Raises:
        ConfigurationError: a parameter is not a plain `torch.nn.Parameter`, or is complex.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        rows: int,
        layouts: Layouts | None = None,
        instantiate: bool = False,
        buffering: bool = False,
        revisit: Revisit | None = None,
    ) -> None:
        self.rows = rows
        self.layouts = layouts if layouts is not None else Layouts()
        self.instantiate = instantiate
        self.revisit = revisit
        self.armed = False
        self.slots = {id(p): Slot(name, p) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            _require_plain(name, parameter)
        self.buffer: RowBuffer | None = None
        self._buffering = buffering
        self._copies: dict[tuple[torch.device, torch.dtype, torch.dtype], RowCopies] = {}
        self._anchors: dict[torch.device, Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype], Tensor] = {}
        self.casts = Casts(parameters.values())

    # ------------------------------------------------------------------ life of a capture
    def open(self) -> None:
        """Tag the parameters. Only one capture can be open in a process."""
        tagging.activate(self)
        for slot in self.slots.values():
            slot.parameter.__class__ = TaggedParameter

    def close(self) -> None:
        """Give the parameters their own class back. May be called at any time, twice too."""
        if tagging.deactivate(self):
            for slot in self.slots.values():
                slot.parameter.__class__ = nn.Parameter
        for copies in self._copies.values():
            copies.close()
        self._matrices.clear()
        self.casts.clear()
        self._anchors.clear()
        if self.revisit is not None:
            self.revisit.close()

    @contextmanager
    def opened(self) -> Iterator[Capture]:
        """`open` and, whatever happens, `close`."""
        self.open()
        try:
            yield self
        finally:
            self.close()

    def collect(self) -> dict[str, list[Contribution]]:
        """After backward: contributions by parameter name; parameters without any are absent.

        The gradients of copies are in the `buffer`, but for parameters used in another way, too,
        or in two types: the norm of a sum is not that of its parts.
        """
        brought = Counter(name for copies in self._copies.values() for name in copies.brought)
        for copies in self._copies.values():
            for slot in self.slots.values():
                apart = slot.reached or brought[slot.name] > 1 or self.buffer
                taken = copies.take(slot.name) if apart else None
                if taken is not None:
                    slot.contributions.append(Dense(taken))
            self.buffer = self.buffer or copies.joined()
        found = {slot.name: slot.collect() for slot in self.slots.values()}
        return {name: items for name, items in found.items() if items}

    def types(self, found: Mapping[str, list[Contribution]]) -> set[torch.dtype]:
        """The types in which the rows' gradients came, those in `buffer` and `revisit` included."""
        kinds = types_of(found)
        if self.buffer is not None:
            kinds.add(self.buffer.gradients.dtype)
        return kinds if self.revisit is None else kinds | self.revisit.types

    # ------------------------------------------------------------------ dispatch
    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``, rewritten if it touches a tagged parameter."""
        if self.revisit is not None and not self.armed:
            self._note_uses(self.revisit, (*args, *kwargs.values()))
        rule = RULES.get(func)
        if rule is not None:
            result = rule(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        return generic.apply(self, func, args, kwargs)

    def _note_uses(self, revisit: Revisit, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) is TaggedParameter:
                revisit.used(self.slots[id(value)].name)
            elif isinstance(value, list | tuple):
                self._note_uses(revisit, value)

    def slot(self, value: object) -> Slot | None:
        """The slot of a tagged parameter; None for anything else, and while it is frozen."""
        # Not isinstance: a parameter's class answers that in Python, and slowly.
        tagged = type(value) is TaggedParameter and value.requires_grad
        return self.slots.get(id(value)) if tagged else None

    def collapse(self, loss: Tensor) -> Tensor:
        """A loss that the rows seem to share, as the mean over the rows' own."""
        return loss.rows.mean(0) if isinstance(loss, RowTensor) else loss

    def roots(self, tensors: Any) -> Any:
        """What ``loss.backward`` or `torch.autograd.backward` is to start from."""
        for tensor in tree_flatten(tensors)[0]:
            if isinstance(tensor, RowTensor) and tensor.rows.dim() > 1:
                tagging.refuse_shared_gradient(tensor)
        return tree_map_only(RowTensor, self.collapse, tensors)

    # ------------------------------------------------------------------ what rules need
    observing = False

    def rows_of(self, name: str, func: Callable[..., Any], tensor: Tensor) -> RowDim | None:
        """Where the rows of ``tensor`` lie when it meets parameter ``name`` in ``func``.

        None when all rows share it: the rule then leaves the call to `generic`.
        """
        case = func, name, tensor.shape, self.rows
        known = self.layouts.places.get(case, _UNKNOWN)
        if known is not _UNKNOWN and type(tensor) is Tensor:
            return known  # type: ignore[return-value]
        if isinstance(tensor, RowTensor | TaggedParameter) or not tensor.dim():
            return None
        if self.rows == 1:
            return RowDim(0, flattened=True)
        if self.observing:
            self.observe(("rule", name_of(func), name), [tensor], [])
            return self._found_rows(name, func, tensor)
        found = self.layouts.places[case] = self._found_rows(name, func, tensor)
        return found

    def _found_rows(self, name: str, func: Callable[..., Any], tensor: Tensor) -> RowDim | None:
        signature = self.layouts.find(("rule", name_of(func), name), [tensor], self.rows)
        if signature is not None:
            return signature.inputs[0].rows
        return None if self.observing else default_rows(tensor, self.rows, may_flatten=True)

    def observe(self, key: object, leaves: list[Any], outputs: list[Any]) -> None:
        """A probe notes the shapes of a call; a capture never asks."""
        raise AssertionError("only a probe observes")

    def row_tensor(self, rows: Tensor, names: tuple[str, ...]) -> RowTensor:
        """What the caller sees of an expression of parameters."""
        return RowTensor(rows, names)

    def by_row(self, tensor: Tensor, where: RowDim) -> Tensor:
        """``tensor`` with its rows first: ``[B, M, *rest]``, a view where possible."""
        if where.dim:
            tensor = tensor.movedim(where.dim, 0)
        return tensor.reshape(self.rows, -1, *tensor.shape[1:])

    def positions(self, tensor: Tensor, where: RowDim) -> Tensor:
        """``tensor`` as ``[B, M, d]``: all entries of a row side by side."""
        if not where.dim and tensor.dim() == 3 and tensor.shape[0] == self.rows:
            return tensor
        return self.by_row(tensor, where).flatten(1, -2)

    def anchor(self, device: torch.device) -> Tensor:
        """A scalar that requires gradients, so that a first layer's output does."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]

    # ------------------------------------------------------------------ what backward delivers
    def add_outer(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """Gradient ``left^T right`` per row, in the cheaper of its two forms."""
        if not self._wanted(slot.name):
            return
        left, right = left.detach(), right.detach()
        if self.instantiates(left.shape[1], left.shape[2], right.shape[2]):
            self._add_dense(slot, torch.bmm(left.mT, right))
        elif self.revisit is None or not self.revisit.leave(slot.name, Outer(left, right)):
            slot.contributions.append(Outer(left, right))

    def copy_of(self, slot: Slot, dtype: torch.dtype) -> Tensor | None:
        """``[B, *shape]`` in ``dtype``: a copy per row of a small parameter, a part of the graph.

        That of a matrix is transposed.

        None for a large one, and where gradients are not to lie in a buffer.
        """
        parameter = slot.parameter
        largest = LARGEST_ON_CPU if parameter.device.type == "cpu" else LARGEST
        if not self._buffering or parameter.numel() > largest:
            return None
        kind = parameter.device, parameter.dtype, dtype
        if kind not in self._copies:
            with torch._C.DisableTorchFunctionSubclass():
                small = self.casts.small(*kind)
            self._copies[kind] = RowCopies(
                {self.slots[key].name: value for key, value in small.items()},
                rows=self.rows,
                anchor=self.anchor(parameter.device),
                admit=self._require_armed,
            )
        return self._copies[kind][slot.name]

    def note_product(self, x: Tensor, slot: Slot, dtype: torch.dtype) -> None:
        """A use of ``slot`` turned out to be the product of ``x [B, M, in]`` with its copies."""
        if self._buffering:
            self.layouts.products.add((slot.name, x.shape, dtype, self.rows))

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copies that ``x`` is to be multiplied by, where the same use was noted before.

        A forward of a large model comes here hundreds of times, again where it is recomputed, and
        a GPU with few rows waits for it.
        """
        slot = self.slots.get(id(weight))
        if (
            slot is None
            or (slot.name, x.shape, dtype, self.rows) not in self.layouts.products
            or not weight.requires_grad
        ):
            return None
        matrix = self._matrices.get((slot.name, dtype))
        if matrix is None:
            matrix = self.copy_of(slot, dtype)
            if matrix is not None:
                self._matrices[slot.name, dtype] = matrix
        return matrix

    def instantiates(self, positions: int, a: int, b: int) -> bool:
        """Whether a sum of ``positions`` outer products of ``a`` by ``b`` is kept as it is.

        Instantiated it takes ``a b`` numbers per row and no further product; as factors it takes
        ``positions (a + b)`` and a Gram product now and a weighted one later. The factors are kept
        when they are the smaller form.
        """
        return self.instantiate or a * b <= positions * (a + b)

    def add_lookup(self, slot: Slot, index: Tensor, values: Tensor) -> None:
        """Gradient with ``values`` added at the table rows ``index``."""
        if self._wanted(slot.name):
            slot.contributions.append(Lookup(index, values.detach()))

    def add_dense(self, slot: Slot, gradients: Tensor) -> None:
        """Gradients of all rows, ``[B, *shape]``."""
        if self._wanted(slot.name):
            self._add_dense(slot, gradients.detach())

    def _add_dense(self, slot: Slot, gradients: Tensor) -> None:
        gradients = gradients.reshape(self.rows, *slot.parameter.shape)
        if slot.contributions and isinstance(slot.contributions[-1], Dense):
            gradients = slot.contributions.pop().dense(slot.parameter.shape) + gradients
        slot.contributions.append(Dense(gradients))

    def anchor_of(self, slot: Slot | None, x: Tensor, rows: RowDim) -> Tensor:
        """The `anchor` for one use of a dense layer, its own if it may be left to `revisit`."""
        own = None
        if slot is not None and self.revisit is not None and not self.armed:
            positions, shape = self.positions(x, rows).shape[1], slot.parameter.shape
            if not self.instantiates(positions, *shape):
                size = self.rows * positions * sum(shape) * x.element_size()
                own = self.revisit.anchor(slot.name, x.device, size)
        return self.anchor(x.device) if own is None else own

    def _wanted(self, name: str) -> bool:
        """Whether a gradient that comes now is new; raises where none may come."""
        self._require_armed(name)
        if self.revisit is None or not self.revisit.revisiting:
            return True
        return self.revisit.left(name)

    def _require_armed(self, name: str) -> None:
        if not self.armed:
            raise UnsupportedOperationError(
                must="gradients are computed in the step's own backward only",
                found=f"a backward inside the forward reached {name} (torch.autograd.grad?)",
                cost="a gradient of a gradient would be counted as an example's gradient",
                remedy="compute inner gradients with frozen parameters or before the private step",
            )


def _require_plain(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise ConfigurationError(
            must="every trainable parameter is a plain torch.nn.Parameter",
            found=f"{name} is a {type(parameter).__name__}",
            cost="its operations could not be seen, so its gradient could not be clipped",
            remedy="run a lazy module once before training, or freeze a quantised parameter",
        )
    if parameter.is_complex():
        raise ConfigurationError(
            must="every trainable parameter is real",
            found=f"{name} has the type {parameter.dtype}",
            cost="norms, noise and rounding are those of real numbers",
            remedy="keep a real parameter of shape [..., 2] and use torch.view_as_complex(it)",
        )
