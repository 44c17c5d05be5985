"""The processes of one fit: what they agree on, what they add up, and how they fail together.

Words travel over a group of their own on the CPU, so that no GPU is waited for and no message can
be taken for a gradient. All of them are one exchange, in which every rank says where it stands; a
rank that has failed says so in the next one, and all ranks raise its error.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import torch
import torch.distributed as dist

from lightning_privacy.distributed.exchange import Exchange, all_reduced
from lightning_privacy.distributed.signals import Signals
from lightning_privacy.distributed.watch import Watch
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    PrivacyError,
    UnsupportedOperationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Key = TypeVar("Key")
Result = TypeVar("Result")

_FAILED, _TOGETHER, _VALUE, _STEP = range(4)
# How long a rank that has failed waits for the others to come and hear of it.
_PATIENCE: Final = timedelta(seconds=60)
# Of the words of a failed rank that go where the others look while they wait.
_LETTERS: Final = 500
# How much longer the others have to end by themselves.
_GRACE: Final = timedelta(seconds=10)
_KINDS: Final = {
    kind.__name__: kind
    for kind in (
        BudgetExceededError,
        ConfigurationError,
        GuaranteeError,
        UnsupportedOperationError,
    )
}


class World:
    """One rank's view of all processes of a fit; by default there is one process.

    Threat model: the ranks trust one another and the network between them, as in any data-parallel
    training. What leaves a rank is its clipped sum with its own share of the noise, never a
    gradient of one example.

    Args:
        control: A gloo group of all ranks, for words; None where there is one process.

    Attributes:
        size: Number of processes R.
        rank: Number of this one, 0 to R - 1.
        signals: What any rank was asked by a signal; every exchange tells the others.
    """

    lockstep = False
    """Whether all ranks have to run the same passes of the module, because these communicate."""

    def __init__(self, control: Any = None) -> None:
        self._control = control
        self.size: int = 1 if control is None else dist.get_world_size(control)
        self.rank: int = 0 if control is None else dist.get_rank(control)
        self.signals = Signals()
        self._ended = False
        self._watch: Watch | None = None

    @classmethod
    def join(cls) -> World:
        """Join all processes that torch.distributed knows of. Every rank has to call it.

        Returns:
            The world; of one process where no process group is initialised.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(_control_group(dist.group.WORLD))

    def watched(self) -> Self:
        """From now on this process ends if a rank fails for which it waits in vain.

        All ranks call it at the same moment; `left` undoes it.

        Returns:
            This world.
        """
        if not self.alone:
            self._watch = Watch(self.from_first(secrets.token_hex(8)), self.rank, self.size)
            self._watch.start(_PATIENCE + _GRACE)
        return self

    def left(self) -> World:
        """Leave the other ranks: nobody waits for this one any more, nor this one for them.

        Returns:
            The world of one process.
        """
        self._look_away()
        return World()

    def _end(self) -> None:
        self._ended = True
        self._look_away()

    def _look_away(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes journal and ledger."""
        return self.rank == 0

    # ------------------------------------------------------------------ words
    def together(self, part: Callable[[], Result]) -> Result:
        """Do a part of the work on every rank; if one rank fails, all fail with its error.

        Args:
            part: What to do; it may exchange values on the way.

        Returns:
            What this rank's part returned.

        Raises:
            PrivacyError: The error of the lowest rank that failed, the same on all ranks.
        """
        if self.alone:
            return part()
        try:
            result = part()
        except Exception as error:
            self.fail(error)
            raise
        self._exchange(_TOGETHER)
        return result

    def gathered(self, value: Any) -> list[Any]:
        """Collect a value of each rank.

        Args:
            value: Anything that JSON can carry.

        Returns:
            The values, by rank.
        """
        return [value] if self.alone else self._exchange(_VALUE, value=value)

    def from_first(self, value: Any) -> Any:
        """Take over rank 0's value.

        Args:
            value: Anything that JSON can carry; used on rank 0 only.

        Returns:
            Rank 0's value.
        """
        return self.gathered(value if self.is_first else None)[0]

    def shared_secret(self, own: bytes) -> bytes:
        """Agree on a secret that no rank has decided alone.

        Args:
            own: This rank's random bytes.

        Returns:
            32 bytes, a hash of all ranks' bytes; ``own`` where there is one process.
        """
        if self.alone:
            return own
        digest = hashlib.blake2b(digest_size=32, person=b"lp-shared")
        for part in self.gathered(own.hex()):
            digest.update(len(part).to_bytes(4, "little") + part.encode())
        return digest.digest()

    def own_secret(self, common: bytes) -> bytes:
        """Derive this rank's secret from one that all ranks know; for deterministic tests only.

        Args:
            common: 16 to 64 bytes.

        Returns:
            32 bytes, others on each rank; ``common`` where there is one process.
        """
        if self.alone:
            return common
        rank = self.rank.to_bytes(4, "little")
        return hashlib.blake2b(rank, key=common, digest_size=32, person=b"lp-rank").digest()

    def meet(self, cursor: int, number: int) -> None:
        """Stand at the same release as all ranks, or fail with the one that has failed.

        After it, rank 0's charge is on disk and every rank's sum is complete.

        Args:
            cursor: Number of the draw.
            number: Number of the release.

        Raises:
            PrivacyError: A rank failed since the last meeting, or stands elsewhere.
        """
        if not self.alone:
            self._exchange(_STEP, (cursor, number))

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, when they come to their next exchange, that this one has failed.

        Safe to call several times, and with an error that all ranks know already. Nobody is waited
        for longer than a minute: a process that ends takes the others' connections with it.

        Args:
            error: Why. Interrupts are not passed on: launchers send them to all processes.

        Raises:
            PrivacyError: A lower rank failed as well; then its error counts.
        """
        if self.alone or self._ended or not isinstance(error, Exception):
            return
        self._end()
        mine = _described(error)
        if self._watch is not None:
            self._watch.report(f"rank {self.rank}: {_in_short(error)}")
        try:
            places, spoken = self._talk(_FAILED, (0, 0), mine, _PATIENCE)
        except UnheardError:
            return
        first = next(rank for rank, place in enumerate(places) if place[0] == _FAILED)
        if spoken[first] != mine:
            raise _error_of(first, spoken[first])

    def _exchange(self, kind: int, place: tuple[int, int] = (0, 0), value: Any = None) -> list[Any]:
        """Every rank says where it stands and, if it has one, a value; or all of them fail."""
        places, spoken = self._talk(kind, place, value)
        for rank, (stands_at, *_) in enumerate(places):
            if stands_at == _FAILED:
                self._end()
                raise _error_of(rank, spoken[rank])
        if any(other != places[0] for other in places):
            self._end()
            raise _apart(places)
        return spoken

    def _talk(
        self, kind: int, place: tuple[int, int], value: Any, patience: timedelta | None = None
    ) -> tuple[list[list[int]], list[Any]]:
        words = b"" if value is None else json.dumps(value).encode()
        mine = torch.tensor([kind, *place, len(words), self.signals.asked()])
        heads = self._gather(mine, patience)
        self.signals.agree(int(head[4]) for head in heads)
        spoken: list[Any] = [None] * self.size
        longest = max(int(head[3]) for head in heads)
        if longest:
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(words)] = torch.tensor(list(words), dtype=torch.uint8)
            for rank, part in enumerate(self._gather(padded, patience)):
                text = bytes(part[: int(heads[rank][3])].tolist())
                spoken[rank] = json.loads(text) if text else None
        if any(head[0] == _FAILED for head in heads):
            # A process that ends breaks its connections, and what nobody has read from them is
            # lost: nobody leaves before the others have its words.
            with suppress(UnheardError):
                self._gather(torch.zeros(1), _GRACE)
        return [head[:3].tolist() for head in heads], spoken

    def _gather(self, mine: Tensor, patience: timedelta | None) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(parts, mine, group=self._control, async_op=True)
            work.wait() if patience is None else work.wait(patience)
        except RuntimeError as error:
            self._end()
            word = None if self._watch is None else self._watch.word()
            raise UnheardError(error, word) from error
        return parts

    # ------------------------------------------------------------------ sums
    @property
    def noise_parts(self) -> int:
        """How many ranks' noise adds up in one coordinate: all R."""
        return self.size

    @property
    def noise_share(self) -> float:
        """Each rank's share of the standard deviation, 1/sqrt(R) for R parts.

        R independent normal values of standard deviation s/sqrt(R) add up to one of s: noise is in
        the sum once, and each rank knows a part of it only.
        """
        return 1 / math.sqrt(self.noise_parts)

    def exchange(self, arrived: Callable[[Key, Tensor], object]) -> Exchange[Key]:
        """Add up tensors over all ranks, in place, while the next ones are prepared.

        Args:
            arrived: Called with each key and its sum, in order.

        Returns:
            What takes the tensors.
        """
        return Exchange(arrived, None if self.alone else all_reduced)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up one tensor over all ranks, in place.

        Args:
            tensor: The same shape on every rank.

        Returns:
            ``tensor``.
        """
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor


class UnheardError(GuaranteeError):
    """No answer: another process is gone, or does not come."""

    def __init__(self, error: Exception, word: str | None = None) -> None:
        why = str(error).splitlines()[0] if word is None else word
        super().__init__(
            must="all processes of a private fit go on together",
            found=f"another process is gone, or did not come ({why})",
            cost="a release without the sums and the noise of that process",
            remedy="read that process's own error; resume from the last checkpoint, which charges "
            "every release since",
        )


@cache
def _control_group(_world: Any) -> Any:
    """One group for words beside each default group; made by all ranks at the same moment."""
    return dist.new_group(backend="gloo")


def _in_short(error: Exception) -> str:
    said = error.found if isinstance(error, PrivacyError) else str(error)
    return f"{type(error).__name__}: {said}".splitlines()[0][:_LETTERS]


def _described(error: Exception) -> list[str]:
    kind = type(error).__name__
    if isinstance(error, PrivacyError):
        told = [error.must, error.found, error.cost, error.remedy]
        return [kind if kind in _KINDS else GuaranteeError.__name__, *told]
    return [kind, str(error)]


def _error_of(rank: int, described: list[str]) -> PrivacyError:
    kind, *told = described
    if kind in _KINDS:
        must, found, cost, remedy = told
        return _KINDS[kind](must=must, found=found, cost=cost, remedy=remedy)
    return GuaranteeError(
        must="every rank of a private fit completes its part",
        found=f"rank {rank}: {kind}: {told[0]}",
        cost="a sum without that rank's examples and noise",
        remedy="mend what failed there; the other ranks are well",
    )


def _apart(places: list[list[int]]) -> GuaranteeError:
    return GuaranteeError(
        must="all ranks stand at the same release of the same draw",
        found="; ".join(f"rank {rank} at {place}" for rank, place in enumerate(places)),
        cost="one noise for sums of different draws",
        remedy="let every rank run the same trainer, callbacks and number of batches",
    )
