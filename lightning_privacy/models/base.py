"""What the text models share: the steps, AdamW with its schedule, and the fit with the data."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch.optim.lr_scheduler import LambdaLR

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Schedule = Literal["constant", "linear", "cosine"]

_OF_A_CHECKPOINT = {
    "vocab_size": "; where a checkpoint decides it, use the checkpoint's own tokeniser.",
    "max_length": "; where a checkpoint decides it, lower `data.max_length`.",
}


class TextModule(LightningModule):
    """A text model with one loss per example, trained with AdamW.

    The training loss is the mean over the examples of each example's own. It logs ``train_loss``,
    ``val_loss`` and ``test_loss``.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's two moments.
        schedule: What the learning rate does after the warm-up, by optimizer step.
        warmup_steps: Optimizer steps until the learning rate reaches its peak.
    """

    task: str = "causal_lm"
    # Under which option of `model` a limit is set, where it is not its own name.
    _options: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        schedule: Schedule,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: Tensors led by the B examples.

        Returns:
            Losses [B] in nats.
        """

    @property
    @abstractmethod
    def limits(self) -> dict[str, int]:
        """What the data may ask of the model at most: ``vocab_size``, ``max_length``, classes."""

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the mean over the examples of each one's own loss.

        Args:
            batch: Tensors led by the B examples.
            batch_idx: Lightning's signature; not used.

        Returns:
            The loss, a scalar.
        """
        return self._mean_loss("train_loss", batch)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the mean loss of the validation examples.

        Args:
            batch: Tensors led by the B examples.
            batch_idx: Lightning's signature; not used.
        """
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the mean loss of the test examples.

        Args:
            batch: Tensors led by the B examples.
            batch_idx: Lightning's signature; not used.
        """
        self._evaluate("test", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: Tensors led by the B examples.
            batch_idx: Lightning's signature; not used.

        Returns:
            Losses [B] in nats.
        """
        return self.losses(batch)

    def configure_optimizers(self) -> Any:
        """Set up AdamW, with a schedule by optimizer step unless it is constant.

        Returns:
            The optimizer, or Lightning's dictionary of optimizer and schedule.
        """
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
        )
        if self.schedule == "constant" and self.warmup_steps == 0:
            return optimizer
        steps = self._planned_steps() if self.schedule != "constant" else 0

        def factor(step: int) -> float:
            return learning_rate_factor(step, self.schedule, self.warmup_steps, steps)

        by_step = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def setup(self, stage: str) -> None:
        """Refuse a tokeniser, rows, classes or a task of the data that do not fit the model.

        Args:
            stage: Lightning's stage; checked in every stage.

        Raises:
            ConfigurationError: If the data module has more tokens, longer rows, more classes or
                another task than the model.
        """
        data = getattr(self.trainer, "datamodule", None)
        task = getattr(data, "task", self.task)
        if task != self.task:
            raise ConfigurationError(
                must="Model and data have the same task.",
                found=f"The model's is '{self.task}', the data's '{task}'.",
                cost="The labels would mean something else than the model predicts.",
                remedy=f"Set `model.task` to '{task}', or choose another data module.",
            )
        for name, own in self.limits.items():
            needed = getattr(data, name, None)
            if isinstance(needed, int) and needed > own:
                raise ConfigurationError(
                    must=f"The model's `{name}` is at least the data's.",
                    found=f"The model has {own}, the data {needed}.",
                    cost="The model could not read or name some of the rows.",
                    remedy=f"Set `model.{self._options.get(name, name)}` to {needed}"
                    + _OF_A_CHECKPOINT.get(name, "."),
                )

    def _evaluate(self, name: str, batch: Mapping[str, Tensor]) -> None:
        self._mean_loss(f"{name}_loss", batch)

    def _mean_loss(self, name: str, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self.losses(batch).mean()
        # Of several devices each sees a part of the validation set.
        everywhere = name != "train_loss"
        self.log(name, loss, prog_bar=name == "val_loss", sync_dist=everywhere)
        return loss

    def _planned_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigurationError(
                must=f"The schedule '{self.schedule}' knows the number of steps beforehand.",
                found="Neither `max_steps` nor `max_epochs` of the Trainer is set.",
                cost="The learning rate has no end to fall to.",
                remedy="Set `trainer.max_steps`, or use the schedule 'constant'.",
            )
        return int(steps)


def learning_rate_factor(step: int, schedule: Schedule, warmup_steps: int, steps: int) -> float:
    """Compute the share of the peak learning rate at one step.

    Args:
        step: Optimizer steps done, from 0.
        schedule: What happens after the warm-up.
        warmup_steps: Steps until the peak.
        steps: All steps; not used by ``"constant"``.

    Returns:
        From 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def enable_checkpointing(model: Any) -> None:
    """Recompute a transformers model's blocks in the backward, by non-reentrant checkpointing.

    Args:
        model: A model of transformers; it does so in training mode only.
    """
    # The newer name; older versions of transformers know the other one only.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
