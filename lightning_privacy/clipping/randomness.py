"""Run a forward without random decisions, and leave no trace of it.

Checks compare a row in a batch with the same row alone. Dropout would differ between the two by
chance, so during a check every random operation gives what does not depend on chance. A decision by
a coin then always falls the same way; so a check is made with low constants and with high ones.
"""

from __future__ import annotations

import enum
import math
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ATEN = torch.ops.aten
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Draws(enum.IntEnum):
    """Which constants stand for random numbers; a coin falls one way with LOW, one with HIGH."""

    MIDDLE = 0
    LOW = 1
    HIGH = 2


# The three constants that a draw becomes.
_NORMAL, _UNIFORM, _KEEP = (0.0, -1.0, 1.0), (0.5, 0.02, 0.98), (1.0, 0.0, 1.0)
_CONSTANTS: dict[str, tuple[float, float, float]] = {
    "bernoulli_": _KEEP,
    "bernoulli": _KEEP,
    "uniform": _UNIFORM,
    "normal_": _NORMAL,
    "exponential_": (1.0, 0.02, 3.0),
    "exponential": (1.0, 0.02, 3.0),
    "geometric_": (1.0, 1.0, 3.0),
    "cauchy_": _NORMAL,
    "log_normal_": (1.0, 0.4, 2.7),
    "rand": _UNIFORM,
    "rand_like": _UNIFORM,
    "randn": _NORMAL,
    "randn_like": _NORMAL,
    "normal": _NORMAL,
}


def _integer(low: str, high: str) -> Callable[[dict[str, Any], Draws], int]:
    """The first integer of a range; with HIGH the last."""

    def value(call: dict[str, Any], draws: Draws) -> int:
        first, past = call.get(low) or 0, call.get(high)
        return past - 1 if draws is Draws.HIGH and past is not None else first

    return value


def _category(call: dict[str, Any], draws: Draws) -> Tensor:
    """The most likely category; with HIGH the least likely that is possible."""
    weights: Tensor = call["self"]
    if draws is Draws.HIGH:
        return weights.masked_fill(weights <= 0, math.inf).argmin(-1, keepdim=True)
    return weights.argmax(-1, keepdim=True)


def _uniform(call: dict[str, Any], draws: Draws) -> float:
    low, high = call.get("from", 0.0), call.get("to", 1.0)
    return float(low + _UNIFORM[draws] * (high - low))


# Draws whose value must fit their arguments.
_VALUES: dict[str, Callable[[dict[str, Any], Draws], Tensor | float]] = {
    "uniform_": _uniform,
    "randint": _integer("low", "high"),
    "randint_like": _integer("low", "high"),
    "random_": _integer("from", "to"),
    "multinomial": _category,
    "poisson": lambda call, draws: call["self"] + (0, 0, 1)[draws],
    "binomial": lambda call, draws: call["count"] * (call["prob"], 0, 1)[draws],
    "_standard_gamma": lambda call, draws: call["self"] * (1.0, 0.3, 2.0)[draws],
    "_sample_dirichlet": lambda call, _: call["self"] / call["self"].sum(-1, keepdim=True),
    # Never the identity: whoever mixes the rows of a batch must be seen to do so.
    "randperm": lambda call, draws: torch.arange(call["n"]).roll(1 if draws is Draws.HIGH else -1),
}
# Words of a Mersenne twister that its output makes 0.4996, 0.0196 and 0.9800 of. Python's and
# NumPy's global generators give 312 such numbers and then others: no rejection goes on for ever.
_TWISTER_WORDS = (0x2089A5, 0x805, 0x218180)


def steady(function: Callable[[_In], _Out], draws: Draws = Draws.MIDDLE) -> Callable[[_In], _Out]:
    """The same function, with the next numbers of Python's and NumPy's global generators constant.

    To be called within `preserved_state`.
    """
    words = (_TWISTER_WORDS[draws],) * 624

    def held(argument: _In) -> _Out:
        random.setstate((3, (*words, 0), None))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.set_state(("MT19937", words, 0))
        return function(argument)

    return held


# How many checks are running. Not by thread: autograd's threads compute checkpoints again.
_still = 0


def is_still() -> bool:
    """Whether a check wants no random decisions now; for noise that is not one of torch's draws."""
    return _still > 0


class without_randomness(TorchDispatchMode):  # noqa: N801 - reads as a statement
    """Context in which dropout keeps everything and random draws are constants.

    Args:
        draws: which constants.

    Attributes:
        low_precision: whether anything was computed in bfloat16 or float16 so far.
    """

    def __init__(self, draws: Draws = Draws.MIDDLE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws
        self.low_precision = False

    def __enter__(self) -> Self:
        """Begin."""
        global _still  # noqa: PLW0603 - all threads look here
        super().__enter__()  # type: ignore[no-untyped-call]
        _still += 1
        return self

    def __exit__(self, *raised: object) -> None:
        """End, whatever happened."""
        global _still  # noqa: PLW0603 - all threads look here
        _still -= 1
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

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
            result.fill_(_CONSTANTS[name][self._draws])
        elif name in _VALUES:
            call = dict(zip(names, args, strict=False)) | kwargs
            result.copy_(torch.as_tensor(_VALUES[name](call, self._draws)))
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
            self.low_precision = True
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
