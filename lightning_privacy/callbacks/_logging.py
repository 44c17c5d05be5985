"""What a private fit logs at each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_privacy.callbacks._epsilon import EpsilonSoFar
    from lightning_privacy.callbacks._tally import Tally

_EACH_STEP: Final[dict[str, Any]] = {"on_step": True, "on_epoch": False, "batch_size": 1}


def log_step(module: Any, so_far: EpsilonSoFar, count: int, tally: Tally, *, begun: bool) -> None:
    """Log ε, and now and then what the last draw looked like.

    Args:
        module: The module that is trained.
        so_far: Says ε.
        count: Private steps so far.
        tally: What the draws looked like, the same on all ranks.
        begun: Whether an epoch has begun with this step: Lightning forgot what was logged before.
    """
    spent = so_far.at(count)
    if math.isfinite(spent):
        spent = math.ceil(spent * 1000) / 1000  # the progress bar shows three digits
    if begun or spent != so_far.shown:  # logging takes Lightning nearly a millisecond
        module.log("privacy/epsilon", _here(spent), prog_bar=True, **_EACH_STEP)
        so_far.shown = spent
    every = module.trainer.log_every_n_steps
    if every and count % every == 0:
        tally.catch_up()
        for name, value in tally.latest.items():
            module.log(f"privacy/{name}", _here(value), **_EACH_STEP)


def _here(value: float) -> Tensor:
    """In the processor's memory: Lightning would send it to a GPU, and wait for the whole step."""
    return torch.tensor(float(value), device="cpu")


def log_early_end(count: int) -> None:
    """Say what an interrupted fit has spent: there is no closing table.

    Args:
        count: Private steps so far.
    """
    if count:
        rank_zero_info(
            f"DifferentialPrivacy: the fit ended early. The {count} private steps so far stay "
            "charged; fit(..., ckpt_path=...) with a checkpoint goes on, and counts them."
        )
