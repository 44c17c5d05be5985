"""Two ranks: a checkpoint that is written when a fit fails charges all that was released."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_privacy.callbacks import newest_checkpoint
from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import signal_jobs
from tests.distributed.signal_jobs import STEPS
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


# One rank that fails in a sharded pass leaves the others without its shards: they end, unsaved.
@pytest.mark.parametrize(
    ("strategy", "ranks", "charged"),
    [
        ("private_ddp", [1], 6),  # rank 0 had charged its step when it heard of the failure
        ("private_ddp", [0, 1], 5),
        ("private_fsdp", [0, 1], 5),
    ],
)
def test_all_ranks_write_what_they_had_when_one_failed(
    processes: Processes, tmp_path: Path, strategy: str, ranks: list[int], charged: int
) -> None:
    said = processes.run(signal_jobs.fails, str(tmp_path), strategy, ranks)
    assert all(rank["end"] for rank in said)
    assert [rank["step"] for rank in said] == [5, 5]
    path = newest_checkpoint(tmp_path)
    assert path == tmp_path / "step=5.ckpt"
    assert signal_jobs.charged_in(path) == charged
    again = processes.run(signal_jobs.go_on, str(tmp_path), strategy, str(path))
    assert [(rank["step"], rank["charged"]) for rank in again] == [(STEPS, charged + 5)] * 2
    assert len({rank["secret"] for rank in (*said, *again)}) == 2
