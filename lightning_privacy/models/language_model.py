"""A small causal language model of the Llama kind, randomly initialised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models.base import Schedule, TextModule, enable_checkpointing
from lightning_privacy.models.losses import example_losses

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class CausalLanguageModel(TextModule):
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
        super().__init__(learning_rate, weight_decay, betas, schedule, warmup_steps)
        self.save_hyperparameters()
        require_fitting_heads(hidden_size, num_heads, num_key_value_heads)
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
            enable_checkpointing(self.language_model)

    @property
    def limits(self) -> dict[str, int]:
        """The size of the vocabulary and the longest row."""
        return {name: self.hparams[name] for name in ("vocab_size", "max_length")}

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


def require_fitting_heads(hidden_size: int, num_heads: int, num_key_value_heads: int) -> None:
    """Refuse attention heads that cannot be cut out of the width.

    Args:
        hidden_size: Width.
        num_heads: Attention heads.
        num_key_value_heads: Heads of keys and values.

    Raises:
        ConfigurationError: If they do not fit together.
    """
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
