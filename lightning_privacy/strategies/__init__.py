"""Lightning strategies that train privately. Importing this package registers their names."""

from __future__ import annotations

from lightning_privacy.strategies.base import note_flaw, privatize
from lightning_privacy.strategies.ddp import PrivateDDPStrategy
from lightning_privacy.strategies.fsdp import PrivateFSDPStrategy
from lightning_privacy.strategies.kinds import joined, run_for
from lightning_privacy.strategies.launching import require_return
from lightning_privacy.strategies.replicas import require_same
from lightning_privacy.strategies.run import PrivateRun
from lightning_privacy.strategies.single import PrivateSingleDeviceStrategy

__all__ = [
    "PrivateDDPStrategy",
    "PrivateFSDPStrategy",
    "PrivateRun",
    "PrivateSingleDeviceStrategy",
    "joined",
    "note_flaw",
    "privatize",
    "require_return",
    "require_same",
    "run_for",
]
