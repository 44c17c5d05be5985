"""`LeakageMonitor`: can members of the training data be told from others, epoch by epoch?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_privacy.audit.membership import MembershipFigures, membership_figures
from lightning_privacy.callbacks._canary_rows import without_canaries
from lightning_privacy.callbacks._home import Results
from lightning_privacy.callbacks._scoring import ExampleLosses
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports import Finding
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PREFIX = "not_covered_by_epsilon"
# Every process finds the same.
_LOGGED: dict[str, Any] = {
    "on_step": False,
    "on_epoch": True,
    "batch_size": 1,
    "rank_zero_only": True,
}
_NOTE = (
    "Members against held-out rows, by their loss (or by how much it fell since before the "
    "training). Comparable if a random split divided them before the training; an advantage's "
    "interval holds at 95 %."
)


class LeakageMonitor(Callback):
    """Attacks the model at the end of epochs, and logs what an attacker would learn.

    Two attacks that need forward passes only: by the loss, and by how much lower the loss is than
    before the training (with PEFT, than with the adapters switched off; otherwise than at the first
    step). Both work with and without `DifferentialPrivacy`, so that the two can be compared.

    Everything it logs was computed on private data and is **not covered by ε**; the names of what
    it logs begin with ``not_covered_by_epsilon/``. Deciding anything by them, such as when to
    stop, is a choice that is not covered either.

    The figures mean something only if members and held-out rows come from one random split made
    before the training; see `lightning_privacy.audit.blind_baseline`.

    Args:
        every_n_epochs: How often.
        rows: How many members, and how many held-out rows, are looked at; always the same ones.
        held_out: A map-style data set of rows that are not trained on; by default that of the
            (first) validation loader.
        losses: Gets module and batch and returns each example's loss ``[B]``; by default the
            module's method ``losses(batch)``, or its ``training_step`` on batches of one.
        seed: Chooses the rows.

    Attributes:
        history: For each look the epoch (from 1) and the figures of each attack.

    Raises:
        ConfigurationError: A number is outside its range, or a fit starts without held-out rows.

    Example:
        >>> monitor = LeakageMonitor(every_n_epochs=2, rows=128)
        >>> trainer = Trainer(max_epochs=8, callbacks=[monitor])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        rows: int = 256,
        held_out: Any = None,
        losses: Callable[[Any, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        cost, remedy = "no figure", "pass a positive whole number"
        self.every_n_epochs = whole_number(
            "every_n_epochs", every_n_epochs, at_least=1, cost=cost, remedy=remedy
        )
        self.rows = whole_number("rows", rows, at_least=4, cost=cost, remedy="pass at least 4")
        self.held_out, self.losses, self.seed = held_out, losses, seed
        self.history: list[tuple[int, tuple[MembershipFigures, ...]]] = []
        self._sides: tuple[_Side, _Side] | None = None
        self.home = Results(self, "history")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the rows, and remember their losses before the training."""
        loader: Any = trainer.train_dataloader
        score = ExampleLosses(trainer, loader.collate_fn, loader.batch_size or 1, self.losses)
        generator = torch.Generator().manual_seed(self.seed)
        datasets = without_canaries(loader.dataset), self._others(trainer)
        self.history = []
        first, second = (_Side(score, data, self.rows, generator) for data in datasets)
        self._sides = first, second
        if first.before is None:
            rank_zero_warn(
                "LeakageMonitor attacks by the loss alone: the model before the training is not "
                "known any more after a resume."
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack, and log."""
        epoch = trainer.current_epoch + 1
        if self._sides is None or epoch % self.every_n_epochs:
            return
        found = self._attacked(*self._sides)
        self.history.append((epoch, found))
        for figures in found:
            for name in ("auroc", "tpr", "advantage"):
                label = f"{PREFIX}/{figures.attack}_{name}"
                pl_module.log(label, getattr(figures, name), **_LOGGED)

    def findings(self) -> list[Finding]:
        """The figures of the last look, for a `PrivacyReport`.

        Returns:
            One for each attack; none before the first look.
        """
        if not self.history:
            return []
        epoch, found = self.history[-1]
        return [
            Finding(
                name=f"membership by {figures.attack}, epoch {epoch}",
                figures=figures.as_dict(),
                note=_NOTE,
            )
            for figures in found
        ]

    def _others(self, trainer: Any) -> Any:
        if self.held_out is not None:
            return self.held_out
        loaders = trainer.val_dataloaders
        first = loaders[0] if isinstance(loaders, list) and loaders else loaders
        if getattr(first, "dataset", None) is None:
            raise ConfigurationError(
                must="LeakageMonitor has held-out rows to compare the members with",
                found="no validation loader with a data set, and no held_out=",
                cost="a loss of members alone, which says nothing",
                remedy="pass LeakageMonitor(held_out=...), from the same random split",
            )
        return first.dataset

    @staticmethod
    def _attacked(members: _Side, others: _Side) -> tuple[MembershipFigures, ...]:
        inside, outside = members.losses(), others.losses()
        member = torch.arange(len(inside) + len(outside)) < len(inside)
        scores = {"loss": -torch.cat([inside, outside])}
        if members.before is not None and others.before is not None:
            scores["ratio"] = torch.cat([members.before, others.before]) + scores["loss"]
        return tuple(membership_figures(name, values, member) for name, values in scores.items())


class _Side:
    """Rows of one data set, and their losses before the training."""

    def __init__(
        self, score: ExampleLosses, dataset: Any, rows: int, generator: torch.Generator
    ) -> None:
        self._score, self._dataset = score, dataset
        order = torch.randperm(len(dataset), generator=generator)
        self._rows = order[:rows].tolist()
        self.before = score.before(dataset, self._rows)

    def losses(self) -> Tensor:
        return self._score(self._dataset, self._rows)
