"""The ledger of a data set: what it admits, what it refuses, and what no crash makes it forget."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from lightning_privacy.accounting import (
    GaussianRelease,
    PrivacyLedger,
    epsilon,
    noise_multiplier_for,
)
from lightning_privacy.accounting.accountants import renyi_epsilon
from lightning_privacy.errors import BudgetExceededError, ConfigurationError, GuaranteeError

RUN = GaussianRelease(noise_multiplier=1.0, sample_rate=0.01, count=100)
BUDGET = (8.0, 1e-5)


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "spent.sqlite", dataset="letters", budget=BUDGET)


def test_a_run_reserves_and_settles(ledger: PrivacyLedger) -> None:
    assert ledger.epsilon() == 0
    ledger.reserve("first", [RUN], note="a try")
    (entry,) = ledger.entries()
    assert (entry.run, entry.releases, entry.settled, entry.note) == (
        "first",
        (RUN,),
        False,
        "a try",
    )
    reserved = ledger.epsilon()
    ledger.settle("first", [RUN.times(40)])
    (entry,) = ledger.entries()
    assert entry.settled
    assert entry.releases == (RUN.times(40),)
    assert entry.note == "a try"
    assert 0 < ledger.epsilon() < reserved


def test_another_object_reads_the_same_file(ledger: PrivacyLedger) -> None:
    ledger.reserve("first", [RUN])
    again = PrivacyLedger(ledger.path, dataset="letters")
    assert again.budget == BUDGET
    assert again.entries() == ledger.entries()
    other = PrivacyLedger(ledger.path, dataset="diaries", budget=(1.0, 1e-6))
    assert other.entries() == ()


def test_one_run_may_use_the_whole_budget(ledger: PrivacyLedger) -> None:
    sigma = noise_multiplier_for(epsilon=8.0, delta=1e-5, sample_rate=0.01, steps=1000)
    whole = GaussianRelease(noise_multiplier=sigma, sample_rate=0.01, count=1000)
    ledger.reserve("first", [whole])
    assert ledger.epsilon() == pytest.approx(epsilon([whole], 1e-5))
    with pytest.raises(BudgetExceededError, match="letters"):
        ledger.reserve("second", [RUN.times(1)])
    assert [entry.run for entry in ledger.entries()] == ["first"]


def test_runs_add_up_until_the_budget_is_spent(ledger: PrivacyLedger) -> None:
    admitted = 0
    with pytest.raises(BudgetExceededError):
        for number in range(500):
            ledger.reserve(f"run {number}", [RUN.times(2000)])
            admitted += 1
    together = RUN.times(2000 * admitted)
    assert admitted > 1
    # The filter holds for runs that were chosen adaptively, and is above the plain sum.
    assert epsilon([together], 1e-5) <= ledger.epsilon() <= 8.0
    order = 1 + 2 * math.log(1e5) / 8
    assert ledger.epsilon() == pytest.approx(renyi_epsilon([together], 1e-5, order))
    assert renyi_epsilon([RUN.times(2000 * (admitted + 1))], 1e-5, order) > 8.0


def test_what_was_released_elsewhere_counts(ledger: PrivacyLedger) -> None:
    ledger.add("histogram", [GaussianRelease(noise_multiplier=0.2, sample_rate=1.0, count=1)])
    assert ledger.epsilon() > 8
    with pytest.raises(BudgetExceededError):
        ledger.reserve("first", [RUN.times(1)])
    with pytest.raises(GuaranteeError, match="name of its own"):
        ledger.add("histogram", [RUN])


def test_a_name_is_used_once(ledger: PrivacyLedger) -> None:
    ledger.reserve("first", [RUN])
    with pytest.raises(GuaranteeError, match="name of its own"):
        ledger.reserve("first", [RUN.times(1)])
    assert ledger.entries()[0].releases == (RUN,)


def test_a_run_that_goes_on_is_charged_once_and_never_less(ledger: PrivacyLedger) -> None:
    ledger.reserve("first", [RUN.times(100)])
    ledger.reserve("first", [RUN.times(300)], continues=True)
    assert ledger.entries()[0].releases == (RUN.times(300),)
    ledger.reserve("first", [RUN.times(50)], continues=True)
    assert ledger.entries()[0].releases == (RUN.times(300),)


def test_more_than_was_reserved_is_charged_and_reported(ledger: PrivacyLedger) -> None:
    ledger.reserve("first", [RUN])
    with pytest.raises(GuaranteeError, match="no more than it reserved"):
        ledger.settle("first", [RUN.times(101)])
    assert ledger.entries()[0].releases == (RUN.times(101),)
    with pytest.raises(GuaranteeError, match="nothing"):
        ledger.settle("stranger", [RUN])
    assert len(ledger.entries()) == 2


def test_a_data_set_has_one_budget(ledger: PrivacyLedger) -> None:
    PrivacyLedger(ledger.path, dataset="letters", budget=BUDGET)
    with pytest.raises(ConfigurationError, match="one budget"):
        PrivacyLedger(ledger.path, dataset="letters", budget=(9.0, 1e-5))
    with pytest.raises(ConfigurationError, match="one budget"):
        PrivacyLedger(ledger.path, dataset="unknown")
    with pytest.raises(ConfigurationError):
        PrivacyLedger(ledger.path, dataset="new", budget=(0.0, 1e-5))


def test_a_file_of_another_version_is_refused(ledger: PrivacyLedger) -> None:
    connection = sqlite3.connect(ledger.path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(GuaranteeError, match="version 7"):
        PrivacyLedger(ledger.path, dataset="letters")


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text,author\n" * 100)
    for name, found in (("table.csv", "not a database"), ("none/x.sqlite", "unable to open")):
        with pytest.raises(ConfigurationError, match=found):
            PrivacyLedger(tmp_path / name, dataset="letters", budget=(8.0, 1e-5))
    assert (tmp_path / "table.csv").read_text() == "text,author\n" * 100


def reserve_one(path: Path, number: int) -> None:
    try:
        PrivacyLedger(path, dataset="letters").reserve(f"run {number}", [RUN.times(2000)])
    except BudgetExceededError:
        os._exit(3)


def reserve_and_die(path: Path) -> None:
    PrivacyLedger(path, dataset="letters").reserve("dead", [RUN])
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_transaction(path: Path) -> None:
    ledger = PrivacyLedger(path, dataset="letters")
    with ledger._transaction() as connection:
        connection.execute("DELETE FROM runs")
        os.kill(os.getpid(), signal.SIGKILL)


def started(target: object, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


@pytest.mark.slow
def test_runs_at_the_same_time_never_overspend_together(ledger: PrivacyLedger) -> None:
    processes = [started(reserve_one, ledger.path, number) for number in range(8)]
    for process in processes:
        process.join(120)
    codes = sorted(process.exitcode for process in processes)
    assert set(codes) == {0, 3}
    assert len(ledger.entries()) == codes.count(0)
    assert ledger.epsilon() <= 8.0


@pytest.mark.slow
def test_a_killed_run_stays_charged(ledger: PrivacyLedger) -> None:
    started(reserve_and_die, ledger.path).join(60)
    assert ledger.entries()[0].releases == (RUN,)
    started(die_within_a_transaction, ledger.path).join(60)
    assert ledger.entries()[0].releases == (RUN,)
    assert ledger.epsilon() > 0
