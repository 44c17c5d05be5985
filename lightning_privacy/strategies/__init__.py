"""Lightning strategies that train privately. Importing this package registers their names."""

from __future__ import annotations

from lightning_privacy.strategies.base import privatize
from lightning_privacy.strategies.run import PrivateRun
from lightning_privacy.strategies.single import PrivateSingleDeviceStrategy

__all__ = ["PrivateRun", "PrivateSingleDeviceStrategy", "privatize"]
