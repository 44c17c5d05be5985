"""What a run reserves and settles in the ledger of its data set."""

from __future__ import annotations

import dataclasses
import sqlite3
import warnings
from typing import TYPE_CHECKING

from lightning_privacy.accounting import PrivacyLedger
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_privacy.accounting import GaussianRelease
    from lightning_privacy.accounting.budget import LedgerEntry
    from lightning_privacy.callbacks._state import RunState


_UNIT = "unit: "


class Bookings:
    """Reserves the planned steps before the first one, and settles what was charged at the end.

    A run that is killed settles nothing: all that it reserved stays charged, until it goes on from
    a checkpoint, whose journal knows what it did.

    Args:
        ledger: The ledger of the data set; without one, nothing happens.
        journal: Whether the run keeps a journal, which a ledger needs.

    Raises:
        ConfigurationError: There is a ledger, and no journal; or it is no ledger.
    """

    def __init__(self, ledger: PrivacyLedger | None, journal: bool) -> None:
        if not isinstance(ledger, PrivacyLedger | None):
            raise ConfigurationError(
                must="`ledger` is a PrivacyLedger",
                found=f"`ledger` = {ledger!r}",
                cost="spent budget that stands nowhere",
                remedy="pass PrivacyLedger(path, dataset=..., budget=(epsilon, delta))",
            )
        if ledger is not None and not journal:
            raise ConfigurationError(
                must="a run with a ledger keeps a journal",
                found="journal=False",
                cost="steps lost in a crash, which a resume would neither charge nor reserve",
                remedy="leave journal out",
            )
        self._ledger = ledger
        self._open = False

    @property
    def ledger(self) -> PrivacyLedger | None:
        """The ledger of the data set, if there is one."""
        return self._ledger

    def reserve(self, state: RunState) -> None:
        """Charge all that the run has released and will release.

        Args:
            state: What was charged, and the plan.

        Raises:
            BudgetExceededError: The data set's budget does not allow it.
            ConfigurationError: Earlier runs of the ledger protect another unit.
        """
        if self._ledger is None:
            return
        assert state.plan is not None
        entries = self._ledger.entries()
        if any(entry.run == state.run and _knows_more(entry, state) for entry in entries):
            state.branch()
        to_come = state.plan.release(max(0, state.plan.steps - state.ledger.count))
        releases = self._public([*state.ledger.releases, to_come], state)
        unit = f"{_UNIT}{state.plan.unit}"
        for entry in entries:
            if entry.note.startswith(_UNIT) and entry.note != unit:
                raise _other_unit(unit, entry.note)
        names = {entry.run for entry in entries}
        self._ledger.reserve(state.run, releases, note=unit, continues=state.run in names)
        self._open = True

    def settle(self, state: RunState) -> None:
        """Charge what was released in place of what was reserved. Safe at any time.

        Args:
            state: What was charged.
        """
        if self._ledger is not None and self._open:
            self._open = False
            self._ledger.settle(state.run, self._public(list(state.ledger.releases), state))

    def close(self, state: RunState) -> None:
        """Close journal and ledger. Where the disk refuses, what was reserved stays charged.

        Args:
            state: What was charged.
        """
        try:
            state.settle_journal()
            self.settle(state)
        except (OSError, sqlite3.Error) as error:
            # An error in here would hide the one that ended the fit, most likely the same.
            warnings.warn(
                f"The privacy journal could not be closed ({error}): a resume charges every step "
                "that was reserved, also those that never ran.",
                stacklevel=2,
            )

    @staticmethod
    def _public(releases: list[GaussianRelease], state: RunState) -> list[GaussianRelease]:
        assert state.plan is not None
        if not state.plan.deterministic:
            return releases
        # Noise that can be recomputed is none.
        return [dataclasses.replace(release, noise_multiplier=0.0) for release in releases]


def _knows_more(entry: LedgerEntry, state: RunState) -> bool:
    """Whether a run of this name has ended with steps that the run's own journal has not.

    Then the journal is a copy: another continuation of the same checkpoint has made them.
    """
    settled = sum(release.count for release in entry.releases) if entry.settled else 0
    return settled > state.ledger.count


def _other_unit(here: str, there: str) -> ConfigurationError:
    return ConfigurationError(
        must="all runs of a ledger protect the same unit",
        found=f"{here!r} here, {there!r} in an earlier run",
        cost="a sum of ε for examples and for users, which holds for neither",
        remedy="keep a ledger, or a name of the data set, for each unit",
    )
