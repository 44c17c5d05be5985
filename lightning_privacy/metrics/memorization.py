"""Exposure and extraction of secrets as metrics. Sums, so that ranks only add them up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional.memorization import (
    exposure,
    greedily_extracted,
    normalized_exposure,
    probably_extracted,
)
from lightning_privacy.types import one_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Mean(Metric):
    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or several as a curve. Needs matplotlib.

        Args:
            val: What `compute` or `forward` returned, or a list of it; computed if left out.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)

    def _add(self, values: Tensor) -> None:
        self.total += values.double().sum().to(self.total.device)
        self.count += len(values)

    def _mean(self) -> Tensor:
        if not int(self.count):
            raise ConfigurationError(
                must="a mean is computed over at least one secret",
                found="no secret",
                cost="a figure of nothing",
                remedy="call update first",
            )
        return self.total / self.count


class Exposure(_Mean):
    """Mean exposure of secrets in bits; 1.44 for secrets that the model never saw.

    See `lightning_privacy.metrics.functional.exposure`. Compare secrets in the training set with
    held-out ones of the same kind.

    Args:
        normalized: Whether to give it on the scale from 0 (never seen) to 1 (always first).

    Example:
        >>> metric = Exposure()
        >>> metric.update(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(2.)
    """

    candidates: Tensor

    def __init__(self, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized
        self.add_state("candidates", torch.tensor(0), dist_reduce_fx="max")

    def update(self, log_likelihoods: Tensor, secret: Tensor) -> None:
        """Add secrets.

        Args:
            log_likelihoods: ``[N, R]`` of every candidate of every secret.
            secret: ``[N]`` which candidate is the true one.

        Raises:
            ConfigurationError: The shapes do not fit, or R is not that of earlier secrets.
        """
        values = exposure(log_likelihoods, secret)
        size = log_likelihoods.shape[1]
        if int(self.candidates) not in (0, size):
            raise ConfigurationError(
                must="all secrets of one metric are drawn from spaces of one size",
                found=f"{int(self.candidates)} candidates before, {size} now",
                cost="a mean of bits that do not mean the same",
                remedy="use a metric for each kind of secret",
            )
        self.candidates.fill_(size)
        self._add(values)

    def compute(self) -> Tensor:
        """Mean exposure in bits, or on the scale from 0 to 1."""
        mean = self._mean()
        if self.normalized:
            mean = normalized_exposure(mean, int(self.candidates))
        return mean.to(torch.float32)


class ExtractionRate(_Mean):
    """Share of the targets that the model would write out.

    See `lightning_privacy.metrics.functional.greedily_extracted` and `probably_extracted`.

    Args:
        method: "greedy" or "probabilistic".
        attempts: Samples n >= 1, for "probabilistic".
        probability: p in (0, 1], for "probabilistic".
        ignore_index: Marks positions of a target that do not count.

    Raises:
        ConfigurationError: The method is unknown.
    """

    plot_upper_bound = 1.0

    def __init__(
        self,
        method: Literal["greedy", "probabilistic"] = "greedy",
        attempts: int = 1000,
        probability: float = 0.5,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        choices = ("greedy", "probabilistic")
        one_of("method", method, choices, cost="no rate", remedy="use 'greedy'")
        self.method, self.attempts, self.probability = method, attempts, probability
        self.ignore_index = ignore_index

    def update(self, log_probabilities: Tensor, target: Tensor) -> None:
        """Add targets.

        Args:
            log_probabilities: ``[N, T, V]`` logits or log-probabilities at the target's positions,
                from a forward pass over prefix and target.
            target: ``[N, T]`` token ids; ``ignore_index`` where a target is shorter.
        """
        if self.method == "greedy":
            found = greedily_extracted(log_probabilities, target, self.ignore_index)
        else:
            found = probably_extracted(
                log_probabilities,
                target,
                attempts=self.attempts,
                probability=self.probability,
                ignore_index=self.ignore_index,
            )
        self._add(found)

    def compute(self) -> Tensor:
        """The share in [0, 1]."""
        return self._mean().to(torch.float32)
