"""The same configuration without privacy: an ordinary trainer, from the same initial weights."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_privacy.audit import measure_leakage
from lightning_privacy.errors import UnsupportedOperationError
from lightning_privacy.reports import not_covered

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightning import LightningDataModule, LightningModule

# Enough to tell the two models apart, and a few seconds for small ones.
_ROWS, _USERS = 512, 48
# What decides how fast and how precisely a step is computed, and how it is shown.
_KEPT = (
    "accelerator",
    "benchmark",
    "default_root_dir",
    "deterministic",
    "devices",
    "enable_progress_bar",
    "inference_mode",
    "limit_val_batches",
    "precision",
)


def train_without_privacy(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    trainer_settings: Mapping[str, Any],
    *,
    steps: int,
    batch_size: float,
) -> float | None:
    """Train a model without privacy, as a figure to compare with.

    Args:
        model: With its initial weights; it is trained in place.
        datamodule: Where the data come from; None where the module has its own loaders.
        trainer_settings: Arguments of the private run's trainer.
        steps: Optimizer steps to make, as many as the private run made.
        batch_size: Rows of an optimizer step, as many as a private step drew on average.

    Returns:
        The validation loss of the trained model, or None if the module logs none. It is not
        covered by any ε.
    """
    source: Any = datamodule or model
    loader, accumulated = _ordinary_loader(source.train_dataloader(), batch_size)
    epochs = math.ceil(steps * accumulated / len(loader))
    with without_announcements():
        trainer = Trainer(
            **{name: trainer_settings[name] for name in _KEPT if name in trainer_settings},
            max_steps=steps,
            max_epochs=epochs,
            # Once, at the end: nobody looks at the losses before.
            check_val_every_n_epoch=epochs,
            accumulate_grad_batches=accumulated,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        validation = source.val_dataloader() if _validates(model, datamodule) else None
        trainer.fit(model, train_dataloaders=loader, val_dataloaders=validation)
        return validation_loss(trainer, model, datamodule)


def validation_loss(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None
) -> float | None:
    """Validate a model and find the loss among what it logs.

    Args:
        trainer: Runs the validation.
        model: The model.
        datamodule: Where the data come from; None where the module has its own loaders.

    Returns:
        ``val_loss`` if it is logged, else the first figure whose name has both words; None if the
        module does not validate or logs no loss.
    """
    if not _validates(model, datamodule):
        return None
    metrics = trainer.validate(model, datamodule=datamodule, verbose=False)[0]
    likely = [name for name in metrics if "val" in name and "loss" in name]
    names = [name for name in ("val_loss", *likely) if name in metrics]
    return float(metrics[names[0]]) if names else None


def leakage_rows(
    private: LightningModule,
    without: LightningModule,
    initial: LightningModule,
    datamodule: LightningDataModule | None,
) -> list[tuple[str, str]]:
    """Attack both models with the training data, and lay out what was found.

    Args:
        private: The model that was trained privately.
        without: The one that made as many steps without privacy.
        initial: What both were before.
        datamodule: Where the data come from; without one nothing is measured.

    Returns:
        Labels, marked as not covered by ε, and values: membership AUROC, and on the embedded corpus
        the exposure of members' secrets. Nothing for a module without ``losses(batch)``.
    """
    if datamodule is None:
        return []
    try:
        found = [
            measure_leakage(
                model, datamodule, reference=initial, rows=_ROWS, users=_USERS, blind=False
            )
            for model in (private, without)
        ]
    except UnsupportedOperationError:
        return []
    rows = []
    for one, end in zip(found, ("", " without privacy"), strict=True):
        best = {figures.attack: figures.auroc for figures in one.membership}
        value = best.get("ratio", best["loss"])
        rows.append((not_covered(f"membership AUROC{end}"), f"{value:.3f} (0.5 is a guess)"))
    for one, end in zip(found, ("", " without privacy"), strict=True):
        if one.secrets is not None:
            bits = f"{one.secrets.inside:.2f} of {one.secrets.largest:.2f} bits"
            rows.append((not_covered(f"secret exposure{end}"), bits))
    if found[0].secrets is not None:
        bits = f"{found[0].secrets.outside:.2f} bits (1.44 expected)"
        rows.append((not_covered("exposure of unseen secrets"), bits))
    return rows


def _validates(model: LightningModule, datamodule: LightningDataModule | None) -> bool:
    has_data = is_overridden("val_dataloader", datamodule or model)
    return has_data and is_overridden("validation_step", model)


def _ordinary_loader(base: Any, batch_size: float) -> tuple[DataLoader[Any], int]:
    accumulated = math.ceil(batch_size / base.batch_size)
    loader: DataLoader[Any] = DataLoader(
        base.dataset,
        batch_size=max(1, round(batch_size / accumulated)),
        shuffle=True,
        collate_fn=base.collate_fn,
        num_workers=base.num_workers,
        pin_memory=base.pin_memory,
    )
    return loader, accumulated


@contextmanager
def without_announcements() -> Iterator[None]:
    """Leave out what Lightning says of the hardware at the start of each trainer."""
    announcer = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = announcer.level
    announcer.setLevel(logging.WARNING)
    try:
        yield
    finally:
        announcer.setLevel(level)
