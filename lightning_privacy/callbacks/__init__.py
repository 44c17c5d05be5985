"""What a trainer is given: callbacks. `DifferentialPrivacy` alone makes a fit private."""

from __future__ import annotations

from lightning_privacy.callbacks.attention_noise import AttentionNoise
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.callbacks.hidden_states import PrivateHiddenStates
from lightning_privacy.callbacks.memory_cap import MemoryCap
from lightning_privacy.callbacks.study import StudyMode
from lightning_privacy.study import Study

__all__ = [
    "AttentionNoise",
    "DifferentialPrivacy",
    "MemoryCap",
    "PrivateHiddenStates",
    "Study",
    "StudyMode",
]
