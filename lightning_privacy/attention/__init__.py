"""Noise in attention: made by a counter, the same whenever it is computed again. It earns no ε."""

from __future__ import annotations

from lightning_privacy.attention.counter import noise_matrix, standard_normal
from lightning_privacy.attention.inject import find, inject
from lightning_privacy.attention.modules import NoisyAttention
from lightning_privacy.attention.realisation import Injection, LayerNoise

__all__ = [
    "Injection",
    "LayerNoise",
    "NoisyAttention",
    "find",
    "inject",
    "noise_matrix",
    "standard_normal",
]
