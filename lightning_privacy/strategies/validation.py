"""When does Lightning validate?"""

from __future__ import annotations

from typing import Any


def validation_may_follow(trainer: Any) -> bool:
    """Whether Lightning may validate after the current batch, before the next.

    Args:
        trainer: The trainer, in a batch.

    Returns:
        False if it will not, unless a callback asks it to stop.
    """
    if not trainer.enable_validation:
        return False
    every, loop = trainer.val_check_batch, trainer.fit_loop
    if trainer.is_last_batch or not isinstance(every, int):
        return True  # an interval may be a time
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return bool((done + 1) % every == 0)
