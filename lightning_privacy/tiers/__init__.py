"""Adaptive noise by sensitivity, done soundly: who belongs to which tier, and what a tier is owed.

1. *Segmentation* puts each user into a tier, by what is public or by that user's own record alone.
2. *Assessment* turns what is known of tiers, from public or declared data, into a target ε each.
3. *Adjustment* lowers a tier's clip norm or its rate, at one constant noise
   (`lightning_privacy.accounting.tiers`).
"""

from __future__ import annotations

from lightning_privacy.tiers.assessment import SensitivityPolicy, TierMeasures, measured_texts
from lightning_privacy.tiers.policy import TierPolicy
from lightning_privacy.tiers.segmentation import (
    ColumnTiers,
    FittedTiers,
    OwnRecordTiers,
    PublicTiers,
    Segmentation,
    VolumeTiers,
)

__all__ = [
    "ColumnTiers",
    "FittedTiers",
    "OwnRecordTiers",
    "PublicTiers",
    "Segmentation",
    "SensitivityPolicy",
    "TierMeasures",
    "TierPolicy",
    "VolumeTiers",
    "measured_texts",
]
