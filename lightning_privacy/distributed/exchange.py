"""Sums over all ranks that travel while the next ones are prepared."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

Key = TypeVar("Key")

# Sums under way while the next noise is drawn; each holds a bundle of gradients.
_UNDER_WAY: Final = 2


class Exchange(Generic[Key]):
    """Adds up tensors over all ranks, in place.

    Args:
        arrived: Called with each key and its sum, in the order in which they were sent; the sum
            has the same bits on every rank.
        adding: Whether there is anything to be added up.
    """

    def __init__(self, arrived: Callable[[Key, Tensor], object], *, adding: bool) -> None:
        self._arrived, self._adding = arrived, adding
        self._under_way: deque[tuple[Key, Tensor, Any]] = deque()

    def send(self, key: Key, tensor: Tensor) -> None:
        """Send a tensor off.

        Args:
            key: The same keys in the same order on every rank.
            tensor: This rank's part.
        """
        work = dist.all_reduce(tensor, async_op=True) if self._adding else None
        self._under_way.append((key, tensor, work))
        self._receive(_UNDER_WAY if self._adding else 0)

    def finish(self) -> None:
        """Receive what is still under way."""
        self._receive(0)

    def _receive(self, left: int) -> None:
        while len(self._under_way) > left:
            key, tensor, work = self._under_way.popleft()
            if work is not None:
                work.wait()
            self._arrived(key, tensor)


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
