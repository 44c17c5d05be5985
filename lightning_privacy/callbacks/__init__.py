"""What a trainer is given: callbacks. `DifferentialPrivacy` alone makes a fit private."""

from __future__ import annotations

from lightning_privacy.callbacks.canaries import Canaries, CanaryAudit
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.callbacks.leakage_monitor import LeakageMonitor
from lightning_privacy.callbacks.privacy_report import PrivacyReport

__all__ = ["Canaries", "CanaryAudit", "DifferentialPrivacy", "LeakageMonitor", "PrivacyReport"]
