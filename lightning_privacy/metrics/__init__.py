"""How much a trained model gives away, as torchmetrics classes.

None of these figures is covered by ε: they are computed on private data, and say what one attack
found, not what no attack can find. Their twins without state are in `functional`.
"""

from __future__ import annotations

from lightning_privacy.metrics.epsilon import EpsilonLowerBound, MechanismEpsilonLowerBound
from lightning_privacy.metrics.leakage import PrivacyLeakage
from lightning_privacy.metrics.membership import (
    MembershipAdvantage,
    MembershipAUROC,
    TPRAtFPR,
    UserInferenceAUROC,
)
from lightning_privacy.metrics.memorization import Exposure, ExtractionRate

__all__ = [
    "EpsilonLowerBound",
    "Exposure",
    "ExtractionRate",
    "MechanismEpsilonLowerBound",
    "MembershipAUROC",
    "MembershipAdvantage",
    "PrivacyLeakage",
    "TPRAtFPR",
    "UserInferenceAUROC",
]
