"""What a trainer is given: callbacks. `DifferentialPrivacy` alone makes a fit private."""

from __future__ import annotations

from lightning_privacy.callbacks.attention_noise import AttentionNoise
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.callbacks.hidden_states import PrivateHiddenStates

__all__ = ["AttentionNoise", "DifferentialPrivacy", "PrivateHiddenStates"]
