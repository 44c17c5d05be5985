"""One trained model of a table: the recipe's `fit` with a variant's changes, and its figures."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.pytorch import Callback

from lightning_privacy.cli.training import PrivacyCLI
from lightning_privacy.cli.variants import Variant, budget
from lightning_privacy.data import MultimodalDataModule
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics import PrivacyLeakage
from lightning_privacy.reports.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning import Trainer
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser
    from torch import Tensor

    from lightning_privacy.data import MultimodalDataset


def outcome_of(
    words: list[str],
    variant: Variant,
    seed: int,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    wait: bool,
) -> Outcome | None:
    """Train a model of a table, unless its outcome is there already.

    Args:
        words: Options of ``fit``.
        variant: What is changed.
        seed: Of the initial weights, and of who is held out.
        folder: Where logs and outcome go.
        progress: Called after each step with the steps made and those planned.
        wait: Whether to wait for another process that trains the same model.

    Returns:
        What the model reached; None if another process trains it and is not to be waited for.
    """
    place = place_of(folder, variant, seed)
    lock = FileLock(place.with_name(f"{place.name}.lock"), blocking=wait)
    try:
        with lock:
            return VariantFit(words, variant, seed, folder, progress).outcome
    except Timeout:
        return None


class VariantFit(PrivacyCLI):
    """Runs ``fit`` on a changed recipe, unless its outcome is there already.

    Args:
        words: Options of ``fit``.
        variant: What is changed.
        seed: Of the initial weights, and of who is held out.
        folder: Where logs and outcome go.
        progress: Called after each step with the steps made and those planned.

    Attributes:
        outcome: What the model reached.
    """

    def __init__(
        self,
        words: list[str],
        variant: Variant,
        seed: int,
        folder: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        self._variant, self._seed, self._progress = variant, seed, progress
        self._folder = place_of(folder, variant, seed)
        self._started = time.monotonic()
        self.outcome: Outcome | None = None
        super().__init__(["fit", *words])
        if self.outcome is None:
            self.outcome = self._measured()
            _write(self._file, {"recipe": self._digest, "outcome": asdict(self.outcome)})

    @property
    def _file(self) -> Path:
        return self._folder / "outcome.json"

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words, and change what the variant changes.

        Args:
            parser: The parser of all commands.
            args: The command and its options.
        """
        super().parse_arguments(parser, args)
        config = self.config.fit
        self._variant.change(config)
        config.seed_everything = self._seed
        config.compare_without_privacy = False
        for place in ("data.init_args", "data.init_args.corpus"):
            group = config.get(place)
            if group is not None and "seed" in group:
                group["seed"] = self._seed
        told = json.dumps(config.as_dict(), default=str, sort_keys=True)
        self._digest = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        config.privacy.print_table = False
        config.trainer.update(_quiet(self._folder))

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; nothing of it where the outcome is there already."""
        self.outcome = _read(self._file, self._digest)
        if self.outcome is not None:
            self.subcommand = None
            return
        # Of a run that was broken off, or of another recipe.
        shutil.rmtree(self._folder, ignore_errors=True)
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, which tells of its steps.

        Args:
            **kwargs: Arguments that override the configured ones.

        Returns:
            The trainer.
        """
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(_Steps(self._progress))  # type: ignore[attr-defined]
        return trainer

    def _measured(self) -> Outcome:
        seconds, data = time.monotonic() - self._started, self.datamodule
        if not isinstance(data, MultimodalDataModule) or data.task != "classification":
            raise _no_classes(type(data).__name__)
        members, members_labels = self._scores(data, data.dataset("train", augment=False))
        others, others_labels = self._scores(data, data.dataset("validation"))
        leakage = PrivacyLeakage()
        leakage.update(_attack(members, members_labels), torch.ones(len(members)))
        leakage.update(_attack(others, others_labels), torch.zeros(len(others)))
        return Outcome(
            model=self._variant.name,
            budget=budget(self._variant),
            epsilon=self._privacy.epsilon(),
            seed=self._seed,
            **_figures(*self._scores(data, data.dataset("test"))),
            **{name: float(value) for name, value in leakage.compute().items()},
            train_accuracy=float((members.argmax(1) == members_labels).double().mean()),
            steps=self.trainer.global_step,
            seconds=seconds,
        )

    def _scores(
        self, data: MultimodalDataModule, dataset: MultimodalDataset
    ) -> tuple[Tensor, Tensor]:
        found = self.trainer.predict(self.model, data.loader(dataset))
        assert found is not None
        labels = torch.tensor([example.label for example in dataset.examples])
        return torch.cat([part.float().cpu() for part in found]), labels  # type: ignore[union-attr]


class _Steps(Callback):
    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._progress(trainer.global_step, int(trainer.estimated_stepping_batches))


def _figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_auroc,
        multiclass_f1_score,
    )

    classes = scores.shape[1]
    return {
        "accuracy": float(multiclass_accuracy(scores, labels, classes, average="micro")),
        "f1": float(multiclass_f1_score(scores, labels, classes, average="macro")),
        "auroc": float(multiclass_auroc(scores, labels, classes, average="macro")),
    }


def _attack(scores: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of the own class: members are known better (Yeom et al. 2018)."""
    return scores.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


def _quiet(folder: Path) -> Namespace:
    log = {"save_dir": str(folder.parent), "name": folder.name, "version": "log"}
    return Namespace(
        logger=Namespace(
            class_path="lightning.pytorch.loggers.CSVLogger",
            init_args=Namespace(**log, prefix="", flush_logs_every_n_steps=100),
        ),
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def place_of(folder: Path, variant: Variant, seed: int) -> Path:
    """Where the logs and the outcome of a model are.

    Args:
        folder: Of the table.
        variant: What is changed.
        seed: Of the model.

    Returns:
        A folder, which may not be there yet.
    """
    return folder / f"{_slug(variant)}-seed{seed}"


def _slug(variant: Variant) -> str:
    words = "".join(c if c.isalnum() else " " for c in variant.name.lower()).split()
    return "-".join([*words, *([] if variant.epsilon is None else [f"eps{variant.epsilon:g}"])])


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a run that is killed here begins anew.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values, indent=1))
    draft.replace(path)


def _read(path: Path, digest: str) -> Outcome | None:
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return Outcome(**values["outcome"]) if values["recipe"] == digest else None


def _no_classes(found: str) -> ConfigurationError:
    return ConfigurationError(
        must="the recipe's data are a MultimodalDataModule of a classification",
        found=found,
        cost="a table without accuracy",
        remedy="start from recipes/multimodal/quick.yaml",
    )
