"""Ends a process that waits for a rank that has failed, and cannot hear of it.

A rank hears of another one's failure when it comes to the next exchange. It never comes there while
it waits, inside a sharded forward or at a barrier, for a sum or a shard of the failed rank; and
backends give up after half an hour. So a failed rank leaves a word in the store through which the
processes have met, and a thread of each rank looks for it.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

if TYPE_CHECKING:
    from datetime import timedelta

_KEY: Final = "failed"
_EVERY: Final = 1.0


class Watch:
    """Looks for the word of a failed rank from `start` to `stop`.

    Args:
        name: The same on all ranks, and another one for each fit.
    """

    def __init__(self, name: str) -> None:
        self._store = dist.PrefixStore(f"lightning_privacy/{name}", _get_default_store())
        self._stopped = threading.Event()

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
        """End looking. Safe to call several times."""
        self._stopped.set()

    def report(self, failure: str) -> None:
        """Leave a word for the others.

        Args:
            failure: Which rank has failed, and how.
        """
        self.stop()
        try:
            self._store.set(_KEY, failure)
        except RuntimeError:
            return  # whoever kept the store is gone, which says as much

    def _look(self, patience: float) -> None:
        failure = None
        while failure is None:
            if self._stopped.wait(_EVERY):
                return
            failure = self._heard()
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
            return self._store.get(_KEY).decode() if self._store.check([_KEY]) else None
        except RuntimeError:
            return "rank 0 is gone"
