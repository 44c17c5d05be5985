"""Noise: where the randomness that carries the guarantee comes from."""

from __future__ import annotations

from lightning_privacy.noise.base import NoiseMechanism
from lightning_privacy.noise.bundling import bundles
from lightning_privacy.noise.gaussian import GaussianNoise, fresh_secret, secret_from_seed
from lightning_privacy.noise.grid import GridNoise

__all__ = [
    "GaussianNoise",
    "GridNoise",
    "NoiseMechanism",
    "bundles",
    "fresh_secret",
    "secret_from_seed",
]
