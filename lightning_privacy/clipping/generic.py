"""The rule for operations without a rule: `torch.func.vmap` over the rows of the batch.

Row ``i`` of the result is what the operation gives for a batch of that one row and the parameter
copy of row ``i``. Rows keep a dimension of size one inside the map, so that ``dim=`` arguments mean
what the caller meant. The map is exact or it fails; a failure becomes a refusal that names the
operation, the parameters and the remedy.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_privacy.clipping.layout import RowDim, Signature, default_rows
from lightning_privacy.clipping.registry import name_of
from lightning_privacy.errors import PrivacyError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_privacy.clipping.capture import Capture

# How an operation that cannot be mapped fails. Others are not about it: checkpointing
# ends its second forward by one.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)

_REMEDIES = {
    "lstm": "replace nn.LSTM by opacus.layers.DPLSTM, which is built from linear layers",
    "gru": "replace nn.GRU by opacus.layers.DPGRU, which is built from linear layers",
    "rnn_tanh": "replace nn.RNN by opacus.layers.DPRNN, which is built from linear layers",
    "rnn_relu": "replace nn.RNN by opacus.layers.DPRNN, which is built from linear layers",
    "batch_norm": "replace BatchNorm by GroupNorm, or freeze it and keep it in eval mode",
}


def apply(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``func`` once per row, all rows at once.

    Raises:
        UnsupportedOperationError: the operation cannot be mapped over rows, mixes them, or changes
            a parameter expression in place.
    """
    leaves, spec = tree_flatten((args, kwargs))
    call = _Call(capture, func, leaves, spec)
    if not call.names:
        return func(*args, **kwargs)
    if func is torch.autograd.grad:
        raise call.refusal("an inner gradient, which is not kept apart by example")
    if capture.rows == 1:
        return call.run([_only_row(capture, leaf) for leaf in leaves])
    if capture.observing:
        return _observed(call)
    signature = capture.layouts.find(call.layout, leaves, capture.rows)
    _refuse_in_place(call)
    try:
        return _mapped(call, signature)
    except PrivacyError:
        raise
    except _FAILURES as error:
        raise call.refusal(f"{type(error).__name__}: {error}") from error


