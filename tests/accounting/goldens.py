"""Reads the golden numbers, and knows the Gaussian mechanism exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

from scipy.optimize import brentq
from scipy.special import log_ndtr

from lightning_privacy.accounting import GaussianRelease

_FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict:
    return json.loads((_FOLDER / f"{name}.json").read_text())


def release(noise_multiplier: float, sample_rate: float, count: int = 1) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=noise_multiplier, sample_rate=sample_rate, count=count)


def exact_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of N(μ, 1) against N(0, 1): Balle and Wang, arXiv 1805.06530, Theorem 8."""
    above = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    return above - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))


def exact_epsilon(mu: float, delta: float) -> float:
    if exact_delta(mu, 0.0) <= delta:
        return 0.0
    return brentq(lambda epsilon: exact_delta(mu, epsilon) - delta, 0, 1e4, xtol=1e-12)
