"""The append-only list of what was released, kept in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.accounting.accountants import delta as delta_of
from lightning_privacy.accounting.accountants import epsilon as epsilon_of
from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_privacy.types import AccountantName

_VERSION = 1


class Ledger:
    """What was released so far: entries can be added, never changed or removed.

    Args:
        releases: What had been released before.
    """

    def __init__(self, releases: Iterable[GaussianRelease] = ()) -> None:
        self._releases: list[GaussianRelease] = []
        for release in releases:
            self.record(release)

    @property
    def releases(self) -> tuple[GaussianRelease, ...]:
        """What was released, oldest first; equal neighbours are one entry."""
        return tuple(self._releases)

    @property
    def count(self) -> int:
        """Number of draws released so far."""
        return sum(release.count for release in self._releases)

    def record(self, release: GaussianRelease) -> None:
        """Adds a release.

        Args:
            release: What was released; a count of 0 changes nothing.

        Raises:
            GuaranteeError: It is no `GaussianRelease`, so that no accountant could add it up.
        """
        if not isinstance(release, GaussianRelease):
            raise GuaranteeError(
                must="a ledger records `GaussianRelease` values only",
                found=f"a {type(release).__name__}",
                cost="spent budget that no accountant counts",
                remedy="record `plan.release(count)`",
            )
        if not release.count:
            return
        if self._releases and self._releases[-1].same_mechanism(release):
            last = self._releases.pop()
            release = last.times(last.count + release.count)
        self._releases.append(release)

    def epsilon(self, delta: float, accountant: AccountantName = "pld") -> float:
        """Returns the ε spent so far.

        Args:
            delta: δ in (0, 1).
            accountant: Which accountant to ask.

        Returns:
            ε >= 0; 0 for an empty ledger, infinite where a release had no noise.
        """
        return epsilon_of(self._releases, delta, accountant)

    def delta(self, epsilon: float, accountant: AccountantName = "pld") -> float:
        """Returns the δ spent so far at a given ε.

        Args:
            epsilon: ε >= 0.
            accountant: "pld" or "rdp".

        Returns:
            δ in [0, 1].
        """
        return delta_of(self._releases, epsilon, accountant)

    def state_dict(self) -> dict[str, object]:
        """Returns plain Python scalars, lists and dictionaries: loads with ``weights_only=True``.

        Returns:
            A state for `load_state_dict`.
        """
        return {"version": _VERSION, "releases": [entry.to_dict() for entry in self._releases]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Replaces an empty ledger's content by a stored one.

        Args:
            state: What `state_dict` returned.

        Raises:
            GuaranteeError: The state is of another version or shape, or this ledger has entries
                already, which loading would forget.
        """
        entries = state.get("releases")
        if state.get("version") != _VERSION or not isinstance(entries, list):
            raise GuaranteeError(
                must=f"a stored ledger must have version {_VERSION} and a list of releases",
                found=f"version {state.get('version')!r} and releases of type "
                f"{type(entries).__name__}",
                cost="spent budget that is read wrongly or not at all",
                remedy="load it with the version of lightning_privacy that wrote it",
            )
        if self._releases:
            raise GuaranteeError(
                must="a ledger must be empty when a stored one is loaded into it",
                found=f"{self.count} releases recorded already",
                cost="spent budget that is forgotten",
                remedy="load the checkpoint before training, or into a new ledger",
            )
        for entry in [GaussianRelease.from_dict(fields) for fields in entries]:
            self.record(entry)
