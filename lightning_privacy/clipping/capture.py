"""Per-example gradients, captured where a parameter enters an operation.

While a capture is active each trainable parameter's class is `TaggedParameter`, whose
``__torch_function__`` sees every operation that the parameter enters, in the forward and in a
checkpoint's recomputation (which runs in autograd's threads, where modules' hooks and
``TorchFunctionMode`` do not reach). The operation is rewritten so that autograd delivers each row's
gradient to the capture and nothing to the parameter. No module and no optimizer is touched, and the
class is switched back afterwards.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_privacy.clipping import generic
from lightning_privacy.clipping.contributions import Contribution, Dense, Lookup, Outer, combine
from lightning_privacy.clipping.layout import Layouts, RowDim, default_rows
from lightning_privacy.clipping.registry import RULES, name_of
from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# Not thread-local: autograd's threads must see it too.
_active: Capture | None = None

# Questions about a tensor, and answers that carry no gradient.
_QUERIES = frozenset(
    "size dim ndimension numel nelement stride is_contiguous storage_offset data_ptr element_size "
    "get_device is_floating_point is_complex is_signed __len__ __repr__ __format__ __hash__ "
    "__float__ __int__ __index__ __complex__ equal allclose "
    "requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad is_same_size "
    "detach item tolist storage untyped_storage zeros_like ones_like empty_like full_like "
    "rand_like randn_like new_zeros new_ones new_empty new_full new_tensor is_pinned is_nonzero "
    "__bool__ is_inference has_names __dlpack__ __dlpack_device__ __array__ numpy __reduce_ex__ "
    "is_set_to can_cast result_type __deepcopy__".split()
)
_DIFFERENTIABLE_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag"})


class TaggedParameter(nn.Parameter):
    """A trainable parameter while a capture is active. Never constructed: a class is switched."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _intercept(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain parameter: the tag belongs to the one that is captured."""
        copied: nn.Parameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.__class__ = nn.Parameter
        return copied


