"""Does a gradient depend on what a hook has kept of earlier batches?

A training step that remembers is found by running it twice. Hooks are not run by the checks: one
that keeps a statistic of each batch in a plain attribute, and a loss that reads it, carry an
example into later gradients of others, where nothing bounds it. So a row's gradient is computed
with the present attributes and with those from before the first step.
"""

from __future__ import annotations

import copy
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CONTAINERS = (list, tuple, deque, dict)
_NUMBERS = (Tensor, np.ndarray, float, np.floating)
# So many containers within one another are looked into.
_DEPTH = 3
# An attribute that holds more numbers than this is not watched: copying it would cost memory.
_MOST = 10**7
_ABSENT = object()


class Attributes:
    """The plain attributes of a module that hold tensors or real numbers, as they once were.

    States of metrics are among them. Whole numbers are left out: they count, and are no statistics.
    So are the module's own parameters, which `nn.LSTM` keeps a second time in a list: private steps
    change them.

    Args:
        module: The module to be trained, before the first step.
        independent: Names declared to be independent of the data.
    """

    def __init__(self, module: nn.Module, independent: Sequence[str] = ()) -> None:
        self._module, self._independent = module, frozenset(independent)
        own = self._own()
        # Those without numbers, too: what is None or empty now may be a statistic later.
        self._before = {
            name: value if _size(value) > _MOST else _mapped(value, own, _copied)
            for name, _, _, value in self._walk()
        }

    def changed(self) -> dict[str, bool]:
        """Names of what is not as it was, and whether it holds tensors (or single numbers)."""
        found = {}
        for name, _, _, value in self._walk():
            if _watched(value) and not _equal(self._before.get(name, _ABSENT), value):
                found[name] = any(isinstance(part, Tensor | np.ndarray) for part in _parts(value))
        return found

    @contextmanager
    def as_before(self, names: Sequence[str]) -> Iterator[None]:
        """Put the old values into the places of the present ones.

        Args:
            names: Whose.
        """
        own = self._own()
        with self._replaced(
            names, lambda name, _: _mapped(self._before.get(name, _ABSENT), own, _copied)
        ):
            yield

    @contextmanager
    def as_before_with_flags(self, names: Sequence[str]) -> Iterator[None]:
        """The same, and flags: one may say that something was made, which is then made again.

        Args:
            names: Whose.
        """
        flags = [
            name
            for name, _, _, value in self._walk()
            if isinstance(value, bool) and self._before.get(name, _ABSENT) is not value
        ]
        with self.as_before([*names, *flags]):
            yield

    @contextmanager
    def altered(self, names: Sequence[str]) -> Iterator[None]:
        """Put other values into the places of the present ones: where there were none before.

        Args:
            names: Whose.
        """
        own = self._own()
        with self._replaced(names, lambda _, value: _mapped(value, own, _altered)):
            yield

    @contextmanager
    def _replaced(self, names: Sequence[str], new: Callable[[str, Any], Any]) -> Iterator[None]:
        places = [(name, *place) for name, *place in self._walk() if name in names]
        values = [new(name, value) for name, _, _, value in places]
        try:
            for (_, held, key, _), value in zip(places, values, strict=True):
                if value is _ABSENT:
                    held.pop(key, None)
                else:
                    held[key] = value
            yield
        finally:
            for _, held, key, value in places:
                held[key] = value

    def _own(self) -> set[int]:
        return {id(parameter) for parameter in self._module.parameters()}

    def _walk(self) -> list[tuple[str, dict[str, Any], str, Any]]:
        """Name, where it is held, under which key, and its value."""
        return [
            (name, vars(part), key, value)
            for prefix, part in self._module.named_modules()
            for key, value in vars(part).items()
            if key not in _INTERNAL
            and (name := f"{prefix}.{key}" if prefix else key) not in self._independent
        ]


def remembered(names: Sequence[str], found: float) -> GuaranteeError:
    """The refusal of attributes that carry batches into later gradients.

    Args:
        names: Their names.
        found: By how much a gradient differs, relative.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="a training step reads nothing that earlier batches left behind",
        found=f"with {', '.join(names[:8])} as before the first step, the gradient of one row "
        f"differs by {found:.2g} (relative)",
        cost="an example would act on the gradients of others at later steps, where its own "
        "clipping does not bound it",
        remedy="drop what a hook keeps there; or, if no training data entered it, name it in "
        "independent_buffers",
    )


def warning_of(names: Sequence[str]) -> str:
    """What to say of single numbers that may be a schedule, or a statistic.

    Args:
        names: Their names.

    Returns:
        The warning.
    """
    return (
        f"Gradients depend on {', '.join(names[:8])}, which changed since the first step. If "
        "training data entered it (a running loss, a count), the printed ε is too small. If it is "
        "a schedule, name it in independent_buffers, and nothing is said."
    )


_INTERNAL = frozenset(vars(LightningModule()))


def _watched(value: object) -> bool:
    return any(isinstance(part, _NUMBERS) for part in _parts(value)) and _size(value) <= _MOST


def _size(value: object) -> int:
    """How many numbers it holds in tensors and arrays."""
    parts = _parts(value)
    tensors = sum(part.numel() for part in parts if isinstance(part, Tensor))
    return tensors + sum(part.size for part in parts if isinstance(part, np.ndarray))


def _parts(value: object, depth: int = _DEPTH) -> list[object]:
    """What it is, or what it holds some levels down."""
    if not depth or not isinstance(value, _CONTAINERS):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [part for held in inner for part in _parts(held, depth - 1)]


def _mapped(value: Any, own: set[int], new: Callable[[Any], Any], depth: int = _DEPTH) -> Any:
    """The same with new parts, but that the module's own parameters are themselves."""
    if id(value) in own:
        return value
    if not depth or not isinstance(value, _CONTAINERS):
        return new(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, own, new, depth - 1) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    made = copy.copy(value)
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        made[key] = _mapped(part, own, new, depth - 1)
    return made


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _altered(value: Any) -> Any:
    """Another value that is as good: of the same sign if that is positive, and finite."""
    if isinstance(value, Tensor):
        value = value.detach()
        return 2 * value + 1 if value.is_floating_point() else value.flip([*range(value.dim())])
    if isinstance(value, np.ndarray) and value.dtype.kind != "f":
        return np.flip(value)
    return 2 * value + 1 if isinstance(value, _NUMBERS) else value


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.shape == second.shape
            and first.device == second.device
            and bool(torch.equal(first, second))
        )
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, _CONTAINERS) and type(first) is type(second):
        ours, theirs = _parts(first), _parts(second)
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return type(first) is type(second) and bool(first == second)
