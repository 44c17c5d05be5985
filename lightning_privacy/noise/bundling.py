"""Which parameters share a draw of noise, and an exchange between ranks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

# On a GPU the launches for each would take longer than the copies that bring them together: up to
# so many elements of parameters that have up to so many.
_BUNDLE, _ALONE = 2**26, 2**23
# The sums of smaller parameters lie in one buffer, so they do not mix with others.
_SMALL = 2**20
# On the CPU, where a draw costs less than a copy, a larger parameter has its own.
_SMALL_ON_CPU = 2**16


def bundles(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, ...]]:
    """Cut parameters into bundles, each of one device and type: a function of these alone.

    Args:
        parameters: By name.

    Returns:
        Their names, each once. Small parameters come last, as their sums do.
    """
    found: dict[tuple[object, ...], list[str]] = {}
    filled: Counter[tuple[object, ...]] = Counter()
    for name, parameter in parameters.items():
        size, device = parameter.numel(), parameter.device
        if size > (_SMALL_ON_CPU if device.type == "cpu" else _ALONE):
            found[False, name] = [name]
            continue
        kind = size <= _SMALL, device, parameter.dtype
        filled[kind] += size
        found.setdefault((*kind, filled[kind] // _BUNDLE), []).append(name)
    return [tuple(found[kind]) for kind in sorted(found, key=lambda kind: bool(kind[0]))]
