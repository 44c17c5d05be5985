"""Study mode: a step with parts of its mechanism left out, to measure what each of them does.

Nothing here is private. A `StudyPlan` has no finite ε, whatever is asked of it, and an ordinary
run cannot go on from what a study has written: a stored study has a field more than a stored plan,
and `PrivacyPlan.from_dict` refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, Self, get_args

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.step import PrivateStep
from lightning_privacy.types import one_of

if TYPE_CHECKING:
    import torch

    from lightning_privacy.clipping.norms import ClippingRule

Mechanism = Literal["clipping", "noise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What a study leaves out. The ε of such a run is infinite.

    Without clipping, the noise keeps the standard deviation σC of the mechanism that is studied:
    otherwise two things would change at once.

    Args:
        without: ``"clipping"``, ``"noise"``, or both: then training is not private in any way.
        not_private: True, written out: whoever runs a study says that they know it.

    Raises:
        ConfigurationError: Nothing is left out, or ``not_private`` is not true.
    """

    without: tuple[Mechanism, ...]
    not_private: bool = False

    def __post_init__(self) -> None:
        """Refuse a study that nobody has asked for in so many words."""
        object.__setattr__(self, "without", tuple(sorted(set(self.without))))
        for name in self.without:
            one_of(
                "without",
                name,
                get_args(Mechanism),
                cost="a study of another mechanism than the one that was meant",
                remedy='leave out "clipping", "noise" or both',
            )
        if self.not_private is not True or not self.without:
            raise ConfigurationError(
                must="a study leaves out part of the mechanism, and says that it is not private",
                found=f"without={list(self.without)}, not_private={self.not_private!r}",
                cost="training without any guarantee by accident",
                remedy="pass not_private=True if the data may be trained on without privacy; "
                "otherwise use DifferentialPrivacy alone",
            )

    def applied_to(self, plan: PrivacyPlan) -> StudyPlan:
        """Turn the plan of the whole mechanism into that of the study.

        Args:
            plan: The plan, which says already that its ε is infinite.

        Returns:
            The same with a part left out.
        """
        if isinstance(plan, StudyPlan):
            return plan
        values = {field.name: getattr(plan, field.name) for field in fields(plan)}
        return StudyPlan(**values, without=self.without)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan(PrivacyPlan):
    """The plan of a study: the numbers of the whole mechanism, and what is left out of it.

    Args:
        without: What is left out.

    Raises:
        ConfigurationError: As in `PrivacyPlan`; or the plan claims a finite ε.
    """

    without: tuple[Mechanism, ...]

    def __post_init__(self) -> None:
        """Check every field, and that no ε is claimed."""
        # By name: a dataclass with slots is another class than the one that `super` would know.
        PrivacyPlan.__post_init__(self)
        self._set("without", tuple(self.without))
        if not self.deterministic:
            raise ConfigurationError(
                must="the ε of a study is infinite",
                found="deterministic=False, which computes one",
                cost="a finite ε beside gradients that were not clipped or not noised",
                remedy="make the plan with Study(...).applied_to(plan)",
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum: σC of the whole mechanism, or 0."""
        return 0.0 if "noise" in self.without else self.noise_multiplier * self.clip_norm

    def describe(self) -> dict[str, str]:
        """The plan as printable rows.

        Returns:
            Row title to value, with what is left out in the place of its number.
        """
        left_out = "none: left out in study mode"
        rows = PrivacyPlan.describe(self)
        rows["epsilon"] = f"infinite (study mode, without {' and '.join(self.without)}: no privacy)"
        if "noise" in self.without:
            rows["noise multiplier"] = left_out
        if "clipping" in self.without:
            rows["clip norm"] = rows["clipping"] = left_out
        return rows

    @classmethod
    def calibrated(cls, **_values: object) -> Self:
        """Refuse: a study is made of a plan, and has no budget of its own.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            must="a study is made of the plan of the whole mechanism",
            found="an attempt to calibrate the noise of a study",
            cost="a budget that nothing keeps",
            remedy="make the plan with Study(...).applied_to(plan)",
        )


class NoClipping:
    """Leaves every unit's gradient as it is. Its sensitivity is infinite."""

    sensitivity = float("inf")
    groups = 1

    def group_of(self, name: str) -> int:
        """All parameters share the group."""
        return 0

    def factors(self, squared_norms: torch.Tensor) -> torch.Tensor:
        """``[1, U]`` ones."""
        return squared_norms.new_ones(squared_norms.shape)


class StudyStep(PrivateStep):
    """A `PrivateStep` without clipping, without noise, or without either. Not private.

    Its plan, a `StudyPlan`, says what is left out; the other arguments are those of `PrivateStep`.
    """

    @property
    def noise_std(self) -> float:
        """Of the plan, not of the rule: without clipping there is no finite sensitivity."""
        return self._plan.noise_std

    def _clipping_rule(self) -> ClippingRule:
        assert isinstance(self._plan, StudyPlan)
        return NoClipping() if "clipping" in self._plan.without else super()._clipping_rule()
