"""What chance decides about canaries: once for all processes of a fit."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_privacy.noise import fresh_secret

if TYPE_CHECKING:
    from lightning_privacy.distributed import World


class Coins:
    """A secret that all ranks share, kept in memory only, and what follows from it.

    No rank has decided it alone, and all follow it: which canaries are in, what they are, and which
    step draws which.

    Args:
        world: The ranks of the fit; all of them throw the coins at the same moment.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._secret = world.shared_secret(fresh_secret())

    def thrown(self, count: int) -> Tensor:
        """Throw fair coins.

        Args:
            count: How many.

        Returns:
            ``[count]`` booleans, the same on every rank and at every call.
        """
        bits = int.from_bytes(self._bytes(b"coins", -(-count // 8)), "little")
        return torch.tensor([bool(bits >> place & 1) for place in range(count)])

    def generator(self, purpose: bytes) -> torch.Generator:
        """Seed a generator for what need not be secret beyond the fit.

        Args:
            purpose: What for.

        Returns:
            A generator on the CPU, in the same state on every rank.
        """
        return torch.Generator().manual_seed(self.number(purpose))

    def number(self, purpose: bytes) -> int:
        """Draw a number.

        Args:
            purpose: What for.

        Returns:
            A number in [0, 2**63), the same on every rank.
        """
        return int.from_bytes(self._bytes(purpose, 8), "little") >> 1

    def secret(self, purpose: bytes) -> bytes:
        """Derive a secret.

        Args:
            purpose: What for.

        Returns:
            32 bytes, the same on every rank.
        """
        return self._bytes(purpose, 32)

    def _bytes(self, purpose: bytes, size: int) -> bytes:
        return hashlib.shake_256(b"lp-canary-" + purpose + b"\0" + self._secret).digest(size)
