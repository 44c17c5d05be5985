"""What must never happen during private training, watched for.

`LeakGuard`: a gradient that reaches a covered parameter other than through the private step.
`StateGuard`: a persistent buffer or a parameter that changes other than by the private step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from lightning_privacy.errors import GuaranteeError


class LeakGuard:
    """Raises as soon as autograd delivers a raw gradient to one of ``parameters``.

    Every covered use of a parameter is rewritten so that its own gradient stays empty. One that
    arrives all the same is not clipped (a custom autograd function, compiled code): it is dropped
    and the step ends with an error that names the parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_refusal(name))
            for name, parameter in parameters.items()
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @classmethod
    @contextmanager
    def watching(cls, parameters: Mapping[str, nn.Parameter]) -> Iterator[LeakGuard]:
        """Watch within a ``with`` block."""
        guard = cls(parameters)
        try:
            yield guard
        finally:
            guard.remove()


def _refusal(name: str) -> Callable[[Tensor], None]:
    def refuse(parameter: Tensor) -> None:
        parameter.grad = None
        raise GuaranteeError(
            must="no gradient reaches a trainable parameter except clipped and noised",
            found=f"autograd delivered a raw gradient to {name}: it was used by code that the "
            "capture cannot see, such as a custom autograd.Function, or a backward ran outside "
            "the private step",
            cost="that gradient would be neither clipped nor noised: no guarantee",
            remedy="call the operation on the parameter in plain PyTorch, or freeze the parameter",
        )

    return refuse


class StateGuard:
    """Notices writes to persistent buffers and parameters between two moments.

    What a forward writes into a persistent buffer (batch statistics, moving averages, codebooks,
    router counts) leaves the run in the checkpoint without noise.

    Args:
        module: the module to watch.
        independent: names or patterns (``fnmatch``) of buffers and parameters declared to be
            independent of the data.
    """

    def __init__(self, module: nn.Module, independent: Sequence[str] = ()) -> None:
        self._module = module
        self._independent = tuple(independent)
        self._versions: dict[str, tuple[int, int]] = {}
        self._values: dict[str, Tensor] = {}
        self._held: list[Tensor] = []

    def snapshot(self, *, values: bool = False) -> None:
        """Remember the present state.

        Args:
            values: compare contents too, not only version counters: a write through ``.data`` does
                not move the counter. Costs a pass over the module's memory.
        """
        state = self._watched()
        # Memory that is held here cannot be given to a tensor that replaces another.
        self._held = [tensor.detach() for tensor in state.values()]
        self._versions = {name: _version(tensor) for name, tensor in state.items()}
        self._values = {name: _fingerprint(tensor) for name, tensor in state.items()} if values else {}

    def verify(self, moment: str) -> None:
        """Compare with the last `snapshot`.

        Raises:
            GuaranteeError: naming every buffer and parameter that changed.
        """
        state = self._watched()
        changed = [name for name, seen in self._versions.items() if name not in state]
        for name, tensor in state.items():
            if name not in self._versions or _version(tensor) != self._versions[name]:
                changed.append(name)
            elif name in self._values and not torch.equal(_fingerprint(tensor), self._values[name]):
                changed.append(name)
        if changed:
            shown = ", ".join(sorted(changed)[:8])
            raise GuaranteeError(
                must="between private optimizer steps no persistent buffer or parameter changes",
                found=f"changed {moment}: {shown}",
                cost="what a forward writes there leaves the run in the checkpoint without noise, "
                "and no epsilon covers it",
                remedy="remove the update (for BatchNorm: GroupNorm), register the buffer with "
                "persistent=False, or, if it does not depend on the data, name it in "
                "independent_buffers",
            )

    def _watched(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self._module.named_parameters())
        for prefix, module in self._module.named_modules():
            transient = module._non_persistent_buffers_set
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in transient:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
        return {
            name: tensor
            for name, tensor in found.items()
            if not any(fnmatch(name, pattern) for pattern in self._independent)
        }


def _version(tensor: Tensor) -> tuple[int, int]:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.data_ptr(), tensor._version


def _fingerprint(tensor: Tensor) -> Tensor:
    """A sum over the tensor's bits that any single write changes; compared within one process."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        flat = tensor.detach().contiguous().flatten()
        if flat.is_complex():
            flat = torch.view_as_real(flat).flatten()
        if flat.dtype != torch.bool and flat.element_size() in _BITS:
            flat = flat.view(_BITS[flat.element_size()])
        flat = flat.to(torch.int64)
        # Odd weights have an inverse modulo 2**64: no difference of one element is lost.
        weights = torch.arange(1, 2 * flat.numel() + 1, 2, device=flat.device)
        return (flat * weights).sum()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
