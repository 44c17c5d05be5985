"""Noise: where the randomness that carries the guarantee comes from."""

from __future__ import annotations

from lightning_privacy.noise.base import NoiseMechanism
from lightning_privacy.noise.gaussian import GaussianNoise, fresh_secret, secret_from_seed

__all__ = ["GaussianNoise", "NoiseMechanism", "fresh_secret", "secret_from_seed"]
