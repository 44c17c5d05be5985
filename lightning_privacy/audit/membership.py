"""All membership figures of one attack together, as the monitor, the command and tables show them.

None of them is covered by ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_privacy.metrics.functional import (
    membership_advantage,
    membership_auroc,
    tpr_at_fpr,
)

if TYPE_CHECKING:
    from torch import Tensor

_SMALL_FPR = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipFigures:
    """How well one attack told members from others.

    Attributes:
        attack: Its name.
        auroc: Chance that a member's score is above another's.
        tpr: True-positive rate at a false-positive rate of 1 %.
        advantage: TPR − FPR at a threshold that was chosen on other scores.
        lower: Lower end of the advantage's 95 % interval.
        upper: Its upper end.
    """

    attack: str
    auroc: float
    tpr: float
    advantage: float
    lower: float
    upper: float

    def as_dict(self) -> dict[str, float]:
        """The figures by the names that tables and reports show."""
        return {
            "AUROC": self.auroc,
            "TPR at 1 % FPR": self.tpr,
            "advantage": self.advantage,
            "from": self.lower,
            "to": self.upper,
        }


def membership_figures(attack: str, scores: Tensor, member: Tensor) -> MembershipFigures:
    """Compute every figure of an attack.

    Args:
        attack: Its name.
        scores: ``[N]``; higher says "more likely a member".
        member: ``[N]`` whether each was trained on; at least two of each kind.

    Returns:
        The figures.

    Raises:
        ConfigurationError: Scores and memberships do not fit, or there are too few of a kind.
    """
    found = membership_advantage(scores, member)
    return MembershipFigures(
        attack=attack,
        auroc=float(membership_auroc(scores, member)),
        tpr=float(tpr_at_fpr(scores, member, _SMALL_FPR)),
        advantage=float(found.advantage),
        lower=float(found.lower),
        upper=float(found.upper),
    )
