"""Two ranks: whatever ends a run, the ledger is never below the truth, and all ranks end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_privacy.callbacks import newest_checkpoint
from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import failure_jobs as failures
from tests.distributed.test_ddp import apart
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
pytestmark += [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*private steps since the checkpoint are charged"),
]
KILLED = -signal.SIGKILL


@pytest.fixture
def mortal() -> Iterator[Processes]:
    """Two ranks of which some end in the test."""
    own = Processes()
    yield own
    own.stop()


# ------------------------------------------------------------------ the end of a rank, or of all
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "hook", "started"),
    [
        ([0], "on_train_batch_start", 6),  # drawn, and not yet computed
        ([1], "on_before_zero_grad", 6),  # computed, and not yet charged
        ([1], "on_before_optimizer_step", 7),  # released, and not in that rank's weights
        ([0, 1], "on_before_optimizer_step", 7),
        ([0, 1], "on_train_batch_end", 6),
    ],
)
def test_kill_9(mortal, processes, tmp_path, ranks, hook, started) -> None:
    mortal.start(failures.struck, str(tmp_path), ranks, hook, "kill")
    for rank in (0, 1):
        if rank in ranks:
            assert mortal.ended(rank) == KILLED
        else:
            assert "all processes of a private fit go on together" in mortal.answer(rank)
    steps = set(processes.run(failures.go_on, str(tmp_path), 2))
    # The other rank may have been a step further. A block is one step here.
    assert steps <= {started + 6, started + 7}
    assert len(steps) == 1


def test_words_of_a_rank_that_fails_while_the_other_one_waits_are_found(mortal, tmp_path) -> None:
    mortal.start(failures.fails_while_the_other_one_waits, str(tmp_path))
    assert mortal.ended(1) == 1
    words = mortal.answer(0)
    assert "all processes of a private fit go on together" in words
    assert "(rank 1: LookupError: no such column)" in words


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_kill_9_keeps_what_the_ledger_of_the_data_set_reserved(
    mortal, processes, tmp_path, ranks
) -> None:
    mortal.start(failures.struck_with_ledger, str(tmp_path), ranks)
    for rank in (0, 1):
        if rank in ranks:
            assert mortal.ended(rank) == KILLED
        else:
            assert mortal.answer(rank)
    (entry,) = failures.book(str(tmp_path)).entries()
    charged = sum(release.count for release in entry.releases)
    if 0 in ranks:
        # The one that books is gone: all ten steps stay charged.
        assert (entry.settled, charged) == (False, failures.STEPS)
    else:
        # Six steps are over, and the seventh was released by the one that lives on.
        assert 7 <= charged <= failures.STEPS
    found = set(processes.run(failures.go_on_with_ledger, str(tmp_path)))
    assert len(found) == 1
    (entry,) = failures.book(str(tmp_path)).entries()
    assert entry.settled
    # One run, charged once, with what was lost.
    assert {sum(release.count for release in entry.releases)} == found
    assert found <= {13, 14}


@pytest.mark.slow
def test_kill_9_during_the_write_of_a_checkpoint(mortal, processes, tmp_path) -> None:
    mortal.start(failures.struck, str(tmp_path), [0], "", "write")
    assert mortal.ended(0) == KILLED
    assert mortal.answer(1)
    assert (tmp_path / "step=8.ckpt").exists()
    assert processes.run(failures.go_on, str(tmp_path), 2) == [8 + 6, 8 + 6]


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_checkpoint(mortal, processes, tmp_path) -> None:
    mortal.start(failures.struck, str(tmp_path), [0], "on_train_batch_start", "full")
    assert mortal.answer(0).startswith("OSError: [Errno 27] File too large")
    # It waited for the checkpoint, at a barrier of Lightning's.
    assert mortal.ended(1) == 1
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=4.ckpt"]
    assert processes.run(failures.go_on, str(tmp_path), 2) == [8 + 6, 8 + 6]


@pytest.mark.slow
def test_sigterm(mortal, processes, tmp_path) -> None:
    both: list[Any] = mortal.run(
        failures.struck, str(tmp_path), [0, 1], "on_train_batch_start", "term"
    )
    assert all(answer.startswith("SIGTERMException") for answer in both)
    assert processes.run(failures.go_on, str(tmp_path), 2) == [7 + 6, 7 + 6]


@pytest.mark.slow
def test_kill_9_between_the_shards_of_a_checkpoint(mortal, processes, tmp_path) -> None:
    mortal.start(failures.struck, str(tmp_path), [1], "", "shards")
    assert mortal.ended(1) == KILLED
    assert mortal.answer(0)
    assert (tmp_path / "step=8.ckpt").is_dir()
    with pytest.warns(UserWarning, match=r"step=8.ckpt is passed over: it has no \.metadata"):
        assert newest_checkpoint(tmp_path) == tmp_path / "step=4.ckpt"
    found = processes.run(failures.go_on, str(tmp_path), 2, "private_fsdp")
    assert found == [8 + 6, 8 + 6]


# ------------------------------------------------------------------ another mechanism, or data
CHANGES = {
    "noise_multiplier 0.5 there, 0.6 here": {"noise_multiplier": 0.6},
    "clip_norm 1.0 there, 2.0 here": {"clip_norm": 2.0},
    "sample_rate 0.2 there, 0.25 here": {"expected_batch_size": 10},
    "delta 1e-05 there, 1e-06 here": {"delta": 1e-6},
    "unit 'example' there, 'user' here": {
        "unit": "user",
        "users": [*range(20)] * 2,
        "group_size": 2,
    },
    "sample_rate 0.2 there, 0.16 here": {"rows": 50},
    "precision_slack": {"precision": "32-true"},
}


def test_a_changed_mechanism_is_refused_by_all_ranks(processes, tmp_path) -> None:
    processes.run(failures.train_to, str(tmp_path), 2, 4)
    path = str(tmp_path / "step=4.ckpt")
    first, second = processes.run(failures.changed, str(tmp_path), 2, path, list(CHANGES.values()))
    assert first == second
    for words, said in zip(CHANGES, first, strict=True):
        assert said.startswith("GuaranteeError")
        assert words in said


def test_a_finer_precision_and_other_micro_batches_go_on(processes, tmp_path) -> None:
    processes.run(failures.train_to, str(tmp_path), 2, 4, "32-true")
    path = str(tmp_path / "step=4.ckpt")
    found = processes.run(failures.changed, str(tmp_path), 2, path, [{"precision": "64-true"}])
    assert found == [[""], [""]]


# ------------------------------------------------------------------ broken numbers
def test_poisoned_rows_are_worth_nothing_on_any_rank(processes, tmp_path) -> None:
    one = failures.poisoned(str(tmp_path), 1)
    first, second = processes.run(failures.poisoned, str(tmp_path), 2)
    assert first == second
    assert apart(first["weights"], one["weights"]) <= 1e-12
    assert first["lost"] == one["lost"] > 0
    assert first["steps"] == one["steps"]
