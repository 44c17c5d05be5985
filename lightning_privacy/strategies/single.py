"""Private training on one device."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_privacy.strategies.base import privatize

PrivateSingleDeviceStrategy = privatize(SingleDeviceStrategy)
"""What ``Trainer(strategy="private")`` names: Lightning's `SingleDeviceStrategy`, made private."""
# A class is pickled by the place where it can be imported from.
PrivateSingleDeviceStrategy.__module__ = __name__

StrategyRegistry.register(
    "private",
    PrivateSingleDeviceStrategy,
    description="differentially private training on one device",
    override=True,
)
