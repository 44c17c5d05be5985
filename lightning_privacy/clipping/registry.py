"""Which rule rewrites which operation.

A rule is ``rule(capture, func, args, kwargs)``: it runs ``func`` so that autograd hands the capture
the gradient of every row, and returns what ``func`` would have returned. It answers
``NotImplemented`` for a call it does not cover; the general rule (`generic`) then takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_privacy.clipping.capture import Capture

Rule = Callable[["Capture", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Callable[..., Any], Rule] = {}


def operation(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register the decorated rule for ``functions`` (as ``__torch_function__`` reports them)."""

    def register(rule: Rule) -> Rule:
        for function in functions:
            if function in RULES:
                raise AssertionError(f"{function} has a rule already")
            RULES[function] = rule
        return rule

    return register


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, without its preparations where none is needed.

    A forward of a large model comes here hundreds of times, and what Python does then is what a
    GPU waits for.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, at no cost in an ordinary backward."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *gradients: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return run


def name_of(func: Callable[..., Any]) -> str:
    """The name under which a person knows ``func``, for error messages."""
    if getattr(func, "__name__", "") == "__get__":
        return f"Tensor.{getattr(func.__self__, '__name__', '?')}"  # type: ignore[attr-defined]
    return getattr(func, "__qualname__", "") or getattr(func, "__name__", "") or str(func)
