"""The plan of a private run: one frozen value from which sampling, noise and accounting follow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from lightning_privacy.accounting import (
    GaussianRelease,
    epsilon,
    max_steps,
    noise_multiplier_for,
    plan_table,
    ranges,
)
from lightning_privacy.accounting.accountants import (
    check_accountant,
    checked_delta,
    refuse_groups,
)
from lightning_privacy.accounting.precision import precision_slack_for
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.accounting.tiers import Tier
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling.rate import resolve_sampling
from lightning_privacy.sampling.users import (
    check_user_sampling,
    checked_group_size,
    user_settings_without_users,
)
from lightning_privacy.types import (
    CLIPPING_KINDS,
    AccountantName,
    ClippingKind,
    NeighbouringRelation,
    PrivacyUnit,
    UserSampling,
    one_of,
    real_number,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PrivacyPlan", "plan_table", "precision_slack_for", "resolve_sampling"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyPlan:
    """What one private run releases, and what that costs.

    A private step draws each unit independently with probability ``sample_rate``, bounds every
    unit's contribution to norm ``clip_norm``, adds them up, adds Gaussian noise of standard
    deviation ``noise_std`` and divides by ``expected_batch_size``. The plan is frozen: sampler,
    noise and accountant read the same numbers, so they cannot disagree.

    The ε is that of ``effective_noise_multiplier`` = noise_multiplier / (1 + precision_slack) /
    sqrt(releases_per_draw): rounding may let a contribution exceed the clip norm by the slack, and
    m releases on one draw count as one release with noise smaller by sqrt(m).

    Where the unit is a user (arXiv 2407.07737), either users are drawn, and the mean gradient of at
    most ``group_size`` examples of each is clipped; or examples are drawn, out of at most
    ``group_size`` of each user, and each is clipped. The second is accounted as a mixture of
    Gaussians, and its q, batch and clip norm are those of an example.

    Args:
        unit: What one neighbour differs in.
        user_sampling: What is drawn where the unit is a user: "users" or "examples".
        group_size: Most examples of a user, >= 1, where the unit is a user.
        relation: Which neighbours the guarantee speaks about.
        sample_rate: Probability q of each unit (or example, as above), in (0, 1].
        expected_batch_size: The public constant by which the noised sum is divided, > 0.
        noise_multiplier: σ > 0, standard deviation of the noise over the clip norm. 0 is legal
            in deterministic test mode only.
        clip_norm: C > 0, largest norm of one unit's contribution.
        clipping: How contributions are bounded.
        steps: Planned number of private steps, >= 1: the headline ε is that of these.
        delta: δ in (0, 1).
        accountant: Which accountant to ask.
        precision_slack: τ in [0, 1), relative excess of a clipped contribution through rounding.
        releases_per_draw: m >= 1, how many noised gradients are published for one draw.
        deterministic: Noise and draws come from a known seed: the ε is infinite.
        tiers: Individual budgets of users, as shares of clip norm and rate, which are then the
            largest ones, and so is ε.
        tiers_published: Whether the tiers are public. Where they follow from users' own records,
            the largest ε is all that may be published.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    unit: PrivacyUnit = PrivacyUnit.EXAMPLE
    user_sampling: UserSampling | None = None
    group_size: int | None = None
    relation: NeighbouringRelation
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    clip_norm: float
    clipping: ClippingKind = "flat"
    steps: int
    delta: float
    accountant: AccountantName = "pld"
    precision_slack: float = 1e-4
    releases_per_draw: int = 1
    deterministic: bool = False
    tiers: tuple[Tier, ...] = ()
    tiers_published: bool = True

    def __post_init__(self) -> None:
        """Checks every field, and normalises numbers and names."""
        self._check_names()
        self._check_users()
        self._set("delta", checked_delta(self.delta))
        for name, (within, cost, remedy) in ranges.RANGES.items():
            number = real_number(name, getattr(self, name), within, cost=cost, remedy=remedy)
            self._set(name, number)
        for name, (cost, remedy) in ranges.COUNTS.items():
            count = whole_number(name, getattr(self, name), at_least=1, cost=cost, remedy=remedy)
            self._set(name, count)
        if self.noise_multiplier == 0 and not self.deterministic:
            raise ConfigurationError(
                must="`noise_multiplier` must be a finite number > 0",
                found="`noise_multiplier` = 0",
                cost="a training without noise, whose ε is infinite",
                remedy="pass a positive noise multiplier, or an ε to calibrate one for; only "
                "deterministic=True allows 0, for tests",
            )

    @classmethod
    def calibrated(  # noqa: PLR0913 (one argument for each field)
        cls,
        *,
        epsilon: float,
        delta: float,
        steps: int,
        sample_rate: float,
        expected_batch_size: float,
        clip_norm: float,
        relation: NeighbouringRelation,
        unit: PrivacyUnit = PrivacyUnit.EXAMPLE,
        user_sampling: UserSampling | None = None,
        group_size: int | None = None,
        clipping: ClippingKind = "flat",
        accountant: AccountantName = "pld",
        precision_slack: float = 1e-4,
        releases_per_draw: int = 1,
        deterministic: bool = False,
        progress: Callable[[float, float], None] | None = None,
    ) -> Self:
        """Makes the plan with the least noise whose planned steps cost at most ``epsilon``.

        Args:
            epsilon: The budget ε > 0.
            delta: As in the class.
            steps: As in the class.
            sample_rate: As in the class.
            expected_batch_size: As in the class.
            clip_norm: As in the class.
            relation: As in the class.
            unit: As in the class.
            user_sampling: As in the class.
            group_size: As in the class.
            clipping: As in the class.
            accountant: As in the class.
            precision_slack: As in the class.
            releases_per_draw: As in the class.
            deterministic: As in the class.
            progress: Called after each trial with the noise multiplier and its ε.

        Returns:
            The plan; its ``epsilon()`` is at most the budget (unless deterministic).

        Raises:
            ConfigurationError: A value is outside its range, or no noise reaches the budget.
        """
        draft = cls(
            unit=unit,
            user_sampling=user_sampling,
            group_size=group_size,
            relation=relation,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            noise_multiplier=1.0,
            clip_norm=clip_norm,
            clipping=clipping,
            steps=steps,
            delta=delta,
            accountant=accountant,
            precision_slack=precision_slack,
            releases_per_draw=releases_per_draw,
            deterministic=deterministic,
        )
        effective = noise_multiplier_for(
            epsilon=epsilon,
            delta=draft.delta,
            sample_rate=draft.sample_rate,
            steps=draft.steps,
            accountant=draft.accountant,
            group_size=draft.parts_of_unit,
            progress=progress,
        )
        scale = (1 + draft.precision_slack) * math.sqrt(draft.releases_per_draw)
        plan = replace(draft, noise_multiplier=effective * scale)
        while plan.effective_noise_multiplier < effective:  # the division's rounding, upwards
            plan = replace(plan, noise_multiplier=math.nextafter(plan.noise_multiplier, math.inf))
        return plan

    @property
    def effective_noise_multiplier(self) -> float:
        """The noise multiplier that the accountant counts."""
        slack = 1 + self.precision_slack
        return self.noise_multiplier / slack / math.sqrt(self.releases_per_draw)

    @property
    def parts_of_unit(self) -> int:
        """How many contributions of one unit are drawn and clipped on their own."""
        return 1 if self.user_sampling != "examples" else self.group_size or 1

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of clipped contributions: σ C."""
        return self.noise_multiplier * self.clip_norm

    @property
    def sensitivity(self) -> float:
        """Most that one unit can move the sum of clipped contributions, in exact arithmetic."""
        return self.parts_of_unit * self.clip_norm

    def release(self, count: int) -> GaussianRelease:
        """Returns what ``count`` private steps release, for a ledger.

        Args:
            count: Number of draws, >= 0.

        Returns:
            The accounting event, with the effective noise multiplier.
        """
        return GaussianRelease(
            noise_multiplier=self.effective_noise_multiplier,
            sample_rate=self.sample_rate,
            count=count,
            group_size=self.parts_of_unit,
        )

    def epsilon(self, steps: int | None = None) -> float:
        """Returns the ε of a number of private steps.

        Args:
            steps: Number of steps >= 0; by default the planned ones.

        Returns:
            ε >= 0; infinite in deterministic test mode once there was a step.
        """
        count = self.steps if steps is None else steps
        releases = [self.release(count)]
        if self.deterministic:
            return math.inf if releases[0].count else 0.0
        return epsilon(releases, self.delta, self.accountant)

    def epsilon_by_tier(self) -> dict[str, float]:
        """Returns the ε of the planned steps for the users of each tier, where tiers are public.

        Returns:
            ε by tier; each is at most `epsilon`. Empty where tiers are private or there are none.
        """
        if not self.tiers_published or self.deterministic:
            return {}
        whole = self.release(self.steps)
        own = {tier.name: [tier.release(whole)] for tier in self.tiers}
        return {name: epsilon(each, self.delta, self.accountant) for name, each in own.items()}

    def max_steps(self, epsilon: float) -> int:
        """Returns how many private steps fit a budget.

        Args:
            epsilon: The budget ε > 0.

        Returns:
            T >= 0 with ε(T) <= budget < ε(T + 1). In deterministic test mode the number that
            would fit with secret noise, so that a test runs as long as the run it stands for.
        """
        if self.noise_multiplier == 0:
            return self.steps
        return max_steps(
            epsilon=epsilon,
            delta=self.delta,
            sample_rate=self.sample_rate,
            noise_multiplier=self.effective_noise_multiplier,
            accountant=self.accountant,
            group_size=self.parts_of_unit,
        )

    def describe(self) -> dict[str, str]:
        """Returns the plan as printable rows.

        Returns:
            Row title to value; nothing in it depends on the data, except for what the
            neighbouring relation declares public.
        """
        spent = self.epsilon()
        rows = {
            "privacy unit": str(self.unit),
            "neighbours": ranges.RELATION_WORDS[self.relation],
            "epsilon": "infinite (deterministic test mode: no privacy)"
            if math.isinf(spent)
            else shown_epsilon(spent),
            "delta": f"{self.delta:g}",
            "noise multiplier": f"{self.noise_multiplier:.4f}",
            "sample rate": f"{self.sample_rate:.6g}",
            "expected batch size": f"{self.expected_batch_size:g}",
            "private steps": str(self.steps),
            "clip norm": f"{self.clip_norm:g}",
            "clipping": self.clipping.replace("_", " "),
            "accountant": self.accountant.upper(),
            "precision slack": f"{self.precision_slack:g}",
        }
        if self.releases_per_draw > 1:
            rows["releases per draw"] = str(self.releases_per_draw)
        if self.user_sampling is not None:
            rows["drawn and clipped"] = ranges.DRAWN_WORDS[self.user_sampling].format(
                self.group_size
            )
        for name, value in self.epsilon_by_tier().items():
            rows[f"epsilon of tier {name}"] = shown_epsilon(value)
        if self.tiers and not self.tiers_published:
            rows["tiers"] = ranges.PRIVATE_TIERS
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python scalars, for checkpoints and JSON.

        Returns:
            A dictionary that `from_dict` turns back into an equal plan.
        """
        return {**asdict(self), "unit": str(self.unit), "relation": str(self.relation)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a plan from `to_dict`'s result.

        Args:
            values: Exactly the plan's fields.

        Returns:
            The plan.

        Raises:
            ConfigurationError: A field is missing, unknown or outside its range.
        """
        known, given = {field.name for field in fields(cls)}, set(values)
        if given != known:
            raise ConfigurationError(
                must="a stored plan must have exactly the fields of PrivacyPlan",
                found=f"missing {sorted(known - given)}, unknown {sorted(given - known)}",
                cost="a run that goes on under another guarantee than it began with",
                remedy="load it with the version of lightning_privacy that wrote it",
            )
        return cls(**values)

    def _check_names(self) -> None:
        units, relations = tuple(PrivacyUnit), tuple(NeighbouringRelation)
        cost = "a guarantee about other neighbours than the printed ones"
        one_of("unit", self.unit, units, cost=cost, remedy="use unit='example'")
        one_of("relation", self.relation, relations, cost=cost, remedy="use resolve_sampling's")
        one_of(
            "clipping",
            self.clipping,
            CLIPPING_KINDS,
            cost="contributions without a bound",
            remedy="use clipping='flat'",
        )
        check_accountant(self.accountant)
        if not isinstance(self.deterministic, bool):
            raise ConfigurationError(
                must="`deterministic` must be True or False",
                found=f"`deterministic` = {self.deterministic!r}",
                cost="known noise reported as private, or the reverse",
                remedy="leave it out outside of tests",
            )
        self._set("unit", PrivacyUnit(self.unit))
        self._set("relation", NeighbouringRelation(self.relation))

    def _check_users(self) -> None:
        if self.unit == PrivacyUnit.USER:
            check_user_sampling(self.user_sampling)
            self._set("group_size", checked_group_size(self.group_size))
        elif self.user_sampling is not None or self.group_size is not None:
            raise user_settings_without_users()
        refuse_groups(self.parts_of_unit, self.accountant)
        tiers = (t if isinstance(t, Tier) else Tier(**t) for t in self.tiers)
        self._set("tiers", tuple(tiers))
        if self.tiers and self.user_sampling != "users":
            raise user_settings_without_users()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
