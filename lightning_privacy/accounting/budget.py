"""What all runs on one data set have spent together, in a file that survives the runs.

Every run reserves what it will cost before its first step and settles what it did cost at its end.
A run that dies settles nothing, and its reservation stays charged. Nothing depends on a clock.

Whether another run fits is decided by a Rényi filter (Feldman and Zrnic 2021, arXiv 2008.11193;
Lécuyer 2021, arXiv 2103.01379): later runs may be configured after looking at earlier ones, tuning
above all, for which a sum by a tighter accountant proves nothing. The order of the filter follows
from the budget alone.
"""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_privacy.accounting.accountants import checked_delta, epsilon, renyi_epsilon
from lightning_privacy.accounting.events import GaussianRelease, merged
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.errors import BudgetExceededError, ConfigurationError, GuaranteeError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_VERSION = 1
_PATIENCE = 60.0  # seconds that a run waits for another one's transaction
_SCHEMA = """
CREATE TABLE IF NOT EXISTS budgets (
    dataset TEXT PRIMARY KEY, epsilon REAL NOT NULL, delta REAL NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL REFERENCES budgets,
    run TEXT NOT NULL, releases TEXT NOT NULL, settled INTEGER NOT NULL, note TEXT NOT NULL,
    UNIQUE (dataset, run));
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One run on the data set.

    Attributes:
        run: Its name.
        releases: What is charged for it.
        settled: Whether that is what it did; otherwise it is what it reserved.
        note: What it was for.
    """

    run: str
    releases: tuple[GaussianRelease, ...]
    settled: bool
    note: str


