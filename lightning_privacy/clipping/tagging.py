"""Tags: where an operation on a trainable parameter becomes visible to the active capture.

While a capture is active each trainable parameter's class is `TaggedParameter`, whose
``__torch_function__`` sees every operation that the parameter enters, in the forward and in a
checkpoint's recomputation (which runs in autograd's threads, where modules' hooks and
``TorchFunctionMode`` do not reach). No module and no optimizer is touched, and the class is
switched back afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.clipping.capture import Capture

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
_BACKWARDS = (Tensor.backward, torch.autograd.backward)

# What a function is, by the function: a forward asks a parameter for its type at every use.
_known_queries: dict[Callable[..., Any], bool] = {}


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
                self.register_post_accumulate_grad_hook(refuse_shared_gradient)  # type: ignore[no-untyped-call]
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


def activate(capture: Capture) -> None:
    """Let ``capture`` see what tagged parameters enter. Only one can be active in a process."""
    global _active  # noqa: PLW0603 - autograd's threads look here
    if _active is not None:
        raise GuaranteeError(
            must="one micro-batch is captured at a time",
            found="a second capture was opened inside the first",
            cost="gradients of both would be mixed",
            remedy="do not nest private training steps",
        )
    _active = capture


def deactivate(capture: Capture) -> bool:
    """The reverse; False where ``capture`` is not the active one."""
    global _active  # noqa: PLW0603 - autograd's threads look here
    if _active is not capture:
        return False
    _active = None
    return True


def _intercept(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    capture = _active
    if capture is not None and func in _BACKWARDS:
        # Also with gradients off, where reentrant checkpointing runs a block's own backward; and
        # with the tags in force, which the computation of a block's forward again must meet.
        with torch._C.DisableTorchFunctionSubclass():
            roots = capture.roots(args[0])
        return func(roots, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if capture is None or not torch.is_grad_enabled() or _is_query(func, args, kwargs):
            if len(args) != 1 or kwargs or type(args[0]) is not TaggedParameter:
                args, kwargs = tree_map_only(RowTensor, _plain, (args, kwargs))
            return func(*args, **kwargs)
        return capture.apply(func, args, kwargs)


def _is_query(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    known = _known_queries.get(func)
    if known is None:
        name = getattr(func, "__name__", "")
        if name == "type":
            # Without a type it asks, with one it converts.
            return len(args) == 1 and not kwargs
        if name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
            known = attribute not in _DIFFERENTIABLE_ATTRIBUTES
        else:
            known = name in _QUERIES or name == "__set__"
        _known_queries[func] = known
    return known


def refuse_shared_gradient(tensor: Tensor) -> None:
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
