"""Two GPUs, joined by NCCL, do what one does; with one noise; and no rank outlives another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_ddp import apart, variance_is

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "ranks.py"
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
strategies = pytest.mark.parametrize("strategy", ["private_ddp", "private_fsdp"])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def found(folder: Path, job: str, strategy: str, devices: int, accelerator: str) -> Any:
    """What rank 0 of a job of `tests/gpu/ranks.py` leaves."""
    folder.mkdir()
    words = [str(folder), job, strategy, str(devices), accelerator]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}"]
    subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT), *words],
        env=environment(), cwd=folder, check=True, timeout=280,
    )  # fmt: skip
    return json.loads((folder / "found.json").read_text())


def check_weights(folder: Path, job: str, strategy: str, accelerator: str) -> None:
    one = found(folder / "one", job, strategy, 1, accelerator)
    two = found(folder / "two", job, strategy, 2, accelerator)
    assert apart(two, one) <= 1e-12


def check_noise(folder: Path, strategy: str, accelerator: str) -> None:
    noise = found(folder / "noise", "noise", strategy, 2, accelerator)
    assert variance_is(noise, 1.0)
    assert not variance_is(noise, 2.0)
    assert not variance_is(noise, 0.5)


def check_struck(folder: Path, strategy: str, accelerator: str) -> None:
    """No launcher is there to end the rank that is left."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), "struck", strategy, "2", accelerator],
            cwd=folder, stderr=subprocess.PIPE, text=True,
            env=environment() | {
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "struck",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=280)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -signal.SIGKILL, said
    assert ranks[0].returncode not in (0, -signal.SIGKILL), said


@pytest.mark.gpu
@two_gpus
@strategies
@pytest.mark.parametrize("job", ["examples", "users"])
def test_two_gpus_do_what_one_does(tmp_path: Path, strategy: str, job: str) -> None:
    check_weights(tmp_path, job, strategy, "gpu")


@pytest.mark.gpu
@two_gpus
@strategies
def test_two_gpus_have_one_noise(tmp_path: Path, strategy: str) -> None:
    check_noise(tmp_path, strategy, "gpu")


@pytest.mark.gpu
@two_gpus
@strategies
def test_a_rank_ends_when_another_was_killed(tmp_path: Path, strategy: str) -> None:
    check_struck(tmp_path, strategy, "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["examples", "users"])
def test_the_script_itself(tmp_path: Path, job: str) -> None:
    check_weights(tmp_path, job, "private_fsdp", "cpu")


@pytest.mark.slow
def test_the_noise_of_the_script(tmp_path: Path) -> None:
    check_noise(tmp_path, "private_fsdp", "cpu")


@pytest.mark.slow
@strategies
def test_the_script_when_a_rank_is_killed(tmp_path: Path, strategy: str) -> None:
    check_struck(tmp_path, strategy, "cpu")
