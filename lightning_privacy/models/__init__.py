"""LightningModules that know nothing of privacy."""

from __future__ import annotations

from lightning_privacy.models.language_model import CausalLanguageModel, example_losses

__all__ = ["CausalLanguageModel", "example_losses"]
