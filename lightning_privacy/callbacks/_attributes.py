"""Does a gradient depend on what a hook has kept of earlier batches?

A training step that remembers is found by running it twice. Hooks are not run by the checks: one
that keeps a statistic of each batch in a plain attribute, and a loss that reads it, carry an
example into later gradients of others, where nothing bounds it. So a row's gradient is computed
with the present attributes and with those from before the first step.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CONTAINERS = (list, tuple, deque, dict)
# An attribute that holds more numbers than this is not watched: copying it would cost memory.
_MOST = 10**7
_ABSENT = object()


class Attributes:
    """The plain attributes of a module that hold tensors or real numbers, as they once were.

    Whole numbers are left out: they count, and are no statistics. So are the module's own
    parameters, which `nn.LSTM` keeps a second time in a list: private steps change them.

    Args:
        module: The module to be trained, before the first step.
        independent: Names declared to be independent of the data.
    """

    def __init__(self, module: nn.Module, independent: Sequence[str] = ()) -> None:
        self._module, self._independent = module, frozenset(independent)
        own = self._own()
        self._before = {name: _copied(value, own) for name, _, _, value in self._walk()}

    def changed(self) -> dict[str, bool]:
        """Names of what is not as it was, and whether it holds tensors (or single numbers)."""
        found = {}
        for name, _, _, value in self._walk():
            if not _equal(self._before.get(name, _ABSENT), value):
                found[name] = any(isinstance(part, Tensor | np.ndarray) for part in _parts(value))
        return found

    @contextmanager
    def as_before(self, names: Sequence[str]) -> Iterator[None]:
        """Put the old values into the places of the present ones.

        Args:
            names: Whose.
        """
        places = [(held, key, value) for name, held, key, value in self._walk() if name in names]
        own = self._own()
        old = [
            _copied(self._before[name], own) if name in self._before else _ABSENT
            for name, *_ in self._walk()
            if name in names
        ]
        try:
            for (held, key, _), value in zip(places, old, strict=True):
                if value is _ABSENT:
                    held.pop(key, None)
                else:
                    held[key] = value
            yield
        finally:
            for held, key, value in places:
                held[key] = value

    def _own(self) -> set[int]:
        return {id(parameter) for parameter in self._module.parameters()}

    def _walk(self) -> list[tuple[str, dict[str, Any], str, Any]]:
        """Name, where it is held, under which key, and its value."""
        return [
            (f"{prefix}.{key}" if prefix else key, vars(part), key, value)
            for prefix, part in self._module.named_modules()
            if not isinstance(part, Metric)
            for key, value in vars(part).items()
            if key not in _INTERNAL
            and _watched(value)
            and (f"{prefix}.{key}" if prefix else key) not in self._independent
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
    parts = _parts(value)
    numbers = [part for part in parts if isinstance(part, Tensor | np.ndarray | float)]
    size = sum(
        part.size if isinstance(part, np.ndarray) else part.numel()
        for part in numbers
        if not isinstance(part, float)
    )
    return bool(numbers) and size <= _MOST


def _parts(value: object) -> list[object]:
    """What it is, or what it holds one level down."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | deque) else [value]


def _copied(value: Any, own: set[int]) -> Any:
    """A copy, in which the module's own parameters are themselves."""
    if id(value) in own:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) is dict:
        return {key: _copied(part, own) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part, own) for part in value)
    if type(value) is deque:
        return deque((_copied(part, own) for part in value), value.maxlen)
    return value


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
