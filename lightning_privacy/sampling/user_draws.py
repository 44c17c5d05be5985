"""Draws for user-level privacy: whole users, or examples of bounded users (arXiv 2407.07737).

| | unit of the draw | at most ``group_size`` examples of a user | clipped |
|---|---|---|---|
| `UserSampler` (ULS) | a user | chosen anew each time the user is drawn | the user's mean |
| `BoundedSampler` (ELS) | an example | chosen once for the run | each example |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling.base import MicroBatch, micro_batches, packed
from lightning_privacy.sampling.poisson import PoissonSampler
from lightning_privacy.sampling.users import UserIndex, checked_group_size

if TYPE_CHECKING:
    from collections.abc import Sequence


class UserSampler:
    """Draws each user independently with probability ``sample_rate``.

    Of a drawn user at most ``group_size`` examples take part, each subset of that size equally
    likely, chosen anew in every draw: a unit's contribution may be any function of its own data.

    Args:
        index: The rows of each user.
        group_size: Most examples of a user in one draw, >= 1.
        sample_rate: Probability q of each user, in (0, 1].
        secret: As for `PoissonSampler`.
        rate_shares: For each user the rate relative to ``sample_rate``, in (0, 1]; 1 by default.
        clip_shares: For each user the clip norm relative to the largest one; 1 by default.

    Attributes:
        size: Number of rows of the data set.

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    def __init__(
        self,
        *,
        index: UserIndex,
        group_size: int,
        sample_rate: float,
        secret: bytes,
        rate_shares: Sequence[float] | None = None,
        clip_shares: Sequence[float] | None = None,
    ) -> None:
        self.size = index.size
        self._index, self._group_size = index, checked_group_size(group_size)
        self._users = PoissonSampler(size=index.count, sample_rate=sample_rate, secret=secret)
        self._rates = None if rate_shares is None else np.asarray(rate_shares, dtype=np.float64)
        self._clips = clip_shares

    def draw(self, cursor: int) -> list[np.ndarray]:
        """Returns the rows of each drawn user.

        Args:
            cursor: Number of the draw, >= 0.

        Returns:
            For each user an array of 1 to ``group_size`` row numbers; may be empty.
        """
        return [rows for _, rows in self._chosen(cursor)]

    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """Cuts a draw into micro-batches of whole users, as far as these fit.

        Args:
            cursor: Number of the draw, >= 0.
            physical_batch_size: Most rows in one pass, >= 1; None for no limit.

        Returns:
            At least one micro-batch.
        """
        chosen = self._chosen(cursor)
        clips = None if self._clips is None else [self._clips[user] for user, _ in chosen]
        return packed([rows for _, rows in chosen], physical_batch_size, clips)

    def worker_seed(self, cursor: int) -> int:
        """Returns a seed for data-loading workers; see `PoissonSampler.worker_seed`.

        Args:
            cursor: Number of the draw, >= 0.

        Returns:
            A number in [0, 2**63).
        """
        return self._users.worker_seed(cursor)

    def _chosen(self, cursor: int) -> list[tuple[int, np.ndarray]]:
        users = self._users.draw(cursor)
        if self._rates is not None:
            kept = self._users.stream(b"rates", cursor).random(len(users)) < self._rates[users]
            users = users[kept]
        stream, chosen = self._users.stream(b"choice", cursor), []
        for user in users.tolist():
            rows = self._index.rows(user)
            if len(rows) > self._group_size:
                rows = rows[stream.choice(len(rows), self._group_size, replace=False)]
            chosen.append((user, rows))
        return chosen


class BoundedSampler:
    """Draws examples independently, out of at most ``group_size`` of each user.

    Args:
        index: The rows of each user.
        group_size: Most examples of a user in the whole run, >= 1.
        sample_rate: Probability q of each of these examples, in (0, 1].
        secret: As for `PoissonSampler`.
        seed: Decides which examples of a user take part. Independent of the data and the same
            throughout the run, over resumes as well; it need not be secret.

    Attributes:
        size: Number of rows of the data set.
        bounded_size: Number of rows that take part (private under add-or-remove).

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    def __init__(
        self, *, index: UserIndex, group_size: int, sample_rate: float, secret: bytes, seed: bytes
    ) -> None:
        if not isinstance(seed, bytes) or not 16 <= len(seed) <= 64:
            raise ConfigurationError(
                must="`seed` must be 16 to 64 bytes",
                found=f"{len(seed)} bytes" if isinstance(seed, bytes) else type(seed).__name__,
                cost="examples that somebody could have chosen by looking at the data",
                remedy="pass 32 bytes from the operating system, and keep them for the run",
            )
        self.size = index.size
        self._rows = index.bounded(group_size, seed)
        self.bounded_size = len(self._rows)
        self._examples = PoissonSampler(
            size=self.bounded_size, sample_rate=sample_rate, secret=secret
        )

    def draw(self, cursor: int) -> np.ndarray:
        """Returns the rows of one draw.

        Args:
            cursor: Number of the draw, >= 0.

        Returns:
            Row numbers of the data set, ascending, int64; may be empty.
        """
        rows: np.ndarray = self._rows[self._examples.draw(cursor)]
        return rows

    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """Cuts a draw into micro-batches; see `micro_batches`.

        Args:
            cursor: Number of the draw, >= 0.
            physical_batch_size: Most rows in one pass, >= 1; None for no limit.

        Returns:
            At least one micro-batch.
        """
        return micro_batches(self.draw(cursor), physical_batch_size)

    def worker_seed(self, cursor: int) -> int:
        """Returns a seed for data-loading workers; see `PoissonSampler.worker_seed`.

        Args:
            cursor: Number of the draw, >= 0.

        Returns:
            A number in [0, 2**63).
        """
        return self._examples.worker_seed(cursor)
