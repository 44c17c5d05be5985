"""Membership inference as metrics: AUROC, TPR at a small FPR, advantage, user inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchmetrics.utilities import dim_zero_cat

from lightning_privacy.metrics.base import ScoreMetric
from lightning_privacy.metrics.functional.membership import (
    membership_advantage,
    membership_auroc,
    tpr_at_fpr,
    user_inference_auroc,
)
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class MembershipAUROC(ScoreMetric):
    """Chance that a member's score is above a non-member's; 0.5 is a guess.

    See `lightning_privacy.metrics.functional.membership_auroc`.

    Example:
        >>> import torch
        >>> metric = MembershipAUROC()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        """The AUROC in [0, 1]."""
        return self._result(membership_auroc(*self._collected()))


class TPRAtFPR(ScoreMetric):
    """Largest true-positive rate of a threshold with at most a given false-positive rate.

    See `lightning_privacy.metrics.functional.tpr_at_fpr`.

    Args:
        fpr: False-positive rate in [0, 1].

    Raises:
        ConfigurationError: The rate is outside its range.
    """

    plot_upper_bound = 1.0

    def __init__(self, fpr: float = 0.01) -> None:
        super().__init__()
        self.fpr = real_number(
            "fpr", fpr, "[0, 1]", cost="no rate", remedy="pass for instance 0.01"
        )

    def compute(self) -> Tensor:
        """The true-positive rate in [0, 1]."""
        return self._result(tpr_at_fpr(*self._collected(), self.fpr))


class MembershipAdvantage(ScoreMetric):
    """TPR − FPR at a threshold that was chosen on other scores, with its confidence interval.

    `compute` returns a dictionary, for ``log_dict``: "advantage", "lower" and "upper". See
    `lightning_privacy.metrics.functional.membership_advantage`.

    Args:
        confidence: Of the interval, in (0, 1).
        seed: Divides the scores into halves.

    Raises:
        ConfigurationError: The confidence is outside its range.
    """

    def __init__(self, confidence: float = 0.95, seed: int = 0) -> None:
        super().__init__()
        self.confidence = real_number(
            "confidence", confidence, "(0, 1)", cost="no interval", remedy="pass 0.95"
        )
        self.seed = seed

    def compute(self) -> dict[str, Tensor]:
        """The advantage, and the ends of its interval."""
        found = membership_advantage(*self._collected(), confidence=self.confidence, seed=self.seed)
        return {name: self._result(value) for name, value in found._asdict().items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values with their intervals. Needs matplotlib.

        Args:
            val: What `compute` returned, or a list of it; computed if left out.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and the axes.
        """
        import matplotlib.pyplot as plt

        val = self.compute() if val is None else val
        values: Sequence[dict[str, Tensor]] = [val] if isinstance(val, dict) else val
        figure, ax = plt.subplots() if ax is None else (ax.get_figure(), ax)
        middle, low, high = (
            [float(value[name]) for value in values] for name in ("advantage", "lower", "upper")
        )
        reach = [[m - e for m, e in zip(middle, low, strict=True)],
                 [e - m for m, e in zip(middle, high, strict=True)]]  # fmt: skip
        ax.errorbar(range(len(middle)), middle, yerr=reach, marker="o", capsize=3)
        ax.axhline(0, color="gray", linewidth=1)
        ax.set_ylabel(f"MembershipAdvantage ({self.confidence:.0%} interval)")
        ax.set_xlabel("Step")
        return figure, ax


class UserInferenceAUROC(ScoreMetric):
    """AUROC of "was this user's data trained on?", from several texts of each user.

    See `lightning_privacy.metrics.functional.user_inference_auroc`.
    """

    plot_upper_bound = 1.0
    user: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("user", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, user: Tensor, member: Tensor) -> None:  # type: ignore[override]
        """Add the scores of texts.

        Args:
            scores: ``[N]`` one for each text.
            user: ``[N]`` whole numbers that name the texts' users.
            member: ``[N]`` whether that user was trained on.
        """
        super().update(scores, member)
        self.user.append(user.detach().flatten().to(scores.device))

    def compute(self) -> Tensor:
        """The AUROC over users in [0, 1]."""
        scores, member = self._collected()
        return self._result(user_inference_auroc(scores, dim_zero_cat(self.user), member))
