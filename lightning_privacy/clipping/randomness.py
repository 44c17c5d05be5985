"""Run a forward without random decisions, and leave no trace of it.

Checks compare a row in a batch with the same row alone. Dropout would differ between the two by
chance, so during a check every random operation gives what does not depend on chance.
"""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ATEN = torch.ops.aten
# In-place and factory draws, and the constant that each becomes.
_CONSTANTS = {
    "bernoulli_": 1.0,
    "bernoulli": 1.0,
    "uniform_": 0.5,
    "uniform": 0.5,
    "normal_": 0.0,
    "exponential_": 1.0,
    "exponential": 1.0,
    "geometric_": 1.0,
    "cauchy_": 0.0,
    "log_normal_": 1.0,
    "rand": 0.5,
    "rand_like": 0.5,
    "randn": 0.0,
    "randn_like": 0.0,
    "normal": 0.0,
}
# Draws whose value must fit their arguments.
_VALUES: dict[str, Callable[[dict[str, Any]], Tensor | float]] = {
    "randint": lambda call: call.get("low", 0),
    "randint_like": lambda call: call.get("low", 0),
    "random_": lambda call: call.get("from", 0),
    "multinomial": lambda call: call["self"].argmax(-1, keepdim=True),
    "poisson": lambda call: call["self"],
    "binomial": lambda call: call["count"] * call["prob"],
    "_standard_gamma": lambda call: call["self"],
    "_sample_dirichlet": lambda call: call["self"] / call["self"].sum(-1, keepdim=True),
    # Never the identity: whoever mixes the rows of a batch must be seen to do so.
    "randperm": lambda call: torch.arange(call["n"]).roll(-1),
}


class without_randomness(TorchDispatchMode):  # noqa: N801 - reads as a statement
    """Context in which dropout keeps everything and random draws are constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace one operation, or run it."""
        kwargs = kwargs or {}
        if func is _ATEN.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        name = func._schema.name.removeprefix("aten::")
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names and name.startswith("_"):
            args, kwargs = _with(names, args, kwargs, "dropout_p", 0.0)
        if name.startswith("rrelu_with_noise"):
            args, kwargs = _with(names, args, kwargs, "training", False)
        result = func(*args, **kwargs)
        if name in _CONSTANTS and isinstance(result, Tensor):
            result.fill_(_CONSTANTS[name])
        elif name in _VALUES:
            call = dict(zip(names, args, strict=False)) | kwargs
            result.copy_(torch.as_tensor(_VALUES[name](call)))
        return result


def _with(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with one of them replaced."""
    position = names.index(name)
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


@contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients and the random states of torch, Python and numpy afterwards."""
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    gradients = {name: p.grad for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None  # otherwise a backward would add to the tensor that is restored
    devices = sorted({b.device for b in module.parameters() if b.is_cuda}, key=str)
    python, numpy = random.getstate(), sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for part, name, buffer, value in buffers:
                _restore(part, name, buffer, value)
            for name, parameter in module.named_parameters():
                parameter.grad = gradients.get(name)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(legacy)


def _restore(part: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    # The module may hold another tensor by now; and one without memory of its own for each element
    # (an expanded constant) cannot be written to, nor could the forward have.
    part._buffers[name] = buffer
    if not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)
