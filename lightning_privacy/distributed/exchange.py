"""Sums over all ranks that travel while the next ones are prepared."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

Key = TypeVar("Key")

# Sums under way while the next ones are prepared; each holds a bundle of gradients.
_UNDER_WAY: Final = 2


class Exchange(Generic[Key]):
    """Sends tensors off to be added up over all ranks, and receives the sums in the same order.

    Args:
        arrived: Called with each key and its sum.
        start: Sends a tensor off: gives where its sum will be, and what to wait for, or None if
            the sum is there already. None: there is nothing to be added up.
        under_way: How many may be waited for; their tensors are kept as long.
    """

    def __init__(
        self,
        arrived: Callable[[Key, Tensor], object],
        start: Callable[[Key, Tensor], tuple[Tensor, Any]] | None = None,
        *,
        under_way: int = _UNDER_WAY,
    ) -> None:
        self._arrived, self._start = arrived, start
        self._most = under_way if start is not None else 0
        self._under_way: deque[tuple[Key, Tensor, Tensor, Any]] = deque()

    def send(self, key: Key, tensor: Tensor) -> None:
        """Send a tensor off.

        Args:
            key: The same keys in the same order on every rank.
            tensor: This rank's part.
        """
        total, work = (tensor, None) if self._start is None else self._start(key, tensor)
        self._under_way.append((key, tensor, total, work))
        self._receive(self._most)

    def finish(self) -> None:
        """Receive what is still under way."""
        self._receive(0)

    def forget(self) -> None:
        """Receive nothing more of what is under way."""
        self._under_way.clear()

    def _receive(self, left: int) -> None:
        while len(self._under_way) > left:
            key, _, total, work = self._under_way.popleft()
            if work is not None:
                work.wait()
            self._arrived(key, total)


def all_reduced(_key: object, tensor: Tensor, group: Any = None) -> tuple[Tensor, Any]:
    """Start of an exchange after which every rank has the sum, with the same bits, in place.

    Args:
        tensor: This rank's part.
        group: Of these ranks; None: of all.

    Returns:
        The tensor, and what to wait for.
    """
    return tensor, dist.all_reduce(tensor, group=group, async_op=True)


class Departures:
    """Sends bundles off, each as soon as it and all before it are complete: so in one order.

    Args:
        bundles: Names in bundles, the same on every rank.
        made: Gives this rank's part of a bundle.
        exchange: Takes it.
        missing: Names that are to be added to before their bundle is complete; may differ on ranks.
    """

    def __init__(
        self,
        bundles: Iterable[tuple[str, ...]],
        made: Callable[[tuple[str, ...]], Tensor],
        exchange: Exchange[tuple[str, ...]],
        missing: Iterable[str],
    ) -> None:
        self._waiting, self._missing = deque(bundles), set(missing)
        self._made, self._exchange = made, exchange

    def added(self, name: str) -> None:
        """A name is complete.

        Args:
            name: One of those that were missing.
        """
        self._missing.discard(name)
        self._depart()

    def finish(self) -> None:
        """All are complete: send the rest, and receive everything."""
        self._missing.clear()
        self._depart()
        self._exchange.finish()

    def _depart(self) -> None:
        while self._waiting and self._missing.isdisjoint(self._waiting[0]):
            names = self._waiting.popleft()
            self._exchange.send(names, self._made(names))
