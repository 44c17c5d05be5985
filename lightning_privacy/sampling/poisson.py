"""Poisson sampling as a pure function of a counter: to resume is to remember an integer."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import numpy as np

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.sampling.base import MicroBatch, micro_batches
from lightning_privacy.types import real_number, whole_number

_CHUNK = 2**20  # bounds the memory that a draw from a very large data set needs


class PoissonSampler:
    """Draws each of ``size`` units independently with probability ``sample_rate``.

    Guarantee: `draw` depends on (secret, cursor) and the two arguments only; draws of different
    cursors are independent. The stream is Philox-4x64-10 with a key of 128 bits of blake2b over
    (secret, cursor); an inclusion probability is exact to 2**-53.

    Args:
        size: Number of units, >= 1 (private under add-or-remove).
        sample_rate: Probability q of each unit, in (0, 1].
        secret: 16 to 64 secret bytes. Whoever knows them knows who was drawn, which voids the
            amplification by sampling; the object refuses to be pickled or copied.

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    def __init__(self, *, size: int, sample_rate: float, secret: bytes) -> None:
        self.size = whole_number(
            "size",
            size,
            at_least=1,
            cost="private steps that no data could have influenced",
            remedy="give a data set with at least one unit",
        )
        self.sample_rate = real_number(
            "sample_rate",
            sample_rate,
            "(0, 1]",
            cost="another sampling than the accounted one",
            remedy="pass the probability with which each unit is drawn",
        )
        if not isinstance(secret, bytes) or not 16 <= len(secret) <= 64:
            raise ConfigurationError(
                must="`secret` must be 16 to 64 bytes",
                found=f"{len(secret)} bytes"
                if isinstance(secret, bytes)
                else type(secret).__name__,
                cost="draws that can be found by searching, and no amplification by sampling",
                remedy="pass 32 bytes from the operating system",
            )
        self._secret = secret

    def __reduce__(self) -> NoReturn:
        raise GuaranteeError(
            must="the secret of the sampling must stay in the process that made it",
            found="an attempt to pickle or copy a PoissonSampler",
            cost="amplification by sampling, for which nobody may know who was drawn",
            remedy="make a new PoissonSampler with a fresh secret where it is needed",
        )

    def draw(self, cursor: int) -> np.ndarray:
        """Returns the units of one draw.

        Args:
            cursor: Number of the draw, >= 0.

        Returns:
            Their numbers, ascending, int64; may be empty.

        Raises:
            ConfigurationError: The cursor is no whole number >= 0.
        """
        generator = self.stream(b"draw", cursor)
        drawn = [
            start
            + np.flatnonzero(generator.random(min(_CHUNK, self.size - start)) < self.sample_rate)
            for start in range(0, self.size, _CHUNK)
        ]
        return np.concatenate(drawn).astype(np.int64, copy=False)

    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """Cuts a draw into micro-batches; see `micro_batches`.

        Args:
            cursor: Number of the draw, >= 0.
            physical_batch_size: Most rows in one pass, >= 1; None for no limit.

        Returns:
            At least one micro-batch.
        """
        return micro_batches(self.draw(cursor), physical_batch_size)

    def stream(self, purpose: bytes, cursor: int) -> np.random.Generator:
        """Returns the random numbers of one draw for one purpose.

        Args:
            purpose: Up to 13 bytes; streams of different purposes are independent.
            cursor: Number of the draw, >= 0.

        Returns:
            A generator at its start.
        """
        return np.random.Generator(np.random.Philox(key=self._key(purpose, cursor)))

    def worker_seed(self, cursor: int) -> int:
        """Returns a seed for the random transforms of data-loading workers.

        Args:
            cursor: Number of the draw at which the workers start, >= 0.

        Returns:
            A number in [0, 2**63), independent of the draws.
        """
        return self._key(b"workers", cursor) >> 65

    def _key(self, purpose: bytes, cursor: int) -> int:
        cursor = whole_number(
            "cursor",
            cursor,
            at_least=0,
            cost="a draw that is handed out twice",
            remedy="pass the number of draws handed out so far",
        )
        digest = hashlib.blake2b(
            cursor.to_bytes(cursor.bit_length() // 8 + 1, "little"),
            key=self._secret,
            digest_size=16,
            person=b"lp-" + purpose,
        )
        return int.from_bytes(digest.digest(), "little")
