"""Attacks: scores that tell members from non-members, and inputs rebuilt from gradients.

A score is higher for what looks like a member; `lightning_privacy.metrics` turns scores into
figures. A figure shows what one attack found, and no figure shows that there is nothing to find.
"""

from __future__ import annotations

from lightning_privacy.audit.attacks.blind import BlindBaseline, blind_baseline
from lightning_privacy.audit.attacks.reconstruction import (
    invert_gradient,
    peak_signal_to_noise,
    recover_tokens,
    structural_similarity,
    token_recovery,
)
from lightning_privacy.audit.attacks.scores import (
    TokenScores,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    token_scores,
    zlib_score,
)
from lightning_privacy.audit.attacks.shadow import (
    ShadowModels,
    lira_offline,
    lira_online,
    logit_confidence,
    rmia,
    train_shadows,
)
from lightning_privacy.audit.attacks.texts import adapters_off, model_logits, score_texts
from lightning_privacy.audit.attacks.users import UserScores, infer_users, user_scores

__all__ = [
    "BlindBaseline",
    "ShadowModels",
    "TokenScores",
    "UserScores",
    "adapters_off",
    "blind_baseline",
    "infer_users",
    "invert_gradient",
    "lira_offline",
    "lira_online",
    "logit_confidence",
    "loss_score",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_logits",
    "peak_signal_to_noise",
    "ratio_score",
    "recover_tokens",
    "rmia",
    "score_texts",
    "structural_similarity",
    "token_recovery",
    "token_scores",
    "train_shadows",
    "user_scores",
    "zlib_score",
]
