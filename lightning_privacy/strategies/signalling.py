"""Which of the trainer's signal handlers wait until all ranks stand together, and where they do.

All stand together after a draw, where the callback answers, and after a validation.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_privacy.distributed import World


def take_signals(strategy: Any) -> None:
    """Note SIGTERM and SLURM's requeue signal from now on, where a private fit has several ranks.

    Args:
        strategy: The private strategy.
    """
    world = _ranks_of(strategy)
    if world is None:
        return
    # The checkpoint first: SIGTERM ends the fit.
    requeue = getattr(strategy.cluster_environment, "requeue_signal", None)
    world.signals.take_over([n for n in (requeue, signal.SIGTERM) if n], _is_lightnings)


def answer_signals(strategy: Any) -> None:
    """Do what any rank was asked while all of them validated.

    Args:
        strategy: The private strategy.
    """
    world = _ranks_of(strategy)
    if world is not None:
        world.gathered(None)
        world.signals.answer()


def _ranks_of(strategy: Any) -> World | None:
    run = strategy.private_run
    return None if run is None or run.world.alone else run.world


def _is_lightnings(handler: Any) -> bool:
    return type(handler).__module__.endswith("signal_connector")
