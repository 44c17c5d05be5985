"""What a trainer is given: callbacks. `DifferentialPrivacy` alone makes a fit private."""

from __future__ import annotations

from lightning_privacy.callbacks.checkpoints import newest_checkpoint
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy

__all__ = ["DifferentialPrivacy", "newest_checkpoint"]
