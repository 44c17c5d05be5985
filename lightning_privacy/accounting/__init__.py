"""Accounting: what was released, what ε it costs, how much noise an ε needs, what a crash charges.

Pure functions and small values; they know nothing of models, sampling or Lightning.
"""

from __future__ import annotations

from lightning_privacy.accounting.accountants import delta, epsilon
from lightning_privacy.accounting.budget import LedgerEntry, PrivacyLedger
from lightning_privacy.accounting.calibrate import max_steps, noise_multiplier_for
from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.accounting.journal import Journal
from lightning_privacy.accounting.ledger import Ledger
from lightning_privacy.accounting.table import plan_table

__all__ = [
    "GaussianRelease",
    "Journal",
    "Ledger",
    "LedgerEntry",
    "PrivacyLedger",
    "delta",
    "epsilon",
    "max_steps",
    "noise_multiplier_for",
    "plan_table",
]
