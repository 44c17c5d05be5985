"""Private training on several devices, with a replica of the module on each."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_privacy.strategies.base import privatize

PrivateDDPStrategy = privatize(DDPStrategy)
"""What ``Trainer(strategy="private_ddp")`` names: Lightning's `DDPStrategy`, made private."""
# A class is pickled by the place where it can be imported from.
PrivateDDPStrategy.__module__ = __name__

for _name, _start in {
    "private_ddp": "popen",
    "private_ddp_spawn": "spawn",
    "private_ddp_fork": "fork",
    "private_ddp_notebook": "fork",
}.items():
    StrategyRegistry.register(
        _name,
        PrivateDDPStrategy,
        description=f"differentially private training on several devices; start method {_start}",
        override=True,
        start_method=_start,
    )
