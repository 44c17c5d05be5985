"""Which of the trainer's signal handlers wait until all ranks stand together, and where they do.

All stand together after a draw, where the callback answers, and after a validation.
"""

from __future__ import annotations

import signal
from typing import Any


def take_signals(strategy: Any) -> None:
    """Note SIGTERM and SLURM's requeue signal from now on, where a private fit has several ranks.

    Args:
        strategy: The private strategy.
    """
    run = strategy.private_run
    if run is None or run.world.alone:
        return
    # The checkpoint first: SIGTERM ends the fit.
    requeue = getattr(strategy.cluster_environment, "requeue_signal", None)
    run.world.signals.take_over([n for n in (requeue, signal.SIGTERM) if n], _is_lightnings)


def answer_signals(strategy: Any) -> None:
    """Do what any rank was asked while all of them validated.

    Args:
        strategy: The private strategy.
    """
    run = strategy.private_run
    if run is None or run.world.alone:
        return
    run.world.gathered(None)
    run.world.signals.answer()


def _is_lightnings(handler: Any) -> bool:
    return type(handler).__module__.endswith("signal_connector")
