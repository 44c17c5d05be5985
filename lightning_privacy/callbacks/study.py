"""`StudyMode`: a fit without clipping or without noise, marked in every place where it shows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning import LightningModule, Trainer

    from lightning_privacy.study import Study

MARK = "not_private"
"""The key under which every checkpoint of a study says so."""


class StudyMode(DifferentialPrivacy):
    """Trains with parts of the mechanism left out, to measure what they do. Not private.

    Draws, micro-batches, checks and planned steps are those of the callback that is studied; its
    noise is calibrated as ever and keeps that standard deviation where only clipping is left out.
    The ε of the run is infinite everywhere: on the progress bar, in the logs, in the closing table
    and for a ledger. Each of its checkpoints is marked, and no run can go on from one.

    Args:
        of: The mechanism that is studied; it must not have trained.
        study: What is left out.

    Raises:
        ConfigurationError: The callback has trained already.

    Example:
        >>> whole = DifferentialPrivacy(epsilon=8.0, delta=1e-6)
        >>> callback = StudyMode(whole, Study(without=("clipping",), not_private=True))
        ... # doctest: +SKIP
    """

    def __init__(self, of: DifferentialPrivacy, study: Study) -> None:
        if of.plan is not None:
            raise ConfigurationError(
                must="a study begins with a callback that has not trained",
                found=f"one that has made {of.steps} private steps",
                cost="private steps and others in one model, under one ε",
                remedy="make a DifferentialPrivacy for the study",
            )
        # The configuration is that of the other callback, argument for argument.
        vars(self).update(vars(of))
        self.settings = dataclasses.replace(of.settings, study=study, journal=False)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As ever, and say loudly what this is."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            self._print_banner()

    def _print_banner(self) -> None:
        from rich.console import Console
        from rich.panel import Panel

        study = self.settings.study
        assert study is not None
        Console().print(
            Panel(
                f"STUDY MODE: this training is NOT private. It runs without "
                f"{' and '.join(study.without)}; epsilon is infinite.",
                border_style="bold red",
            )
        )

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the checkpoint."""
        study = self.settings.study
        assert study is not None
        checkpoint[MARK] = f"study mode, without {' and '.join(study.without)}: epsilon is infinite"

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse to go on from a checkpoint; evaluating one is nothing special."""
        if self._stage not in {"fit", None}:
            return
        raise ConfigurationError(
            must="a study starts from its beginning",
            found="a checkpoint to go on from",
            cost="steps of two mechanisms in one model",
            remedy="run it anew; `compare` and `ablate` keep what whole runs have found",
        )
