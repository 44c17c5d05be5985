"""Signals that reach ranks apart: all end, or save, at one moment, and every step is charged."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_privacy.distributed.signals import Signals
from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import signal_jobs
from tests.distributed.signal_jobs import APART, STEPS
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
NUMBERS = [signal.SIGUSR1, signal.SIGTERM]


@pytest.fixture
def mortal() -> Iterator[Processes]:
    """Two ranks of the test alone: one that waits in vain can only be killed."""
    own = Processes()
    yield own
    own.stop()


# ------------------------------------------------------------------ what is noted, and answered
@pytest.fixture
def called() -> Iterator[list[int]]:
    """Calls of the handlers of two signals."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    found: list[int] = []
    for number in NUMBERS:
        signal.signal(number, lambda number, _: found.append(number))
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def listening() -> Signals:
    signals = Signals()
    signals.take_over(NUMBERS, callable)
    return signals


def test_a_signal_waits_until_all_ranks_know(called: list[int]) -> None:
    here, there = listening(), Signals()
    there._handlers = dict(here._handlers)  # as another process has them
    assert [here.asked(), there.asked()] == [0, 0]
    signal.raise_signal(signal.SIGTERM)
    here.answer()
    assert not called
    for each in (here, there):
        each.agree([here.asked(), there.asked()])
    there.answer()
    assert called == [signal.SIGTERM]
    there.answer()
    assert called == [signal.SIGTERM]


def test_the_checkpoint_comes_before_the_end(called: list[int]) -> None:
    signals = listening()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR1)
    assert not called
    signals.agree([signals.asked()])
    signals.answer()
    assert called == NUMBERS
    assert not signals.asked()


def test_one_that_comes_while_another_is_answered_is_kept(called: list[int]) -> None:
    signals = listening()
    ordinary = signals._handlers[signal.SIGUSR1]

    def requeue(number: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        ordinary(number, frame)

    signals._handlers[signal.SIGUSR1] = requeue
    signal.raise_signal(signal.SIGUSR1)
    for _ in range(2):
        signals.agree([signals.asked()])
        signals.answer()
    assert called == NUMBERS


def test_handlers_of_others_stay(called: list[int]) -> None:
    signals = Signals()
    signals.take_over(NUMBERS, lambda _: False)
    thread = threading.Thread(target=signals.take_over, args=(NUMBERS, callable))
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert called == [signal.SIGTERM]
    assert not signals.asked()


# ------------------------------------------------------------------ SIGTERM
@pytest.mark.parametrize("strategy", ["private_ddp", "private_fsdp"])
@pytest.mark.parametrize(
    "hooks",
    [{0: "on_train_batch_start"}, {1: "on_before_zero_grad"}, APART],
    ids=["first", "second", "apart"],
)
def test_sigterm_ends_all_ranks_after_one_step(
    mortal: Processes, processes: Processes, tmp_path: Path, strategy: str, hooks: dict[int, str]
) -> None:
    said = mortal.run(signal_jobs.signalled, str(tmp_path), strategy, signal.SIGTERM, hooks)
    ends = [(rank["end"], rank["step"], rank["charged"]) for rank in said]
    assert ends == [("SIGTERMException", 6, 6)] * 2
    path = str(tmp_path / "step=4.ckpt")
    again = processes.run(signal_jobs.go_on, str(tmp_path), strategy, path)
    assert [(rank["step"], rank["charged"]) for rank in again] == [(STEPS, 6 + 6)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_the_ranks_validate(mortal: Processes, tmp_path: Path, rank: int) -> None:
    # Epochs have five steps, and a validation after each second one: the fourth, the seventh.
    hooks = {rank: "on_validation_batch_start"}
    job = signal_jobs.signalled
    said = mortal.run(job, str(tmp_path), "private_ddp", signal.SIGTERM, hooks, 7)
    assert [(each["end"], each["step"]) for each in said] == [("SIGTERMException", 7)] * 2


# ------------------------------------------------------------------ SLURM
@pytest.mark.parametrize("strategy", ["private_ddp", "private_fsdp"])
@pytest.mark.parametrize("hooks", [APART, {1: "on_before_zero_grad"}], ids=["apart", "second"])
def test_slurm_takes_the_job_back_and_starts_it_again(
    mortal: Processes, tmp_path: Path, strategy: str, hooks: dict[int, str]
) -> None:
    first = mortal.run(signal_jobs.under_slurm, str(tmp_path), strategy, hooks)
    ends = [(rank["end"], rank["step"], rank["charged"]) for rank in first]
    assert ends == [("SIGTERMException", 8, 8)] * 2
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    # Saved after the step in which the signal came, by all ranks at that step.
    assert signal_jobs.charged_in(tmp_path / "hpc_ckpt_1.ckpt") == 6
    # The second job finds it by itself, and charges the two steps after it.
    second = mortal.run(signal_jobs.started_by_slurm, str(tmp_path), strategy)
    ends = [(rank["end"], rank["step"], rank["charged"], rank["from"]) for rank in second]
    assert ends == [("", STEPS, 8 + 4, "hpc_ckpt_1.ckpt")] * 2
    # No draw and no noise comes again: the one is common to all ranks, the other each rank's own.
    assert len({rank["secret"] for rank in (*first, *second)}) == 2
    assert len({rank["noise"] for rank in (*first, *second)}) == 4
    assert {rank["drawn"] for rank in second} == {8 + 4}
