"""A plan with individual budgets: from a policy to one noise and each tier's share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting.tiers import calibrated_tiers
from lightning_privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from lightning_privacy.tiers import TierPolicy


def tiered_plan(policy: TierPolicy, fixed: dict[str, Any], steps: int) -> PrivacyPlan:
    """Plan so that each tier keeps its own target.

    Args:
        policy: Targets, shares and method.
        fixed: The other fields of the plan; its clip norm and rate are means over all users.
        steps: Planned number of private steps.

    Returns:
        The plan, with the largest clip norm and rate; its ε is that of the loosest tier.
    """
    found = calibrated_tiers(
        targets=policy.targets,
        shares=policy.shares,
        method="scale" if policy.method == "scale" else "sample",
        sample_rate=fixed["sample_rate"],
        steps=steps,
        delta=fixed["delta"],
    )
    unseen = (1 + fixed["precision_slack"]) * math.sqrt(fixed["releases_per_draw"])
    own = {
        "tiers": found.tiers,
        "tiers_published": policy.segmentation.basis == "public",
        "noise_multiplier": found.noise_multiplier * unseen * (1 + 1e-12),
        "sample_rate": found.sample_rate,
        "clip_norm": fixed["clip_norm"] * found.clip_factor,
        "steps": steps,
    }
    return PrivacyPlan(**{**fixed, **own})


def tier_settings(policy: TierPolicy, fixed: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must not change, as plain values.

    Args:
        policy: The policy.
        fixed: The other fields of the plan.

    Returns:
        Targets, shares, method, basis, and the mean clip norm and rate.
    """
    return {
        "targets": dict(policy.targets),
        "shares": dict(policy.shares),
        "method": policy.method,
        "basis": policy.segmentation.basis,
        "clip_norm": fixed["clip_norm"],
        "sample_rate": fixed["sample_rate"],
    }
