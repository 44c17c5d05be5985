"""Every way in which Lightning starts processes; what was spent comes home from each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_privacy import GuaranteeError, UnsupportedOperationError
from lightning_privacy.callbacks import DifferentialPrivacy
from lightning_privacy.strategies import PrivateDDPStrategy, privatize
from lightning_privacy.strategies.launching import ReturningLauncher, require_return
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
ROOT = Path(__file__).parents[2]


def script(folder: Path, *words: str, prefix: tuple[str, ...] = ()) -> dict | str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *prefix, str(ROOT / "tests/distributed/script.py"), *words]
    done = subprocess.run(
        [*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    found = folder / "found.json"
    return json.loads(found.read_text()) if found.is_file() else done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "prefix"),
    [
        ("private_ddp", ()),
        ("ddp", ()),
        ("private_ddp_spawn", ()),
        ("ddp", ("-m", "torch.distributed.run", "--nproc-per-node=2")),
    ],
    ids=["popen", "converted", "spawn", "torchrun"],
)
def test_a_script_trains_on_two_ranks(tmp_path: Path, strategy: str, prefix: tuple) -> None:
    found = script(tmp_path, strategy, prefix=prefix)
    assert isinstance(found, dict), found
    assert found["steps"] == 5
    assert 0 < found["epsilon"] == found["headline"] < 100
    assert found["units"] > 0
    assert found["bias"] != found["began"]


@pytest.mark.slow
def test_a_fit_from_which_nothing_comes_home_is_refused(tmp_path: Path) -> None:
    found = script(tmp_path, "ddp_spawn")
    assert isinstance(found, str)
    assert 'Trainer(strategy="private_ddp_spawn")' in found


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "way"), [("0", "kill"), ("1", "forward")])
def test_no_process_stays_behind_a_failed_one(tmp_path: Path, rank: str, way: str) -> None:
    command = [sys.executable, str(ROOT / "tests/distributed/failing.py"), rank, way, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # It returns when all processes have let go of the pipe.
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode
    assert ("no such record" in done.stderr) == (way == "forward")


@pytest.mark.slow
def test_a_job_that_torchrun_starts_again_charges_what_was_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Without it torch 2.13 lets the second start read where the first one's processes were.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        [*command, "--max-restarts=1", str(ROOT / "tests/distributed/restarted.py"), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    # Six steps were over when one process died in the seventh, and the other may have charged more.
    assert found.pop("charged") in {7 + 6, 8 + 6}
    assert found == {"first": False, "from": "step=4.ckpt", "step": 10}


def test_what_forked_processes_spend_comes_home(tmp_path: Path) -> None:
    callback = privacy(test_seed=None, noise_multiplier=1.0)
    module = Regression()
    made = trainer(tmp_path, callback, strategy="private_ddp_fork", devices=2)
    environment = dict(os.environ)
    try:
        made.fit(module, loader())
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
    assert callback.steps == 5
    assert 0 < callback.epsilon() == callback.summary().epsilon
    assert callback.summary().clipped_share is not None
    assert module.net[2].bias != Regression().net[2].bias


def test_a_callback_that_is_away_does_not_answer() -> None:
    callback = DifferentialPrivacy(epsilon=1.0, delta=1e-5)
    callback.home.leave()
    for ask in (callback.epsilon, callback.summary, lambda: callback.steps):
        with pytest.raises(GuaranteeError, match="ended without a word"):
            ask()


def test_names_and_classes() -> None:
    assert privatize(DDPStrategy) is PrivateDDPStrategy
    for name in ("private_ddp", "private_ddp_spawn", "private_ddp_fork", "private_ddp_notebook"):
        assert StrategyRegistry[name]["strategy"] is PrivateDDPStrategy


def test_the_launcher_is_exchanged_in_time(tmp_path: Path) -> None:
    made = trainer(tmp_path, strategy="private_ddp_fork", devices=2)
    assert type(made.strategy.launcher) is ReturningLauncher
    require_return(made.strategy)
    ordinary = trainer(tmp_path, strategy="ddp_fork", devices=2)
    with pytest.raises(UnsupportedOperationError, match="private_ddp_fork"):
        require_return(ordinary.strategy)


@pytest.mark.parametrize("name", ["ddp_comm_hook", "ddp_comm_state", "model_averaging_period"])
def test_gradients_are_not_communicated_in_another_way(name: str) -> None:
    strategy = PrivateDDPStrategy(**{name: 3})
    with pytest.raises(UnsupportedOperationError, match=name):
        strategy.configure_ddp()
