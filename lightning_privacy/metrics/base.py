"""What the metrics over attack scores share: two lists that grow, and are joined across ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

if TYPE_CHECKING:
    from collections.abc import Sequence


class ScoreMetric(Metric):
    """Keeps all scores and memberships; processes join theirs before `compute`."""

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    plot_lower_bound = 0.0
    scores: list[Tensor]
    member: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("member", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, member: Tensor) -> None:
        """Add attack scores.

        Args:
            scores: ``[N]``; higher says "more likely a member".
            member: ``[N]`` whether each was trained on, as booleans or 0 and 1.
        """
        self.scores.append(scores.detach().flatten().double())
        self.member.append(member.detach().flatten().to(scores.device))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or several as a curve. Needs matplotlib.

        Args:
            val: What `compute` or `forward` returned, or a list of it; computed if left out.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)

    def _collected(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.scores), dim_zero_cat(self.member)

    def _result(self, value: Tensor) -> Tensor:
        return value.to(self.device, torch.float32)