class PrivacyLedger:
    """The spending of all runs on one data set, in an SQLite file that processes may share.

    Guarantee: as long as every run on the data set reserves here before its first release, and
    releases no more than it reserved, all runs together are (ε, δ)-differentially private for the
    budget (ε, δ), however later runs were chosen. A reservation is on disk before `reserve`
    returns; only the run itself lowers it, by settling.

    Args:
        path: The file; made if there is none. Not on a network file system, where locks may fail.
        dataset: The name of the data set. Several can share a file.
        budget: (ε, δ) of the data set. Needed once; later it may be left out, but not differ.

    Raises:
        ConfigurationError: There is no budget, or another one than the file holds.
        GuaranteeError: The file was written by another version.
    """

    def __init__(
        self, path: str | Path, *, dataset: str, budget: tuple[float, float] | None = None
    ) -> None:
        self.path, self.dataset = Path(path), dataset
        wanted = None if budget is None else _checked_budget(*budget)
        with self._transaction() as connection:
            _prepare(connection, self.path)
            query = "SELECT epsilon, delta FROM budgets WHERE dataset = ?"
            stored = connection.execute(query, (dataset,)).fetchone()
            if stored is None and wanted is not None:
                row = (dataset, *wanted)
                connection.execute("INSERT INTO budgets VALUES (?, ?, ?)", row)
                stored = wanted
            if stored is None:
                names = connection.execute("SELECT dataset FROM budgets ORDER BY dataset")
                raise _no_budget(dataset, [name for (name,) in names])
            if wanted not in {None, tuple(stored)}:
                raise _other_budget(dataset, stored, wanted)
        self.budget: tuple[float, float] = (float(stored[0]), float(stored[1]))

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All runs, in the order of their reservations."""
        with self._transaction() as connection:
            return self._entries(connection)

    def epsilon(self) -> float:
        """ε at the budget's δ of everything that is charged: settled, reserved and added.

        Returns:
            ε >= 0; 0 without a run. Of one run alone by the tightest accountant, of several by the
            filter, whose sum also holds where later runs were chosen after looking at earlier ones.
        """
        return self._epsilon(self.entries())

    def reserve(
        self,
        run: str,
        releases: Sequence[GaussianRelease],
        *,
        note: str = "",
        continues: bool = False,
    ) -> None:
        """Charge what a run is going to release, or refuse it.

        Args:
            run: Its name, unique to it.
            releases: All that it will release at most.
            note: What it is for.
            continues: The run goes on, and ``releases`` holds all that it has released before, too:
                they take the place of its earlier entry, unless that holds more.

        Raises:
            BudgetExceededError: The budget does not allow it. Nothing is charged then.
            GuaranteeError: There is a run of that name, and this does not continue it.
        """
        planned = merged(releases)
        with self._transaction() as connection:
            entries = self._entries(connection)
            before = [entry for entry in entries if entry.run == run]
            if before and not continues:
                raise _same_name(run)
            if before and _covers(before[0].releases, planned):
                planned = before[0].releases
            entry = LedgerEntry(run=run, releases=planned, settled=False, note=note)
            others = tuple(other for other in entries if other.run != run)
            together = self._epsilon((*others, entry))
            if together > self.budget[0]:
                raise self._refusal(others, planned, together)
            self._write(connection, entry)

    def settle(self, run: str, releases: Sequence[GaussianRelease]) -> None:
        """Charge what a run did release in place of what it reserved.

        Args:
            run: Its name.
            releases: All that it released, over all its resumes.

        Raises:
            GuaranteeError: Nothing was reserved for it, or less than it released; what it
                released is charged all the same.
        """
        spent = merged(releases)
        with self._transaction() as connection:
            before = [entry for entry in self._entries(connection) if entry.run == run]
            note = before[0].note if before else ""
            self._write(connection, LedgerEntry(run=run, releases=spent, settled=True, note=note))
        if not before or not _covers(before[0].releases, spent):
            raise GuaranteeError(
                must="a run releases no more than it reserved",
                found=f"{run!r} released {_counted(spent)} draws and reserved "
                f"{_counted(before[0].releases) if before else 'nothing'}",
                cost="spending that nothing had allowed; it is charged now",
                remedy="reserve the planned releases before the first step",
            )

    def add(self, run: str, releases: Sequence[GaussianRelease], *, note: str = "") -> None:
        """Charge what was released elsewhere, whether or not the budget allows it.

        Args:
            run: A name, unique to it.
            releases: What was released.
            note: What it was.

        Raises:
            GuaranteeError: There is a run of that name.
        """
        with self._transaction() as connection:
            if any(entry.run == run for entry in self._entries(connection)):
                raise _same_name(run)
            self._write(
                connection,
                LedgerEntry(run=run, releases=merged(releases), settled=True, note=note),
            )

    def _epsilon(self, entries: Sequence[LedgerEntry]) -> float:
        releases = [release for entry in entries for release in entry.releases]
        if not releases:
            return 0.0
        order = 1 + 2 * math.log(1 / self.budget[1]) / self.budget[0]
        filtered = renyi_epsilon(releases, self.budget[1], order)
        # One run that was chosen before anything was seen needs no filter. If it leaves no room
        # in the filter, no other run is ever admitted beside it, so that this costs nothing.
        if sum(bool(entry.releases) for entry in entries) == 1:
            return min(filtered, epsilon(releases, self.budget[1]))
        return filtered

    def _refusal(
        self, others: Sequence[LedgerEntry], planned: tuple[GaussianRelease, ...], together: float
    ) -> BudgetExceededError:
        limit, delta = self.budget
        return BudgetExceededError(
            must=f"all runs on {self.dataset!r} together stay within ε = {limit:g} at "
            f"δ = {delta:g}",
            found=f"ε = {shown_epsilon(together)} with this run of {_counted(planned)} draws, "
            f"{shown_epsilon(self._epsilon(others))} without it",
            cost="a budget that protects nobody",
            remedy="plan fewer steps or more noise; see `lightning-privacy ledger show`",
        )

    def _entries(self, connection: sqlite3.Connection) -> tuple[LedgerEntry, ...]:
        query = "SELECT run, releases, settled, note FROM runs WHERE dataset = ? ORDER BY number"
        return tuple(
            LedgerEntry(
                run=run,
                releases=tuple(GaussianRelease.from_dict(part) for part in json.loads(releases)),
                settled=bool(settled),
                note=note,
            )
            for run, releases, settled, note in connection.execute(query, (self.dataset,))
        )

    def _write(self, connection: sqlite3.Connection, entry: LedgerEntry) -> None:
        releases = json.dumps([release.to_dict() for release in entry.releases])
        connection.execute(
            "INSERT INTO runs (dataset, run, releases, settled, note) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (dataset, run) DO UPDATE SET releases = excluded.releases, "
            "settled = excluded.settled, note = excluded.note",
            (self.dataset, entry.run, releases, entry.settled, entry.note),
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # Immediate: two runs that both read before either wrote would both fit the same budget.
        with closing(_connection(self.path)) as link:
            link.execute("BEGIN IMMEDIATE")
            try:
                yield link
            except BaseException:
                link.execute("ROLLBACK")
                raise
            link.execute("COMMIT")


def _connection(path: Path) -> sqlite3.Connection:
    with ExitStack() as failed:
        try:
            link = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            failed.callback(link.close)
            link.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB}:
                raise
            raise ConfigurationError(
                must="the ledger is an SQLite file in a folder that exists",
                found=f"{path}: {error}",
                cost="spent budget that nobody reads, or that is not on record",
                remedy="check the path",
            ) from error
        failed.pop_all()
        return link


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in {0, _VERSION}:
        raise GuaranteeError(
            must=f"the ledger has version {_VERSION}",
            found=f"version {version} in {path.name}",
            cost="spent budget that is read wrongly",
            remedy="use the version of lightning_privacy that wrote it",
        )
    # One by one: `executescript` would commit the transaction.
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _covers(reserved: Sequence[GaussianRelease], spent: Sequence[GaussianRelease]) -> bool:
    """Whether every mechanism was reserved at least as often as it was used."""
    return all(
        any(r.same_mechanism(release) and r.count >= release.count for r in merged(reserved))
        for release in merged(spent)
    )


def _counted(releases: Sequence[GaussianRelease]) -> int:
    return sum(release.count for release in releases)


def _checked_budget(limit: float, delta: float) -> tuple[float, float]:
    limit = real_number(
        "budget",
        limit,
        "(0, inf)",
        cost="a budget that refuses every run, or none",
        remedy="pass (epsilon, delta), for instance (8.0, 1e-6)",
    )
    return limit, checked_delta(delta)


def _no_budget(dataset: str, known: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        must=f"the data set {dataset!r} has one budget (ε, δ)",
        found="none; the ledger holds " + (", ".join(map(repr, known)) or "no data set"),
        cost="runs that no budget limits",
        remedy="check the name; for a new data set pass a budget (epsilon, delta) once",
    )


def _other_budget(dataset: str, stored: object, wanted: object) -> ConfigurationError:
    return ConfigurationError(
        must=f"the data set {dataset!r} has one budget (ε, δ)",
        found=f"{stored} in the file and {wanted} here",
        cost="runs that are measured by different limits",
        remedy="pass budget=(epsilon, delta) once, and leave it out or repeat it later",
    )


def _same_name(run: str) -> GuaranteeError:
    return GuaranteeError(
        must="every run has a name of its own",
        found=f"another run called {run!r}",
        cost="spending that replaces other spending",
        remedy="choose another name, or pass continues=True for a run that goes on",
    )
