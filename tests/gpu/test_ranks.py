"""Two GPUs, joined by NCCL, do what one does; with one noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_ddp import apart, variance_is

ROOT = Path(__file__).parents[2]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def trained(folder: Path, strategy: str, sigma: float, devices: int, accelerator: str) -> Any:
    """What `tests/gpu/ranks.py` leaves: the weights of rank 0, or the noise in units of sigma C."""
    folder.mkdir()
    script = ROOT / "tests" / "gpu" / "ranks.py"
    words = [str(folder), strategy, str(sigma), str(devices), accelerator]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), *words],
        env=environment, cwd=folder, check=True, timeout=280,
    )  # fmt: skip
    return json.loads((folder / "found.json").read_text())


def check(folder: Path, strategy: str, accelerator: str) -> None:
    one = trained(folder / "one", strategy, 0.0, 1, accelerator)
    two = trained(folder / "two", strategy, 0.0, 2, accelerator)
    assert apart(two, one) <= 1e-12
    noise = trained(folder / "noise", strategy, 0.7, 2, accelerator)
    assert variance_is(noise, 1.0)
    assert not variance_is(noise, 2.0)
    assert not variance_is(noise, 0.5)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("strategy", ["private_ddp", "private_fsdp"])
def test_two_gpus_do_what_one_does(tmp_path: Path, strategy: str) -> None:
    check(tmp_path, strategy, "gpu")


@pytest.mark.slow
def test_the_script_itself(tmp_path: Path) -> None:
    check(tmp_path, "private_fsdp", "cpu")
