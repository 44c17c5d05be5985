"""A hidden state clipped and noised at one place, past which nothing else of an example may go.

For each example, with hidden state h of any shape and a bound C::

    seen above the cut  =  h · min(1, C / ‖h‖) + N(0, s²)

Two clipped states are at most 2C apart whatever the two contents are, so that each pass is one
release of a Gaussian mechanism of multiplier s / 2C (Du et al. 2023, arXiv 2309.06746, clip and
noise whole sequences alike). The gradient ends at the cut: nothing below learns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

# The product of a state and its factor is rounded; its norm still stays below the bound.
_BELOW = 1 - 1e-6


def clipped_states(states: Tensor, clip_norm: float) -> Tensor:
    """Each example's state, scaled down to the bound if it is longer.

    Args:
        states: ``[B, …]``.
        clip_norm: C > 0.

    Returns:
        float32 of the same shape, of norm <= C for each row; zeros for a row that is not finite.
    """
    flat = states.detach().flatten(1).float()
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    factors = (clip_norm * _BELOW / norms.clamp_min(1e-300)).clamp_max(1.0).float()
    finite = torch.isfinite(norms)
    clipped = torch.where(finite[:, None], flat * factors[:, None], 0.0)
    return clipped.view(states.shape)


class Cut:
    """The cut of one module's output.

    Args:
        name: of the module, for messages.
        clip_norm: C.
        draw: noise of the accounted size for a tensor, never the same twice; called once a pass.

    Attributes:
        calls: passes since `begin`.
    """

    def __init__(self, name: str, clip_norm: float, draw: Callable[[Tensor], Tensor]) -> None:
        self.name, self._clip_norm, self._draw = name, clip_norm, draw
        self.calls = self._waiting = 0
        self._last: Tensor | None = None

    def begin(self) -> None:
        """A batch begins."""
        self.calls = self._waiting = 0
        self._last = None

    def after_backward(self) -> None:
        """No recomputation will ask for the last pass any more."""
        self._waiting, self._last = 0, None

    def __call__(self, output: Any) -> Any:
        """What goes on above, in the place of a module's output.

        Args:
            output: a tensor ``[B, …]``, or a tuple whose only floating tensor is its first member.

        Returns:
            The same with that tensor clipped and noised, and without history.
        """
        if isinstance(output, tuple):
            others = [x for x in output[1:] if isinstance(x, Tensor) and x.is_floating_point()]
            if others or not output or not isinstance(output[0], Tensor):
                raise self._refusal(f"a tuple with {1 + len(others)} tensors")
            return (self(output[0]), *output[1:])
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
            raise self._refusal(type(output).__name__)
        return self._released(output)

    def _released(self, states: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:  # a checkpoint computes its block again
            if self._last is None or self._waiting != 1:
                raise UnsupportedOperationError(
                    must="under gradient checkpointing the cut is passed once before a backward",
                    found=f"{self._waiting} passes of {self.name} before its backward",
                    cost="a second release, or gradients of another one",
                    remedy="leave the block with the cut out of the checkpointing",
                )
            released = self._last
        else:
            clipped = clipped_states(states, self._clip_norm)
            released = self._last = (clipped + self._draw(clipped)).to(states.dtype)
            self.calls += 1
            self._waiting += 1
        # A leaf: blocks above that are checkpointed go by whether their input wants a gradient.
        return released.detach().requires_grad_(torch.is_grad_enabled())

    def _refusal(self, found: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            must="the module at the cut gives one tensor of numbers, examples first",
            found=f"{self.name} gives {found}",
            cost="a part of the hidden state would go past the cut",
            remedy="cut at a module with one output, such as an embedding or a block",
        )


class BypassCheck:
    """Sees whether the loss of one batch depends on anything from below the cut.

    While it is open, what modules with parameters compute before the cut, and the numbers that they
    get from outside, carry a mark that autograd follows. The cut takes it away. A loss that still
    carries it was reached by another way.

    Args:
        module: the whole module.
        cut: the module at the cut.
        name: of it.
    """

    def __init__(self, module: nn.Module, cut: nn.Module, name: str) -> None:
        self._name, self._below, self._passed = name, True, False
        self._marks: list[Tensor] = []
        # Held, so that no other tensor gets their memory meanwhile.
        self._integers: dict[tuple[int, torch.Size], Tensor] = {}
        self._mixing: str | None = None
        self._raw: list[Tensor] = []
        self._again: str | None = None
        self._handles: list[Any] = []
        self._handles.append(cut.register_forward_pre_hook(self._again_below))
        for part_name, part in module.named_modules():
            if isinstance(part, _BatchNorm) or any(True for _ in part.parameters(recurse=False)):
                self._handles.append(part.register_forward_pre_hook(self._enter(part_name)))
                if part is not cut:
                    self._handles.append(part.register_forward_hook(self._leave))

    def passed(self) -> None:
        """The cut was passed: what comes now is above it."""
        self._below, self._passed = False, True

    def close(self) -> None:
        """Take all hooks and marks away."""
        for handle in self._handles:
            handle.remove()
        for tensor in self._raw:
            tensor.requires_grad_(False)
        self._handles.clear()
        self._raw.clear()

    def require_none(self, loss: Tensor) -> None:
        """Refuse a loss that carries a mark.

        Args:
            loss: of the batch.

        Raises:
            GuaranteeError: something goes past the cut.
        """
        reached = loss.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad(
                loss, [*self._marks, *self._raw], retain_graph=True, allow_unused=True
            )
        )
        if self._mixing:
            raise GuaranteeError(
                must="the part below the cut treats examples one by one",
                found=f"{self._mixing}, a batch norm in training mode",
                cost="a change of one example moves the hidden states of all",
                remedy="keep the part below in evaluation mode",
            )
        if reached or self._again or not self._passed:
            found = "the loss depends on what was computed below"
            if self._again:
                found = f"{self._again} reads the input again above the cut"
            if not self._passed:
                found = "the cut was not passed at all"
            raise GuaranteeError(
                must=f"nothing of an example goes past {self._name} but its noised hidden state",
                found=found,
                cost="the observer would see the example without noise",
                remedy="cut behind whole blocks, residual connection included, or at the embedding",
            )

    def _again_below(self, *_: Any) -> None:
        self._below = True

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._below and isinstance(module, _BatchNorm) and module.training:
                self._mixing = name
            for tensor in inputs:
                if not isinstance(tensor, Tensor):
                    continue
                if not tensor.is_floating_point():
                    key = tensor.data_ptr(), tensor.shape
                    if self._below:
                        self._integers[key] = tensor
                    elif key in self._integers:
                        self._again = name
                elif self._below and tensor.is_leaf and not tensor.requires_grad:
                    self._raw.append(tensor.requires_grad_())

        return hook

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not self._below or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        mark = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        self._marks.append(mark)
        # The part below may run without gradients; what leaves it shall carry the mark anyway.
        with torch.enable_grad():
            return output + mark
