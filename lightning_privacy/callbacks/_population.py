"""What the draws of a run are made from: rows, whole users, or a bounded choice of their rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_privacy.callbacks._canary_rows import (
    WithCanaries,
    public_size,
    without_canaries,
)
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.noise import fresh_secret, secret_from_seed
from lightning_privacy.sampling import BoundedSampler, UserSampler, ViewSampler, user_index
from lightning_privacy.types import PrivacyUnit

if TYPE_CHECKING:
    from lightning_privacy.accounting.tiers import Tier
    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.callbacks._state import RunState
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.sampling import UserIndex
    from lightning_privacy.sampling.base import Sampler
    from lightning_privacy.sampling.users import UserIds


class Population:
    """The things that a private step draws, one by one and independently.

    Args:
        settings: What the user configured.
        dataset: The training data set.
        beside: The data module, which may know whose rows are whose; or None.
        seed: Fixes which examples of a user take part, where examples are drawn.

    Raises:
        ConfigurationError: Users are the unit, and it is not known whose rows are whose.

    Attributes:
        size: How many there are (private under add-or-remove); of canaries, as many as expected.
        units: How many units of privacy.
        name: What that number is called.
    """

    def __init__(
        self, settings: PrivacySettings, dataset: Any, beside: object, seed: bytes
    ) -> None:
        self._settings, self._dataset, self._seed = settings, dataset, seed
        size, self.name = len(dataset), "the data set's length"
        self._rows, self._index, self.units = size, None, size
        if settings.unit == PrivacyUnit.USER:
            self._index = _index_of(dataset, settings.users, beside)
            size, self.name = self._index.count, "the number of users in the data set"
            self.units = size
        if settings.user_sampling == "examples" and self._index is not None:
            assert settings.group_size is not None
            size = len(self._index.bounded(settings.group_size, seed))
            self.name = f"the number of examples (at most {settings.group_size} of each user)"
        self.size = public_size(dataset, size)

    def sampler(self, plan: PrivacyPlan, secret: bytes) -> Sampler:
        """Make the draws.

        Args:
            plan: Says at which rate.
            secret: Decides who is drawn.

        Returns:
            The draws, as a function of their number.
        """
        if self._index is None:
            return ViewSampler(
                size=self._rows,
                sample_rate=plan.sample_rate,
                secret=secret,
                views=self._settings.augmentation_multiplicity,
            )
        assert plan.group_size is not None
        if plan.user_sampling == "users":
            tiers = self._tiers(plan, self._index)
            return UserSampler(
                index=self._index,
                group_size=plan.group_size,
                sample_rate=plan.sample_rate,
                secret=secret,
                rate_shares=None if tiers is None else [tier.rate_share for tier in tiers],
                clip_shares=None if tiers is None else [tier.clip_share for tier in tiers],
            )
        return BoundedSampler(
            index=self._index,
            group_size=plan.group_size,
            sample_rate=plan.sample_rate,
            secret=secret,
            seed=self._seed,
        )

    def _examples(self, rows: list[int]) -> list[Any]:
        return [self._dataset[row] for row in rows]

    def _tiers(self, plan: PrivacyPlan, index: UserIndex) -> list[Tier] | None:
        if self._settings.tiers is None:
            return None
        known = {tier.name: tier for tier in plan.tiers}
        found = []
        for user, key in enumerate(index.ids):
            rows = index.rows(user).tolist()
            name = self._settings.tiers.segmentation.tier_of(key, partial(self._examples, rows))
            if name not in known:
                raise ConfigurationError(
                    must="every user's tier has a target",
                    found=f"the tier {name!r}, where there are {sorted(known)}",
                    cost="a user to whom nothing was promised",
                    remedy="add it to `targets` and `shares`, or mend the segmentation",
                )
            found.append(known[name])
        return found


def _index_of(dataset: Any, users: UserIds | None, beside: object) -> UserIndex:
    found = user_index(without_canaries(dataset), users, beside)
    return dataset.user_index(found) if isinstance(dataset, WithCanaries) else found


def population_of(
    settings: PrivacySettings, state: RunState, dataset: Any, trainer: Any
) -> Population:
    """Find out what a run draws from, with the choice of examples that the run began with.

    Args:
        settings: What the user configured.
        state: Keeps the seed of that choice.
        dataset: The training data set.
        trainer: The trainer of the fit.

    Returns:
        The population.

    Raises:
        ConfigurationError: As `Population`; or local steps are asked for in manual optimization,
            which sees a whole draw at once.
    """
    if (
        settings.user_update == "local_steps"
        and not trainer.lightning_module.automatic_optimization
    ):
        raise ConfigurationError(
            must="user_update='local_steps' goes with automatic optimization",
            found="automatic_optimization = False",
            cost="no local step: manual optimization sees a whole draw as one batch",
            remedy="use user_update='mean', or automatic optimization",
        )
    if state.bound_seed is None:
        seed = settings.test_seed
        state.bound_seed = fresh_secret() if seed is None else secret_from_seed(seed)
    return Population(settings, dataset, trainer.datamodule, state.bound_seed)
