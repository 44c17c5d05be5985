"""What a user of the callback configures, checked as far as that goes without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_privacy.clipping.norms import LEAST_CLIP_NORM
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling.users import (
    check_user_sampling,
    checked_group_size,
    user_settings_without_users,
)
from lightning_privacy.tiers import TierPolicy
from lightning_privacy.types import (
    ACCOUNTANT_NAMES,
    CLIPPING_KINDS,
    LOSS_REDUCTIONS,
    USER_UPDATES,
    AccountantName,
    ClippingKind,
    LossReduction,
    PrivacyUnit,
    UserSampling,
    UserUpdate,
    one_of,
    real_number,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_privacy.sampling.users import UserIds
    from lightning_privacy.study import Study

_NO_EPSILON = "an ε that cannot be computed, or that says nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySettings:
    """The constructor arguments of `DifferentialPrivacy`, which documents them.

    And ``study``, which `StudyMode` alone sets.

    Raises:
        ConfigurationError: An argument is outside its range, or the budget is not determined.
    """

    epsilon: float | None
    delta: float
    clip_norm: float
    noise_multiplier: float | None
    expected_batch_size: int | None
    sample_rate: float | None
    dataset_size: int | None
    clipping: ClippingKind
    accountant: AccountantName
    loss_reduction: LossReduction
    unit: str
    user_sampling: UserSampling | None
    group_size: int | None
    users: UserIds | None
    tiers: TierPolicy | None
    user_update: UserUpdate | None
    local_learning_rate: float | None
    releases_per_draw: int | None
    augmentation_multiplicity: int
    independence_check: bool
    independent_buffers: Sequence[str]
    test_seed: int | None
    journal: bool
    journal_dir: str | None
    secure_rounding: bool
    study: Study | None = None

    def __post_init__(self) -> None:
        """Check every argument that can be checked without a data set."""
        self._check_kinds()
        self._check_tiers()
        self._check_budget()
        self._check_sampling()
        self._check_choices()
        self._check_users()

    def _check_kinds(self) -> None:
        if not isinstance(self.tiers, TierPolicy | None):
            raise ConfigurationError(
                must="`tiers` is a TierPolicy",
                found=f"`tiers` = {self.tiers!r}",
                cost="budgets that nobody has calibrated",
                remedy="pass lightning_privacy.tiers.TierPolicy(...), or leave it out",
            )
        if isinstance(self.independent_buffers, str):
            raise ConfigurationError(
                must="`independent_buffers` is a list of names or patterns",
                found=f"the string {self.independent_buffers!r}",
                cost="each of its letters would be taken for a name",
                remedy=f"pass [{self.independent_buffers!r}]",
            )
        object.__setattr__(self, "independent_buffers", tuple(self.independent_buffers))

    def _check_budget(self) -> None:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigurationError(
                must="the budget or the noise is given",
                found="neither epsilon nor noise_multiplier",
                cost=_NO_EPSILON,
                remedy="pass epsilon=8.0 to calibrate the noise, noise_multiplier=1.0 to fix it, "
                "or both to train with that noise until ε would be exceeded",
            )
        if self.epsilon is not None:
            real_number(
                "epsilon", self.epsilon, "(0, inf)", cost=_NO_EPSILON, remedy="pass for example 8.0"
            )
        if self.noise_multiplier is not None:
            real_number(
                "noise_multiplier",
                self.noise_multiplier,
                # Without noise in deterministic test mode only, where ε is infinite anyway.
                "(0, inf)" if self.test_seed is None else "[0, inf)",
                cost="released gradients without noise: ε is infinite",
                remedy="pass the standard deviation of the noise divided by clip_norm, such as 1.0",
            )
        real_number(
            "delta",
            self.delta,
            "(0, 1)",
            cost=_NO_EPSILON,
            remedy="pass a δ well below one over the number of units, for instance 1e-6",
        )
        real_number(
            "clip_norm",
            self.clip_norm,
            f"[{LEAST_CLIP_NORM}, inf)",
            cost="a sensitivity that is not bounded: of shorter gradients the squares are zero",
            remedy="pass the largest norm of one unit's gradient, such as 1.0",
        )

    def _check_sampling(self) -> None:
        if self.sample_rate is not None:
            real_number(
                "sample_rate",
                self.sample_rate,
                "(0, 1]",
                cost="an ε that describes a sampling that was not done",
                remedy="pass the probability with which each unit is drawn",
            )
        counts = ("expected_batch_size", "dataset_size", "releases_per_draw")
        for name in (*counts, "augmentation_multiplicity"):
            if getattr(self, name) is not None:
                whole_number(
                    name,
                    getattr(self, name),
                    at_least=1,
                    cost="a public constant of the mechanism without meaning",
                    remedy=f"pass {name} as a positive whole number, or leave it out",
                )
        if self.test_seed is not None:
            whole_number(
                "test_seed",
                self.test_seed,
                at_least=0,
                cost="a test that cannot be repeated",
                remedy="pass a whole number >= 0, or None for a run that is private",
            )

    def _check_choices(self) -> None:
        wrong = "a mechanism whose analysis is not known"
        one_of("clipping", self.clipping, CLIPPING_KINDS, cost=wrong, remedy='use "flat"')
        one_of("accountant", self.accountant, ACCOUNTANT_NAMES, cost=wrong, remedy='use "pld"')
        one_of(
            "loss_reduction",
            self.loss_reduction,
            LOSS_REDUCTIONS,
            cost="gradients clipped at the wrong scale",
            remedy='say what the loss does over the examples of a batch: "mean" or "sum"',
        )
        units = tuple(str(unit) for unit in PrivacyUnit)
        one_of(
            "unit",
            self.unit,
            units,
            cost=wrong,
            remedy='use "user" for all rows of a person together, "example" for each row alone',
        )

    def _check_local_steps(self) -> None:
        one_of(
            "user_update",
            self.user_update or "mean",
            USER_UPDATES,
            cost="a contribution of users that nobody defined",
            remedy="use 'mean' or 'local_steps'",
        )
        local = self.user_update == "local_steps"
        if local != (self.local_learning_rate is not None) or (
            local and self.user_sampling == "examples"
        ):
            raise ConfigurationError(
                must="user_update='local_steps' goes with local_learning_rate and drawn users",
                found=f"user_update={self.user_update!r}, user_sampling={self.user_sampling!r}, "
                f"local_learning_rate={self.local_learning_rate!r}",
                cost="local steps of no length, or of examples",
                remedy="pass all of them, for instance local_learning_rate=0.1",
            )
        if local:
            real_number(
                "local_learning_rate",
                self.local_learning_rate,
                "(0, inf)",
                cost="local steps that lead nowhere",
                remedy="pass the rate of a user's own steps, for instance 0.1",
            )

    def _check_tiers(self) -> None:
        if self.tiers is None:
            return
        largest = self.tiers.largest_target
        if self.noise_multiplier is not None or self.epsilon not in {None, largest}:
            raise ConfigurationError(
                must="with tiers the noise follows from their targets, and ε is the largest one",
                found=f"epsilon={self.epsilon}, noise_multiplier={self.noise_multiplier}",
                cost="a headline other than what the loosest tier gets",
                remedy=f"leave both out, or pass epsilon={largest:g}",
            )
        if self.user_sampling == "examples" or self.accountant != "pld":
            raise ConfigurationError(
                must="tiers go with user_sampling='users' and accountant='pld'",
                found=f"user_sampling={self.user_sampling!r}, accountant={self.accountant!r}",
                cost="budgets that were calibrated for another mechanism",
                remedy="leave both out",
            )
        object.__setattr__(self, "epsilon", largest)

    def _check_users(self) -> None:
        given = (self.user_sampling, self.group_size, self.users, self.tiers, self.user_update)
        if self.unit != PrivacyUnit.USER:
            if any(value is not None for value in given):
                raise user_settings_without_users()
            return
        if self.augmentation_multiplicity > 1:
            raise ConfigurationError(
                must="views are averaged where the unit is an example",
                found=f"unit='user', augmentation_multiplicity={self.augmentation_multiplicity}",
                cost="views that count as further examples of a user",
                remedy="leave augmentation_multiplicity out",
            )
        if self.user_sampling is None:
            object.__setattr__(self, "user_sampling", "users")
        check_user_sampling(self.user_sampling)
        checked_group_size(self.group_size)
        self._check_local_steps()
        if self.expected_batch_size is None and self.sample_rate is None:
            raise ConfigurationError(
                must="with unit='user' the rate or the expected batch is given",
                found="neither sample_rate nor expected_batch_size",
                cost="a DataLoader's batch size, which counts rows, taken for a number of users",
                remedy="pass expected_batch_size: users in a draw, or examples with "
                "user_sampling='examples'",
            )
