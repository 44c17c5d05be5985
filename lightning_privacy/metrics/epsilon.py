"""The lower bounds on ε as metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning_privacy.metrics.base import ScoreMetric
from lightning_privacy.metrics.functional.epsilon import (
    BOUND_METHODS,
    BoundMethod,
    epsilon_lower_bound,
)
from lightning_privacy.metrics.functional.mechanism import mechanism_epsilon_lower_bound
from lightning_privacy.types import one_of, real_number

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_privacy.metrics.functional.mechanism import Profile


class EpsilonLowerBound(ScoreMetric):
    """A lower bound on ε at δ, from scores of canaries that fair coins included or left out.

    See `lightning_privacy.metrics.functional.epsilon_lower_bound`.

    Args:
        delta: δ in (0, 1).
        method: "clopper_pearson", "gdp", "one_run" or "one_run_fdp".
        significance: Chance in (0, 0.5) that the bound exceeds the true ε.
        threshold: A number fixed before, "split" or "bonferroni".
        seed: Divides the scores for "split".

    Raises:
        ConfigurationError: An argument is outside its range.

    Example:
        >>> import torch
        >>> metric = EpsilonLowerBound(delta=1e-5, threshold=0.5)
        >>> member = torch.arange(200) < 100
        >>> metric.update(member.float(), member)
        >>> metric.compute()
        tensor(3.2813)
    """

    higher_is_better = None

    def __init__(
        self,
        delta: float,
        method: BoundMethod = "clopper_pearson",
        significance: float = 0.05,
        threshold: float | Literal["split", "bonferroni"] = "split",
        seed: int = 0,
    ) -> None:
        super().__init__()
        one_of("method", method, BOUND_METHODS, cost="no bound", remedy="use 'clopper_pearson'")
        self.delta, self.significance = _checked(delta, significance)
        self.method, self.threshold, self.seed = method, threshold, seed

    def compute(self) -> Tensor:
        """ε >= 0; 0 if nothing can be proven."""
        scores, member = self._collected()
        return self._result(
            epsilon_lower_bound(
                scores,
                member,
                delta=self.delta,
                method=self.method,
                significance=self.significance,
                threshold=self.threshold,
                seed=self.seed,
            )
        )


class MechanismEpsilonLowerBound(ScoreMetric):
    """A lower bound on ε at δ, by inverting the curve of the claimed mechanism.

    The tightest bound where the kind of mechanism is known. A value above the claimed ε refutes
    the claim. See `lightning_privacy.metrics.functional.mechanism_epsilon_lower_bound`.

    Args:
        delta: δ in (0, 1).
        profile: The claimed curve, δ at (ε, factor on the noise):
            `lightning_privacy.metrics.functional.GaussianProfile`, or of a plan's subsampled
            releases `lightning_privacy.audit.ReleaseProfile`.
        significance: Chance in (0, 0.5) that the bound exceeds the true ε.
        threshold: A number fixed before, "split" or "bonferroni".
        seed: Divides the scores for "split".

    Raises:
        ConfigurationError: An argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_privacy.metrics.functional import GaussianProfile
        >>> profile = GaussianProfile(noise_multiplier=1.0)
        >>> metric = MechanismEpsilonLowerBound(1e-5, profile, threshold=0.5)
        >>> member = torch.arange(2000) < 1000
        >>> quantiles = torch.special.ndtri((torch.arange(2000) % 1000 + 0.5) / 1000)
        >>> metric.update(quantiles + member.float(), member)
        >>> metric.compute()
        tensor(3.5428)
    """

    higher_is_better = None

    def __init__(
        self,
        delta: float,
        profile: Profile,
        significance: float = 0.05,
        threshold: float | Literal["split", "bonferroni"] = "split",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.delta, self.significance = _checked(delta, significance)
        self.profile, self.threshold, self.seed = profile, threshold, seed

    def compute(self) -> Tensor:
        """ε >= 0; 0 if nothing can be proven."""
        scores, member = self._collected()
        return self._result(
            mechanism_epsilon_lower_bound(
                scores,
                member,
                self.profile,
                delta=self.delta,
                significance=self.significance,
                threshold=self.threshold,
                seed=self.seed,
            )
        )


def _checked(delta: float, significance: float) -> tuple[float, float]:
    cost = "a bound that says nothing"
    return (
        real_number("delta", delta, "(0, 1)", cost=cost, remedy="pass the δ of the claim"),
        real_number("significance", significance, "(0, 0.5)", cost=cost, remedy="pass 0.05"),
    )
