"""LightningModules that know nothing of privacy."""

from __future__ import annotations

from lightning_privacy.models.base import TextModule
from lightning_privacy.models.language_model import CausalLanguageModel
from lightning_privacy.models.llama_qlora import LlamaQLoRA
from lightning_privacy.models.losses import example_losses, frozen_head_losses

__all__ = [
    "CausalLanguageModel",
    "LlamaQLoRA",
    "TextModule",
    "example_losses",
    "frozen_head_losses",
]