def _observed(call: _Call) -> Any:
    """In a probe: mapped as far as is known by now, and noted in any case.

    What is known may be another use of the same operation, which this one only resembles: nothing
    is refused here, and the next round knows better.
    """
    capture, result = call.capture, None
    try:
        signature = capture.layouts.find(call.layout, call.leaves, capture.rows)
        if signature is not None:
            _refuse_in_place(call)
            result = _mapped(call, signature)
    except _FAILURES:
        result = None  # the capture itself will refuse, and say why
    if result is None:
        result = call.run([_untagged(leaf) for leaf in call.leaves])
    capture.observe(call.layout, call.leaves, tree_flatten(result)[0])
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    capture: Capture
    func: Callable[..., Any]
    leaves: list[Any]
    spec: Any

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in this call, by name, in order of the arguments."""
        found: list[str] = []
        for leaf in self.leaves:
            slot = self.capture.slot(leaf)
            found.extend((slot.name,) if slot is not None else getattr(leaf, "sources", ()))
        return tuple(dict.fromkeys(found)) if any(map(self.holds_rows, self.leaves)) else ()

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return name_of(self.func), self.names

    @property
    def layout(self) -> object:
        """What `Layouts` knows this use by: with the places where parameters enter."""
        places = tuple(map(self.holds_rows, self.leaves))
        return ("generic", *self.key, places)

    def holds_rows(self, leaf: object) -> bool:
        """Whether ``leaf`` is a tagged parameter or an expression of some."""
        return self.capture.slot(leaf) is not None or _rows(leaf) is not None

    def run(self, leaves: list[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)

    def refusal(self, why: str) -> UnsupportedOperationError:
        name, parameters = self.key
        short = name.rpartition(".")[2]
        return UnsupportedOperationError(
            must="every operation on a trainable parameter has a per-example rule or can be mapped "
            "over the rows of the batch",
            found=f"{name} on {', '.join(parameters)}: {why[:600]}",
            cost="the gradient of each example could not be clipped",
            remedy=_REMEDIES.get(
                short, "freeze these parameters, or write the operation so that rows come first"
            ),
        )


def _mapped(call: _Call, signature: Signature | None) -> Any:
    learnt = signature is not None
    known = [leaf.rows for leaf in signature.inputs] if signature else [None] * len(call.leaves)
    prepared = [
        _prepared(call, leaf, where, learnt=learnt)
        for leaf, where in zip(call.leaves, known, strict=True)
    ]
    values, dims = [value for value, _ in prepared], [dim for _, dim in prepared]
    mapped = [i for i, dim in enumerate(dims) if dim is not None]

    def one_row(*tensors: Tensor) -> Any:
        leaves = list(values)
        for i, tensor in zip(mapped, tensors, strict=True):
            leaves[i] = tensor
        result = call.run(leaves)
        return leaves[0] if in_place else result

    in_place = _is_in_place(call.func)
    in_dims = tuple(dims[i] for i in mapped)
    with _no_fallback_warning():
        result = torch.func.vmap(one_row, in_dims=in_dims, randomness="different")(
            *[values[i] for i in mapped]
        )
    if in_place:
        return call.leaves[0]
    meets_rows = _meets_rows(call, values, dims)
    outputs, spec = tree_flatten(result)
    places = [leaf.rows for leaf in signature.outputs] if signature else [None] * len(outputs)
    if meets_rows and not learnt:
        places = [_leading(output) for output in outputs]
    return tree_unflatten(
        [
            _assembled(call, output, place, meets_rows=meets_rows)
            for output, place in zip(outputs, places, strict=True)
        ],
        spec,
    )


def _meets_rows(call: _Call, values: list[Any], dims: list[int | None]) -> bool:
    """Whether the batch takes part: as a tensor, or as a size such as that of ``expand``."""
    return any(
        (isinstance(leaf, Tensor) and dim is not None and not call.holds_rows(leaf))
        or (isinstance(leaf, int) and value is not leaf)
        for leaf, value, dim in zip(call.leaves, values, dims, strict=True)
    )


def _leading(output: Any) -> RowDim | None:
    """Where the rows are by convention, in a mapped result ``[B, ...]``."""
    mapped = isinstance(output, Tensor) and output.dim() > 1
    return RowDim(0, flattened=True) if mapped else None


def _prepared(
    call: _Call, leaf: Any, known: RowDim | None, *, learnt: bool
) -> tuple[Any, int | None]:
    """The leaf as the map needs it, and the dimension to map over."""
    capture = call.capture
    slot = capture.slot(leaf)
    if slot is not None:
        return slot.leaf(capture.rows), 0
    held = _rows(leaf)
    if held is not None:
        return held, 0
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        if known is None:
            return leaf, None
        return known.multiplicity(leaf, capture.rows), None
    if not isinstance(leaf, Tensor):
        return leaf, None
    if not leaf.dim():
        return _shared(call, leaf), None
    if not learnt:
        known = default_rows(leaf, capture.rows, may_flatten=False)
        if known is None:
            raise call.refusal(f"an argument of shape {tuple(leaf.shape)} is not led by the rows")
    if known is None:
        return _shared(call, leaf), None
    return leaf.unflatten(known.dim, (capture.rows, -1)), known.dim


def _shared(call: _Call, leaf: Tensor) -> Tensor:
    """What all rows share must not come from the rows; a mean over them may only be added to."""
    if leaf.requires_grad and (leaf.dim() or getattr(call.func, "__name__", "") not in _ADDITIVE):
        raise call.refusal(
            "an argument that all rows share was computed from the rows (a mean over the batch): "
            "apply the parameters to each example's own value first, then average"
        )
    return leaf


# A penalty on parameters is added to a loss that is averaged already.
_ADDITIVE = frozenset({"add", "sub", "rsub", "__add__", "__radd__", "__sub__", "__rsub__", "stack"})


def _assembled(call: _Call, output: Any, known: RowDim | None, *, meets_rows: bool) -> Any:
    """One mapped result ``[B, ...]`` as the caller expects it."""
    if not isinstance(output, Tensor):
        return output
    if known is not None:
        return output.movedim(0, known.dim).flatten(known.dim, known.dim + 1)
    if meets_rows:
        raise call.refusal("its result has no dimension for the rows: it reduces over the batch")
    return call.capture.row_tensor(output, call.names)


def _refuse_in_place(call: _Call) -> None:
    if tree_unflatten(call.leaves, call.spec)[1].get("out") is not None:
        raise call.refusal("out= is not supported")
    if _is_in_place(call.func) and call.holds_rows(call.leaves[0]):
        raise call.refusal("a parameter or an expression of parameters is changed in place")


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = frozenset({"__invert__", "__index__", "__int__"})


@contextmanager
def _no_fallback_warning() -> Iterator[None]:
    """A slow batching rule is exact; torch's advice to report it is not for our users."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def _only_row(capture: Capture, leaf: Any) -> Any:
    slot = capture.slot(leaf)
    return slot.leaf(1)[0] if slot is not None else leaf


def _rows(leaf: object) -> Tensor | None:
    return getattr(leaf, "rows", None) if isinstance(leaf, Tensor) else None


def _untagged(leaf: Any) -> Any:
    held = _rows(leaf)
    return held[0] if held is not None else leaf
