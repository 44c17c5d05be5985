"""LightningModules that know nothing of privacy."""

from __future__ import annotations

from lightning_privacy.models.base import TextModule
from lightning_privacy.models.composite import CompositeLoss
from lightning_privacy.models.decoders import PretrainedDecoder, SmallDecoder
from lightning_privacy.models.encoders import AudioSettings, ImageSettings
from lightning_privacy.models.language_model import CausalLanguageModel
from lightning_privacy.models.llama_qlora import LlamaQLoRA
from lightning_privacy.models.losses import example_losses, frozen_head_losses
from lightning_privacy.models.privacy_preserve_net import PrivacyPreserveNet

__all__ = [
    "AudioSettings",
    "CausalLanguageModel",
    "CompositeLoss",
    "ImageSettings",
    "LlamaQLoRA",
    "PretrainedDecoder",
    "PrivacyPreserveNet",
    "SmallDecoder",
    "TextModule",
    "example_losses",
    "frozen_head_losses",
]
