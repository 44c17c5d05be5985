"""`PrivacyReport`: one JSON and one HTML page that say what a run promised, spent and left open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.callbacks._home import Results
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports import (
    Finding,
    RunFacts,
    Statements,
    privacy_record,
    write_report,
)
from lightning_privacy.reports.files import file_hash, weights_hash

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MOST_LOSSES = 800
_SHOWN = ("clipped_share", "mean_norm", "noise_to_signal")


class PrivacyReport(Callback):
    """Writes ``privacy_report.json`` and ``privacy_report.html`` when a fit ends, or fails.

    The page says what is protected, how, at which price, and what is not: unit, neighbours,
    mechanism, ε at every δ, accountant, what is covered and what is not, what the ledger holds,
    leakage that other callbacks measured, the course of the training, versions, and the hash of
    the checkpoint; and it answers what "How to DP-fy ML" (Ponomareva et al. 2023, arXiv 2303.00654)
    and NIST SP 800-226 ask of a claim. It needs no network and holds no secret.

    What stands there *not covered by ε* was computed on private data: the page is for those who
    may see the data. `lightning-privacy report RUN_DIR --covered_only` makes one without it.

    Args:
        directory: Where the files go; by default where the logger writes, or the trainer's root.
        statements: What only people know of the run; what they leave out is shown as not stated.

    Raises:
        ConfigurationError: When a fit starts without `DifferentialPrivacy`.

    Example:
        >>> callbacks = [DifferentialPrivacy(epsilon=8.0, delta=1e-6), PrivacyReport()]
        >>> trainer = Trainer(max_epochs=3, callbacks=callbacks)  # doctest: +SKIP
    """

    def __init__(
        self, *, directory: str | None = None, statements: Statements | None = None
    ) -> None:
        self.directory = directory
        self.statements = statements or Statements()
        self.page: Path | None = None
        self._losses: list[tuple[int, Tensor]] = []
        self._stride = 1
        self.home = Results(self, "page")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the callback that is reported on."""
        if stage == "fit":
            privacy_of(trainer, self)
            self._losses, self._stride = [], 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss, without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and trainer.global_step % self._stride == 0:
            self._losses.append((trainer.global_step, loss.detach()))
        if len(self._losses) > _MOST_LOSSES:
            self._losses, self._stride = self._losses[::2], 2 * self._stride

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._write(trainer, pl_module, "completed")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write it of a run that failed, too: what it released stays released."""
        # The message may quote data.
        name = type(exception).__name__
        self._write(trainer, pl_module, f"The run ended with {name}. What it released is charged.")

    def _write(self, trainer: Trainer, pl_module: LightningModule, outcome: str) -> None:
        privacy = privacy_of(trainer, self)
        # Refused before anything was planned: nothing was released.
        if privacy.plan is None or not trainer.is_global_zero:
            return
        facts = RunFacts(
            outcome=outcome,
            dependences=tuple(_dependences(trainer)),
            ledger=_ledger_of(privacy),
            findings=tuple(_findings(trainer)),
            series=self._series(privacy),
            checkpoint=_checkpoint(trainer, pl_module),
            statements=self.statements,
        )
        place = Path(self.directory or _log_directory(trainer))
        self.page = write_report(privacy_record(privacy.summary(), facts), place)
        rank_zero_info(f"PrivacyReport: {self.page}")

    def _series(self, privacy: DifferentialPrivacy) -> dict[str, Sequence[tuple[float, float]]]:
        losses = [(float(step), float(loss)) for step, loss in self._losses if loss.numel() == 1]
        found: dict[str, Sequence[tuple[float, float]]] = {"loss": losses}
        for name in _SHOWN:
            history = privacy._tally.history
            found[name] = [(float(n), values[name]) for n, values in history if name in values]
        return found


def privacy_of(trainer: Any, asking: Callback) -> DifferentialPrivacy:
    """Find the callback that makes a fit private.

    Args:
        trainer: The trainer of the fit.
        asking: The callback that needs it.

    Returns:
        The callback.

    Raises:
        ConfigurationError: There is none.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, DifferentialPrivacy):
            return callback
    raise ConfigurationError(
        must=f"{type(asking).__name__} goes with a DifferentialPrivacy callback of the trainer",
        found="none in the trainer's callbacks",
        cost="a report, or an audit, of a training without privacy",
        remedy="add DifferentialPrivacy to Trainer(callbacks=[...])",
    )


def _log_directory(trainer: Any) -> str:
    # `trainer.log_dir` waits for all processes, of which some may have died.
    first = trainer.loggers[0] if trainer.loggers else None
    own = getattr(first, "log_dir", None) or getattr(first, "save_dir", None)
    return own or trainer.default_root_dir


def _findings(trainer: Any) -> Iterator[Finding]:
    """What other callbacks measured: whoever has findings has a method of that name."""
    for callback in trainer.callbacks:
        findings = getattr(callback, "findings", None)
        if callable(findings):
            yield from findings()


def _dependences(trainer: Any) -> Iterator[str]:
    """What the configuration lets depend on data or outputs, besides the weights."""
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, EarlyStopping):
            yield f"Early stopping by {monitor!r}: the headline ε is that of all planned steps."
        elif isinstance(callback, Checkpoint) and monitor is not None:
            yield f"Choice of the best checkpoint, and perhaps its file name, by {monitor!r}."
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            yield f"Learning rate lowered at a plateau of {config.monitor!r}."


def _ledger_of(privacy: DifferentialPrivacy) -> dict[str, Any] | None:
    ledger = privacy._bookings.ledger
    if ledger is None:
        return None
    budget, delta = ledger.budget
    return {
        "dataset": ledger.dataset,
        "runs": len(ledger.entries()),
        "epsilon": shown_epsilon(ledger.epsilon()),
        "budget": budget,
        "delta": delta,
    }


def _checkpoint(trainer: Any, module: LightningModule) -> dict[str, str]:
    found = {}
    for callback in trainer.checkpoint_callbacks:
        for kind in ("best", "last"):
            path = getattr(callback, f"{kind}_model_path", "")
            if path and Path(path).is_file():
                # A name that holds a figure is not covered by ε.
                named = kind == "last" or getattr(callback, "monitor", None) is None
                title = f"{kind} checkpoint" + (f", {Path(path).name}" if named else "")
                found[f"{title}, SHA-256"] = file_hash(Path(path))
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    # Of sharded parameters one process has a part only.
    if not any(hasattr(parameter, "full_tensor") for parameter in trained.values()):
        with torch.no_grad():
            found["trained weights at the end, SHA-256"] = weights_hash(trained)
    return found
