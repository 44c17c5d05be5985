"""The composite loss of the PrivacyPreserveNet paper, taken literally: for study only.

The paper's prose describes a loss with terms for noise, clipping and attention; its formulas are
not printed. Read literally, the terms are numbers that are added to the task loss. A number has no
gradient, so none of them changes what is learnt, and none of them is private. What works is in
`DifferentialPrivacy` and `AttentionNoise`, which act on gradients and on attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class CompositeLoss:
    """``task + λ_dp N + λ_clip |g| + λ_attn a``, with N normal: a reconstruction for study.

    Args:
        noise: λ_dp >= 0, on a random number N ~ N(0, ``noise_std``²), anew for each example.
        clipping: λ_clip >= 0, on the norm of the clipped gradient.
        attention: λ_attn >= 0, on how far noise has moved attention.
        noise_std: Standard deviation of N, >= 0.

    Raises:
        ConfigurationError: If a number is negative.
    """

    noise: float = 0.1
    clipping: float = 0.1
    attention: float = 0.1
    noise_std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        for name in ("noise", "clipping", "attention", "noise_std"):
            real_number(
                name,
                getattr(self, name),
                "[0, inf)",
                cost="A term that rewards what it should punish.",
                remedy="Give a weight of at least 0.",
            )

    def __call__(
        self,
        task: Tensor,
        *,
        clipped_norm: Tensor | float,
        perturbation: Tensor | float,
        generator: torch.Generator,
    ) -> Tensor:
        """Add the terms to each example's loss.

        Args:
            task: ``[B]`` losses of the task.
            clipped_norm: A number, or ``[B]``.
            perturbation: A number, or ``[B]``.
            generator: Draws N.

        Returns:
            ``[B]`` losses, whose gradient is that of ``task`` wherever the terms are numbers.
        """
        drawn = torch.randn(task.shape, generator=generator).to(task)
        terms = self.noise * self.noise_std * drawn
        return task + terms + self.clipping * clipped_norm + self.attention * perturbation