class RowTensor(Tensor):
    """Looks like a tensor that all rows share, but holds a copy per row: ``rows [B, *shape]``.

    It stands for an expression of parameters (a slice, a transpose, a position table looked up),
    whose gradient has to be kept apart by row until it meets the batch.
    """

    rows: Tensor
    sources: tuple[str, ...]

    @staticmethod
    def __new__(cls, rows: Tensor, sources: tuple[str, ...]) -> RowTensor:  # noqa: PYI034
        """Wrap ``rows [B, *shape]``; ``sources`` names the parameters it comes from."""
        self: RowTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            rows.shape[1:],
            dtype=rows.dtype,
            device=rows.device,
            requires_grad=rows.requires_grad,
        )
        self.rows, self.sources = rows, sources
        if rows.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_post_accumulate_grad_hook(_refuse_shared_gradient)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _intercept(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedOperationError(
            must="operations on expressions of trainable parameters pass the capture",
            found=f"{func} reached a parameter expression from compiled code",
            cost="its gradient could not be kept apart by example",
            remedy="compute this operation in Python, or freeze the parameters in it",
        )


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

    Raises:
        ConfigurationError: a parameter is not a plain `torch.nn.Parameter`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        rows: int,
        layouts: Layouts | None = None,
        instantiate: bool = False,
    ) -> None:
        self.rows = rows
        self.layouts = layouts if layouts is not None else Layouts()
        self.instantiate = instantiate
        self.armed = False
        self.slots = {id(p): Slot(name, p) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            _require_plain(name, parameter)
        self._anchors: dict[torch.device, Tensor] = {}
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}

    # ------------------------------------------------------------------ life of a capture
    def open(self) -> None:
        """Tag the parameters. Only one capture can be open in a process."""
        global _active  # noqa: PLW0603 - autograd's threads look here
        if _active is not None:
            raise GuaranteeError(
                must="one micro-batch is captured at a time",
                found="a second capture was opened inside the first",
                cost="gradients of both would be mixed",
                remedy="do not nest private training steps",
            )
        _active = self
        for slot in self.slots.values():
            slot.parameter.__class__ = TaggedParameter

    def close(self) -> None:
        """Give the parameters their own class back. May be called at any time, twice too."""
        global _active  # noqa: PLW0603 - autograd's threads look here
        if _active is self:
            _active = None
            for slot in self.slots.values():
                slot.parameter.__class__ = nn.Parameter
        self._casts.clear()
        self._anchors.clear()

    @contextmanager
    def opened(self) -> Iterator[Capture]:
        """`open` and, whatever happens, `close`."""
        self.open()
        try:
            yield self
        finally:
            self.close()

    def collect(self) -> dict[str, list[Contribution]]:
        """After backward: contributions by parameter name; parameters without any are absent."""
        found = {slot.name: slot.collect() for slot in self.slots.values()}
        return {name: items for name, items in found.items() if items}

    # ------------------------------------------------------------------ dispatch
    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``, rewritten if it touches a tagged parameter."""
        rule = RULES.get(func)
        if rule is not None:
            result = rule(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        return generic.apply(self, func, args, kwargs)

    def slot(self, value: object) -> Slot | None:
        """The slot of a tagged parameter; None for anything else, and while it is frozen."""
        tagged = isinstance(value, TaggedParameter) and value.requires_grad
        return self.slots.get(id(value)) if tagged else None

    def collapse(self, loss: Tensor) -> Tensor:
        """A loss that the rows seem to share, as the mean over the rows' own."""
        return loss.rows.mean(0) if isinstance(loss, RowTensor) else loss

    def roots(self, tensors: Any) -> Any:
        """What ``loss.backward`` or `torch.autograd.backward` is to start from."""
        for tensor in tree_flatten(tensors)[0]:
            if isinstance(tensor, RowTensor) and tensor.rows.dim() > 1:
                _refuse_shared_gradient(tensor)
        return tree_map_only(RowTensor, self.collapse, tensors)

    # ------------------------------------------------------------------ what rules need
    observing = False

    def rows_of(self, name: str, func: Callable[..., Any], tensor: Tensor) -> RowDim | None:
        """Where the rows of ``tensor`` lie when it meets parameter ``name`` in ``func``.

        None when all rows share it: the rule then leaves the call to `generic`.
        """
        if isinstance(tensor, RowTensor | TaggedParameter) or not tensor.dim():
            return None
        if self.rows == 1:
            return RowDim(0, flattened=True)
        key = ("rule", name_of(func), name)
        if self.observing:
            self.observe(key, [tensor], [])
        signature = self.layouts.find(key, [tensor], self.rows)
        if signature is not None:
            return signature.inputs[0].rows
        if self.observing:
            return None
        return default_rows(tensor, self.rows, may_flatten=True)

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

    def anchor(self, device: torch.device) -> Tensor:
        """A scalar that requires gradients, so that a first layer's output does."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` detached and in ``dtype``; one copy per micro-batch for all its uses."""
        if tensor.dtype == dtype:
            return tensor.detach()
        key = (id(tensor), dtype)
        if key not in self._casts:
            self._casts[key] = tensor.detach().to(dtype)
        return self._casts[key]

    # ------------------------------------------------------------------ what backward delivers
    def add_outer(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """Gradient ``left^T right`` per row, in the cheaper of its two forms."""
        self._require_armed(slot)
        left, right = left.detach(), right.detach()
        if self.instantiates(left, left.shape[1], left.shape[2], right.shape[2]):
            self._add_dense(slot, torch.bmm(left.mT, right))
        else:
            slot.contributions.append(Outer(left, right))

    def instantiates(self, like: Tensor, positions: int, a: int, b: int) -> bool:
        """Whether a sum of ``positions`` outer products of ``a`` by ``b`` is kept as it is.

        Instantiated it takes ``a b`` numbers per row and no further product; as factors it takes
        ``positions (a + b)`` and a Gram product now and a weighted one later. The factors are kept
        when they are the smaller form; on the CPU, where products cost more than memory, when they
        are less than half as large.
        """
        allowance = 1 if like.is_cuda else 2
        return self.instantiate or a * b <= allowance * positions * (a + b)

    def add_lookup(self, slot: Slot, index: Tensor, values: Tensor) -> None:
        """Gradient with ``values`` added at the table rows ``index``."""
        self._require_armed(slot)
        slot.contributions.append(Lookup(index, values.detach()))

    def add_dense(self, slot: Slot, gradients: Tensor) -> None:
        """Gradients of all rows, ``[B, *shape]``."""
        self._require_armed(slot)
        self._add_dense(slot, gradients.detach())

    def _add_dense(self, slot: Slot, gradients: Tensor) -> None:
        gradients = gradients.reshape(self.rows, *slot.parameter.shape)
        if slot.contributions and isinstance(slot.contributions[-1], Dense):
            gradients = slot.contributions.pop().dense(slot.parameter.shape) + gradients
        slot.contributions.append(Dense(gradients))

    def _require_armed(self, slot: Slot) -> None:
        if not self.armed:
            raise UnsupportedOperationError(
                must="gradients are computed in the step's own backward only",
                found=f"a backward inside the forward reached {slot.name} (torch.autograd.grad?)",
                cost="a gradient of a gradient would be counted as an example's gradient",
                remedy="compute inner gradients with frozen parameters or before the private step",
            )


def _intercept(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    capture = _active
    if capture is not None and func in (Tensor.backward, torch.autograd.backward):
        # Also with gradients off, where reentrant checkpointing runs a block's own backward; and
        # with the tags in force, which the computation of a block's forward again must meet.
        with torch._C.DisableTorchFunctionSubclass():
            roots = capture.roots(args[0])
        return func(roots, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if capture is None or not torch.is_grad_enabled() or _is_query(func, args, kwargs):
            args, kwargs = tree_map_only(RowTensor, _plain, (args, kwargs))
            return func(*args, **kwargs)
        return capture.apply(func, args, kwargs)


def _is_query(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "type":
        # Without a type it asks, with one it converts.
        return len(args) == 1 and not kwargs
    if name == "__get__":
        attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        return attribute not in _DIFFERENTIABLE_ATTRIBUTES
    return name in _QUERIES or name == "__set__"


def _refuse_shared_gradient(tensor: Tensor) -> None:
    """A gradient of all rows together arrived at what only looks shared: it would be lost."""
    names = ", ".join(getattr(tensor, "sources", ()))
    raise GuaranteeError(
        must="operations on expressions of trainable parameters pass the capture",
        found=f"a gradient for an expression of {names} that is not kept apart by example: a "
        "custom autograd.Function or reentrant checkpointing took it",
        cost="these parameters would silently miss that part of their gradient",
        remedy="call the operation in plain PyTorch, use use_reentrant=False, or freeze the "
        "parameters",
    )


def _plain(tensor: RowTensor) -> Tensor:
    """The shared value of all rows, without history but with the same answers to questions."""
    value = tensor.rows.detach()[0]
    return value.requires_grad_() if tensor.rows.requires_grad else value


def _require_plain(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise ConfigurationError(
            must="every trainable parameter is a plain torch.nn.Parameter",
            found=f"{name} is a {type(parameter).__name__}",
            cost="its operations could not be seen, so its gradient could not be clipped",
            remedy="run a lazy module once before training, or freeze a quantised parameter",
        )


def leaves_of(args: object) -> list[object]:
    """The flattened arguments of a call."""
    return tree_flatten(args)[0]
