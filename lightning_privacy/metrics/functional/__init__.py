"""Leakage metrics as plain functions of tensors; the classes in `lightning_privacy.metrics`."""

from __future__ import annotations

from lightning_privacy.metrics.functional.epsilon import (
    BOUND_METHODS,
    clopper_pearson_epsilon,
    epsilon_lower_bound,
    gaussian_delta,
    gaussian_epsilon,
    gdp_epsilon,
    one_run_epsilon,
    one_run_fdp_epsilon,
)
from lightning_privacy.metrics.functional.mechanism import (
    GaussianProfile,
    Profile,
    curve_refuted,
    mechanism_epsilon_lower_bound,
    refuted_noise_factor,
)
from lightning_privacy.metrics.functional.membership import (
    membership_advantage,
    membership_auroc,
    tpr_at_fpr,
    user_inference_auroc,
)
from lightning_privacy.metrics.functional.memorization import (
    candidate_log_likelihoods,
    exposure,
    greedily_extracted,
    normalized_exposure,
    probably_extracted,
)

__all__ = [
    "BOUND_METHODS",
    "GaussianProfile",
    "Profile",
    "candidate_log_likelihoods",
    "clopper_pearson_epsilon",
    "curve_refuted",
    "epsilon_lower_bound",
    "exposure",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_epsilon",
    "greedily_extracted",
    "mechanism_epsilon_lower_bound",
    "membership_advantage",
    "membership_auroc",
    "normalized_exposure",
    "one_run_epsilon",
    "one_run_fdp_epsilon",
    "probably_extracted",
    "refuted_noise_factor",
    "tpr_at_fpr",
    "user_inference_auroc",
]
