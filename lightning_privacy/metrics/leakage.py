"""Privacy leakage in one metric: the membership advantage, and what an average hides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.metrics.functional.membership import tpr_at_fpr
from lightning_privacy.metrics.membership import MembershipAdvantage

if TYPE_CHECKING:
    from torch import Tensor


class PrivacyLeakage(MembershipAdvantage):
    """Membership advantage with its interval, and the TPR at 1 % FPR beside it.

    The PrivacyPreserveNet paper names a metric "privacy leakage" without defining it. This is our
    reading: TPR − FPR of a membership attack whose threshold was chosen on other scores, 0 without
    leakage. It is an average, so the rate at which members are named with hardly a false alarm is
    always given with it (Carlini et al. 2022, arXiv 2112.03570).

    `compute` returns a dictionary: "advantage", "lower", "upper" and "tpr_at_1_percent_fpr".

    Args:
        confidence: Of the interval, in (0, 1).
        seed: Divides the scores into halves.

    Raises:
        ConfigurationError: The confidence is outside its range.
    """

    def compute(self) -> dict[str, Tensor]:
        """The advantage, the ends of its interval, and the true-positive rate."""
        rate = self._result(tpr_at_fpr(*self._collected(), 0.01))
        return {**super().compute(), "tpr_at_1_percent_fpr": rate}
