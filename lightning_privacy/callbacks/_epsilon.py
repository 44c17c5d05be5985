"""The ε of a run: so far, at its end, and whether that is within the budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_privacy.accounting import GaussianRelease, epsilon
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.errors import BudgetExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.types import AccountantName


class EpsilonSoFar:
    """ε after any number of steps, for the progress bar: never too small, and cheap.

    Evaluated on a coarser grid of the privacy loss and on a grid of steps, each time at the next
    point ahead; so it runs ahead of the truth by up to a tenth of the steps made, or a twentieth
    of those planned. All of it when the first step is asked for: at a later one the GPU would run
    dry meanwhile.

    Args:
        plan: The plan.
        planned: The ε of all planned steps, which is never exceeded.
        charged: What the ledger holds so far, perhaps of another plan, too.

    Attributes:
        shown: What Lightning shows and writes at each step, until it forgets it; None then.
    """

    _COARSE = 1e-3
    _AHEAD = 1.1

    def __init__(
        self, plan: PrivacyPlan, planned: float, charged: Sequence[GaussianRelease] = ()
    ) -> None:
        self._plan, self._planned = plan, planned
        own = plan.release(1)
        self._others = [release for release in charged if not release.same_mechanism(own)]
        self._before = sum(release.count for release in self._others)
        # Opacus's accountant takes seconds where the PLD takes milliseconds; both are bounds.
        self._accountant: AccountantName = "rdp" if plan.accountant == "rdp" else "pld"
        self._ahead: list[tuple[int, float]] = []
        self.shown: float | None = None

    def at(self, count: int) -> float:
        """An upper bound of ε after ``count`` steps.

        Args:
            count: Steps charged so far, never fewer than asked for before.

        Returns:
            ε, infinite in deterministic test mode.
        """
        if not count or self._plan.deterministic:
            return math.inf if count else 0.0
        while self._ahead and self._ahead[0][0] < count:
            del self._ahead[0]
        if not self._ahead:
            self._ahead = self._evaluated(count)
        value = self._ahead[0][1]
        return min(value, self._planned) if count <= self._plan.steps else value

    def _evaluated(self, count: int) -> list[tuple[int, float]]:
        """ε at the points from the first that covers ``count`` to the end of the plan.

        They are the same however often a run is taken up, so that their ε are known already.
        """
        until, steps = 0, self._plan.steps
        found: list[tuple[int, float]] = []
        while not found or until < steps:
            until = max(int((until + 1) * self._AHEAD) + 1, until + 1 + steps // 20)
            if count <= steps <= until:
                found.append((steps, self._planned))
            elif count <= until:
                found.append((until, self._until(until)))
        return found

    def _until(self, count: int) -> float:
        releases = [*self._others, self._plan.release(count - self._before)]
        return epsilon(releases, self._plan.delta, self._accountant, self._COARSE)


def epsilon_of(releases: Sequence[GaussianRelease], plan: PrivacyPlan) -> float:
    """The ε of a ledger.

    Args:
        releases: What was released.
        plan: Says δ, the accountant, and whether the noise can be recomputed.

    Returns:
        ε, infinite in deterministic test mode once something was released.
    """
    if plan.deterministic:
        return math.inf if any(release.count for release in releases) else 0.0
    return epsilon(releases, plan.delta, plan.accountant)


def planned_epsilon(
    charged: Sequence[GaussianRelease], plan: PrivacyPlan, settings: PrivacySettings
) -> float:
    """The ε of a run at its planned end.

    Where the ledger holds the plan's own releases alone, the number of its steps is what the budget
    allows. It may hold those of another plan, too: the callback has trained another run before.

    Args:
        charged: What the ledger holds.
        plan: Its steps count all draws, those that are charged included.
        settings: Its ε is not to be exceeded, but in a study.

    Returns:
        As `epsilon_of`.

    Raises:
        BudgetExceededError: With another plan's releases it would be exceeded.
    """
    budget = settings.epsilon if settings.study is None else None
    to_come = plan.release(plan.steps - sum(release.count for release in charged))
    others = [release for release in charged if not release.same_mechanism(to_come)]
    planned = epsilon_of([*charged, to_come], plan)
    if budget is not None and others and budget < planned < math.inf:
        raise BudgetExceededError(
            must=f"all that this callback releases stays within ε = {budget:g}",
            found=f"ε = {shown_epsilon(planned)} with {to_come.count} steps to come, and "
            f"{sum(release.count for release in others)} with another noise that it has charged",
            cost="an ε above the budget",
            remedy="train each run with a callback of its own: their ε add up",
        )
    return planned
