"""Check what a model leaks, and that the trainer keeps its promise.

`attacks` score examples; `lightning_privacy.metrics` turns scores into figures; the bounds here set
them beside the claim.
"""

from __future__ import annotations

from lightning_privacy.audit.attacks.blind import BlindBaseline, blind_baseline
from lightning_privacy.audit.attacks.texts import score_texts
from lightning_privacy.audit.bounds import (
    FamilyBound,
    ReleaseProfile,
    advantage_ceiling,
    claim_refuted,
    family_epsilon,
    generic_advantage_ceiling,
    neyman_pearson_scores,
    neyman_pearson_threshold,
)
from lightning_privacy.audit.checks import Check
from lightning_privacy.audit.leakage import (
    Leakage,
    SecretFigures,
    measure_leakage,
    secret_figures,
)
from lightning_privacy.audit.membership import MembershipFigures, membership_figures
from lightning_privacy.audit.users import UserInference
from lightning_privacy.audit.verify import TrainerAudit, trainer_tightness, verify_trainer

__all__ = [
    "BlindBaseline",
    "Check",
    "FamilyBound",
    "Leakage",
    "MembershipFigures",
    "ReleaseProfile",
    "SecretFigures",
    "TrainerAudit",
    "UserInference",
    "advantage_ceiling",
    "blind_baseline",
    "claim_refuted",
    "family_epsilon",
    "generic_advantage_ceiling",
    "measure_leakage",
    "membership_figures",
    "neyman_pearson_scores",
    "neyman_pearson_threshold",
    "score_texts",
    "secret_figures",
    "trainer_tightness",
    "verify_trainer",
]
