"""What the draws of a run are made from: rows, whole users, or a bounded choice of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_privacy.sampling import BoundedSampler, PoissonSampler, UserSampler, user_index
from lightning_privacy.types import PrivacyUnit

if TYPE_CHECKING:
    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.sampling.base import Sampler


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
        size: How many there are (private under add-or-remove).
        name: What that number is called.
    """

    def __init__(
        self, settings: PrivacySettings, dataset: Any, beside: object, seed: bytes
    ) -> None:
        self._settings, self._seed = settings, seed
        self.size, self.name = len(dataset), "the data set's length"
        self._index = None
        if settings.unit == PrivacyUnit.USER:
            self._index = user_index(dataset, settings.users, beside)
            self.size, self.name = self._index.count, "the number of users in the data set"
        if settings.user_sampling == "examples" and self._index is not None:
            assert settings.group_size is not None
            self.size = len(self._index.bounded(settings.group_size, seed))
            self.name = f"the number of examples, at most {settings.group_size} of each user,"

    def sampler(self, plan: PrivacyPlan, secret: bytes) -> Sampler:
        """Make the draws.

        Args:
            plan: Says at which rate.
            secret: Decides who is drawn.

        Returns:
            The draws, as a function of their number.
        """
        if self._index is None:
            return PoissonSampler(size=self.size, sample_rate=plan.sample_rate, secret=secret)
        assert plan.group_size is not None
        if plan.user_sampling == "users":
            return UserSampler(
                index=self._index,
                group_size=plan.group_size,
                sample_rate=plan.sample_rate,
                secret=secret,
            )
        return BoundedSampler(
            index=self._index,
            group_size=plan.group_size,
            sample_rate=plan.sample_rate,
            secret=secret,
            seed=self._seed,
        )
