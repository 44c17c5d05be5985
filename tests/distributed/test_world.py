"""What ranks agree on, and how they fail together."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lightning_privacy import ConfigurationError, GuaranteeError
from lightning_privacy.distributed import World, world
from tests.distributed.worlds import Processes


def refused() -> None:
    raise ConfigurationError(must="a", found="b", cost="c", remedy="d")


def caught(part: Any) -> tuple[str, str]:
    try:
        part()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return "", ""


def conversation() -> dict[str, Any]:
    here = World.join()
    rank = here.rank
    sums: list[tuple[int, list[float]]] = []
    exchange = here.exchange(lambda key, total: sums.append((key, total.tolist())))
    for number in range(5):
        exchange.send(number, torch.full((3,), float(number + rank)))
    exchange.finish()
    return {
        "rank": rank,
        "size": here.size,
        "gathered": here.gathered({"rank": rank}),
        "first": here.from_first(["zero", None][rank]),
        "shared": here.shared_secret(bytes([rank]) * 16).hex(),
        "own": here.own_secret(b"x" * 16).hex(),
        "sums": sums,
        "together": here.together(lambda: rank),
        "met": here.meet(3, 4),
    }


def failures() -> list[tuple[str, str]]:
    rank = World.join().rank
    found = []
    for job in (
        lambda here: here.together(refused if rank else lambda: None),
        lambda here: here.together(lambda: 1 / rank),
        lambda here: here.together(lambda: here.gathered(1 / rank)),
        lambda here: here.meet(rank, 0),
        lambda here: here.meet(0, 0) if rank else here.gathered(1),
        lambda here: here.together(lambda: int("a")),
    ):
        here = World.join()
        found.append(caught(lambda job=job, here=here: job(here)))
        # What follows in this world is silent: everybody knows.
        here.fail(OSError("later"))
    return found


def failure_is_read_late(seconds: float) -> tuple[str, float]:
    """How long a failed rank stays, while the other one has not read its words yet."""
    here = World.join()
    heads_and_words = iter([0.0, seconds])
    gather = here._gather

    def slowly(mine: torch.Tensor, patience: Any) -> list[torch.Tensor]:
        parts = gather(mine, patience)
        time.sleep(next(heads_and_words, 0.0))
        return parts

    if here.rank:
        begin = time.monotonic()
        here.fail(OSError("full disk"))
        return "failed", time.monotonic() - begin
    here._gather = slowly  # type: ignore[method-assign]
    return caught(lambda: here.meet(0, 0))[1], 0.0


def nobody_comes(seconds: float) -> str:
    from datetime import timedelta

    here = World.join()
    if here.rank:
        return ""
    world._PATIENCE = timedelta(seconds=seconds)
    here.fail(OSError("alone"))
    return "went on"


def one_leaves_early() -> list[str | None]:
    here = World.join().watched()
    assert here._watch is not None
    found = []
    if here.rank:
        here.left()
    here.gathered(0)
    if not here.rank:
        for _ in range(2):
            here._watch._heard_at = float("-inf")
            found.append(here._watch._heard())
    here.gathered(0)
    here.left()
    return found


def test_a_rank_that_has_left_may_be_silent(processes: Processes) -> None:
    assert processes.run(one_leaves_early) == [[None, None], []]


def test_what_the_ranks_say_to_each_other(processes: Processes) -> None:
    first, second = processes.run(conversation)
    assert [first.pop("rank"), second.pop("rank")] == [0, 1]
    assert [first.pop("together"), second.pop("together")] == [0, 1]
    assert first.pop("own") != second.pop("own")
    assert first == second
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["first"] == "zero"
    assert first["sums"] == [(number, [2.0 * number + 1] * 3) for number in range(5)]
    assert len(first["shared"]) == 64


def test_a_failure_of_one_rank_is_everybodys(processes: Processes) -> None:
    first, second = processes.run(failures)
    # A refusal reaches all with the same words.
    assert first[0] == second[0] == ("ConfigurationError", caught(refused)[1])
    # Any other error stays what it is where it happened.
    for mine, theirs in zip(first[1:3], second[1:3], strict=True):
        assert mine == ("ZeroDivisionError", "division by zero")
        assert theirs[0] == "GuaranteeError"
        assert "rank 0: ZeroDivisionError: division by zero" in theirs[1]
    # Ranks that stand elsewhere do not go on.
    for mine, theirs in zip(first[3:5], second[3:5], strict=True):
        assert mine == theirs
        assert mine[0] == "GuaranteeError"
        assert "rank 0 at" in mine[1]
    # An error that all ranks have themselves is raised as it is.
    assert first[5] == second[5]
    assert first[5][0] == "ValueError"


def test_one_process_talks_to_nobody() -> None:
    here = World.join()
    assert here.alone
    assert here.is_first
    assert here.gathered(3) == [3]
    assert here.from_first("x") == "x"
    assert here.shared_secret(b"own") == b"own"
    assert here.own_secret(b"own") == b"own"
    assert here.noise_share == 1
    here.meet(0, 0)
    here.fail(OSError())
    with pytest.raises(ConfigurationError):
        here.together(refused)
    ones = torch.ones(2)
    assert here.sum_(ones) is ones
    sums: list[tuple[str, torch.Tensor]] = []
    here.exchange(lambda *sum_: sums.append(sum_)).send("a", ones)
    assert sums == [("a", ones)]


def test_a_failed_rank_stays_until_its_words_are_read(processes: Processes) -> None:
    (words, _), (_, stayed) = processes.run(failure_is_read_late, 1.0)
    assert "rank 1: OSError: full disk" in words
    assert stayed > 0.9


def test_an_error_keeps_its_kind() -> None:
    error = GuaranteeError(must="a", found="b", cost="c", remedy="d")
    again = world._error_of(1, world._described(error))
    assert type(again) is GuaranteeError
    assert str(again) == str(error)


def test_a_failed_rank_does_not_wait_forever() -> None:
    own = Processes()
    try:
        assert own.run(nobody_comes, 0.2) == ["went on", ""]
    finally:
        own.stop()
