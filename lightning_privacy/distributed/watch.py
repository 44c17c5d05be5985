"""Ends a process that waits for a rank that has failed, and cannot hear of it.

A rank hears of another one's failure when it comes to the next exchange. It never comes there while
it waits, inside a sharded forward or at a barrier, for a sum or a shard of the failed rank; and
backends give up after half an hour. So a failed rank leaves a word in the store through which the
processes have met, and a thread of each rank looks for it. That thread counts on in the store, and
looks whether the next rank's counts: one that was killed can leave no word, and not every backend
notices.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Final

_KEY: Final = "failed"
_EVERY: Final = 1.0
# A rank that counts no further for so long is taken for dead.
_SILENCE: Final = timedelta(minutes=2)
_LEFT: Final = 2**40


class Watch:
    """Looks for the word of a failed rank from `start` to `stop`.

    Args:
        name: The same on all ranks, and another one for each fit.
        rank: Number of this rank.
        size: How many there are.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        # Not every build of torch has it.
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self._mine, self._next = f"count {rank}", f"count {(rank + 1) % size}"
        self._next_rank = (rank + 1) % size
        self._count, self._heard_at = -1, time.monotonic()
        self._store = PrefixStore(f"lightning_privacy/{name}", _get_default_store())
        self._stopped = threading.Event()
        self._word: str | None = None

    def start(self, patience: timedelta) -> None:
        """Begin to look.

        Args:
            patience: How long this rank may take, after another one has failed, to hear of it by
                itself and to call `stop`. Then its process ends with code 1.
        """
        seconds = patience.total_seconds()
        threading.Thread(
            target=self._look, args=(seconds,), name="failures of other ranks", daemon=True
        ).start()

    def stop(self) -> None:
        """End looking, and being looked for. Safe to call several times."""
        if not self._stopped.is_set():
            self._stopped.set()
            with suppress(RuntimeError):  # whoever kept the store may be gone
                self._store.add(self._mine, _LEFT)

    def report(self, failure: str) -> None:
        """Leave a word for the others.

        Args:
            failure: Which rank has failed, and how.
        """
        self.stop()
        with suppress(RuntimeError):  # that the store is gone says as much
            self._store.set(_KEY, failure)

    def word(self) -> str | None:
        """What a failed rank has left, or what silence means; None if nothing is known.

        Returns:
            Which rank has failed, and how.
        """
        if self._word is None:
            with suppress(RuntimeError):
                if self._store.check([_KEY]):
                    self._word = self._store.get(_KEY).decode()
        return self._word

    def _look(self, patience: float) -> None:
        failure = None
        while failure is None:
            if self._stopped.wait(_EVERY):
                return
            failure = self._word = self._heard()
        if not self._stopped.wait(patience):
            sys.stderr.write(
                f"A rank of this private fit has failed ({failure}), and this one waits for it in "
                "vain: its process ends. Resume from the last checkpoint; every release since is "
                "charged.\n"
            )
            sys.stderr.flush()
            os._exit(1)  # nothing else ends a thread that waits inside a backend

    def _heard(self) -> str | None:
        try:
            if self._store.check([_KEY]):
                return self._store.get(_KEY).decode()
            self._store.add(self._mine, 1)
            count, now = self._store.add(self._next, 0), time.monotonic()
            if count != self._count or count >= _LEFT:
                self._count, self._heard_at = count, now
            elif now - self._heard_at > _SILENCE.total_seconds():
                self._store.set(_KEY, f"rank {self._next_rank} is silent")
        except RuntimeError:
            return "rank 0 is gone"
        return None
