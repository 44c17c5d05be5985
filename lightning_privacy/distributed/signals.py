"""Signals that reach the ranks of a fit apart from one another, answered by all at one moment.

A trainer's handlers talk to the other ranks from within a signal, wherever training is: a broadcast
at SIGTERM, a checkpoint at SLURM's signal. The other ranks are elsewhere then. They wait for this
one's sum while it waits for them; or, where a backend takes calls by their order alone, a broadcast
is taken for a part of a sum. So a signal is only noted when it comes. The next exchange tells all
ranks, and where they stand together each of them does what the handler does.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Signals:
    """What a rank has been asked by signals, and has not answered."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        # A set, because a signal may come between any two operations on it.
        self._noted: set[int] = set()
        self._agreed = 0

    def take_over(self, numbers: Sequence[int], deferred: Callable[[Any], bool]) -> None:
        """From now on note these signals. Whoever had set their handlers sets others at the end.

        Args:
            numbers: The signals, in the order in which they are answered; the same on all ranks.
            deferred: Whether a handler is one to put off; others stay as they are.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # nor could anybody else have set a handler here
        for number in numbers:
            handler: Any = signal.getsignal(number)
            if deferred(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def asked(self) -> int:
        """What came and is not agreed on, one bit for each signal that was taken over."""
        return sum(
            1 << place for place, number in enumerate(self._handlers) if number in self._noted
        )

    def agree(self, asked: Iterable[int]) -> None:
        """Take over what any rank was asked.

        Args:
            asked: What `asked` has returned, on each rank.
        """
        for bits in asked:
            self._agreed |= bits

    def answer(self) -> None:
        """Do what the handlers do. All ranks call it at the same moment."""
        agreed, self._agreed = self._agreed, 0
        for place, (number, handler) in enumerate(list(self._handlers.items())):
            if agreed >> place & 1:
                self._noted.discard(number)
                handler(number, None)

    def _note(self, number: int, _frame: Any) -> None:
        self._noted.add(number)
