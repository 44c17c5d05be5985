"""A small causal language model of the Llama kind, randomly initialised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch.optim.lr_scheduler import LambdaLR

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

IGNORED_LABEL = -100

Schedule = Literal["constant", "linear", "cosine"]


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute each example's mean loss per predicted token.

    Row i depends on row i alone: it is divided by its own number of labels. (The mean over all
    labels of a batch, usual for language models, divides by what the *other* rows hold, and then
    one example can move another one's gradient.)

    Args:
        logits: Scores [B, T, vocabulary]; position t predicts the token at t + 1.
        labels: Tokens [B, T], −100 where nothing is to be predicted.

    Returns:
        Cross entropies [B] in nats per token, float32; 0 for a row without labels.
    """
    # Shifting the labels, not the scores, saves a copy of the largest tensor of the model.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    ).view(targets.shape)
    return losses.sum(dim=1) / (targets != IGNORED_LABEL).sum(dim=1).clamp(min=1)


class CausalLanguageModel(LightningModule):
    """A Llama of any size, trained from random weights with AdamW.

    The loss is the mean over the examples of each example's own mean per token. It logs
    ``train_loss``, ``val_loss`` and ``test_loss``.

    Args:
        vocab_size: Different tokens, at least the tokeniser's.
        hidden_size: Width; a multiple of twice ``num_heads``.
        num_layers: Blocks.
        num_heads: Attention heads.
        num_key_value_heads: Heads of keys and values; divides ``num_heads``.
        intermediate_size: Inner width of the feed-forward part; null for 8/3 of the width.
        max_length: Longest row in tokens.
        tie_embeddings: Use one matrix for the embedding and the output.
        attention_dropout: Dropout on the attention weights, from 0 to below 1.
        gradient_checkpointing: Recompute activations in the backward to save memory.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's two moments.
        schedule: What the learning rate does after the warm-up, by optimizer step.
        warmup_steps: Optimizer steps until the learning rate reaches its peak.

    Raises:
        ConfigurationError: If the sizes do not fit together.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        vocab_size: int = 259,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_key_value_heads: int = 2,
        intermediate_size: int | None = None,
        max_length: int = 256,
        tie_embeddings: bool = False,
        attention_dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        _require_fitting_heads(hidden_size, num_heads, num_key_value_heads)
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            intermediate_size=intermediate_size or 8 * math.ceil(hidden_size / 3),
            max_position_embeddings=max_length,
            tie_word_embeddings=tie_embeddings,
            attention_dropout=attention_dropout,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.language_model = LlamaForCausalLM(config)
        if gradient_checkpointing:
            _enable_checkpointing(self.language_model)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Score every next token.

        Args:
            batch: ``input_ids`` [B, T], padded on the right, and whatever else.

        Returns:
            Logits [B, T, vocabulary].
        """
        # Padding stands on the right, where causal attention never looks: it needs no mask.
        logits: Tensor = self.language_model(input_ids=batch["input_ids"]).logits
        return logits

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T], padded on the right.

        Returns:
            Cross entropies [B] in nats per token.
        """
        return example_losses(self(batch), batch["labels"])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the mean over the examples of each one's own loss.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T].
            batch_idx: Lightning's signature; not used.

        Returns:
            The loss, a scalar.
        """
        return self._mean_loss("train_loss", batch)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the mean loss of the validation examples.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T].
            batch_idx: Lightning's signature; not used.
        """
        self._mean_loss("val_loss", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the mean loss of the test examples.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T].
            batch_idx: Lightning's signature; not used.
        """
        self._mean_loss("test_loss", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T].
            batch_idx: Lightning's signature; not used.

        Returns:
            Cross entropies [B] in nats per token.
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
        """Refuse a tokeniser or rows that do not fit the model.

        Args:
            stage: Lightning's stage; checked in every stage.

        Raises:
            ConfigurationError: If the data module has more tokens or longer rows than the model.
        """
        data = getattr(self.trainer, "datamodule", None)
        for name in ("vocab_size", "max_length"):
            needed, own = getattr(data, name, None), self.hparams[name]
            if isinstance(needed, int) and needed > own:
                raise ConfigurationError(
                    must=f"The model's `{name}` is at least the data's.",
                    found=f"The model has {own}, the data {needed}.",
                    cost="The model could not read some of the rows.",
                    remedy=f"Set `model.{name}` to {needed}.",
                )

    def _mean_loss(self, name: str, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self.losses(batch).mean()
        self.log(name, loss, prog_bar=name == "val_loss")
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


def _enable_checkpointing(model: Any) -> None:
    # The newer name; older versions of transformers know the other one only.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


def _require_fitting_heads(hidden_size: int, num_heads: int, num_key_value_heads: int) -> None:
    fits = (
        num_key_value_heads > 0
        and num_heads % num_key_value_heads == 0
        and hidden_size % (2 * num_heads) == 0
    )
    if not fits:
        raise ConfigurationError(
            must="`hidden_size` is a multiple of twice `num_heads`, and `num_heads` one of "
            "`num_key_value_heads`.",
            found=f"hidden_size={hidden_size}, num_heads={num_heads}, "
            f"num_key_value_heads={num_key_value_heads}.",
            cost="The attention heads cannot be cut out of the width.",
            remedy="Change one of the three, for instance 64, 4 and 2.",
        )
