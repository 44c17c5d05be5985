"""What the ranks do in the tests of signals: to one rank, or to each at another moment."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_privacy.distributed import world
from tests.callbacks.test_failures import At
from tests.callbacks.training import BATCH, Regression, loader, privacy, trainer

STEPS = 10
# Hooks of the same step, by rank; between the two lies all that ranks tell each other in a step.
APART = {0: "on_train_batch_start", 1: "on_before_optimizer_step"}


def fit(directory: str, strategy: str, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    """Ten steps on two ranks, with a checkpoint after each four; what this rank says of it."""
    callback = privacy(test_seed=None, noise_multiplier=0.5, expected_batch_size=2 * BATCH)
    saving = ModelCheckpoint(
        directory, filename="{step}", every_n_train_steps=4, save_top_k=-1,
        save_on_exception=options.pop("save_on_exception", False),
    )  # fmt: skip
    path, module = options.pop("ckpt_path", None), options.pop("module", Regression())
    options = {"max_steps": STEPS, "max_epochs": -1, "val_check_interval": 2, **options}
    options |= {"strategy": strategy, "devices": 2}
    made = trainer(Path(directory), callback, *callbacks, saving, **options)
    end = ""
    try:
        made.fit(module, loader(), loader(), ckpt_path=path)
    except BaseException as error:  # noqa: BLE001 - this is what the tests look at
        end = type(error).__name__
    return {
        "end": end,
        "step": made.global_step,
        "charged": callback.steps,
        "drawn": callback._state.cursor,
        "secret": callback._secret.hex(),
        "noise": callback._noise_secret.hex(),
        "from": None if made.ckpt_path is None else Path(made.ckpt_path).name,
    }


def go_on(directory: str, strategy: str, path: str) -> dict[str, Any]:
    """From a checkpoint to the end."""
    return fit(directory, strategy, ckpt_path=path)


def signalled(
    directory: str, strategy: str, number: int, hooks: dict[int, str], step: int = 5
) -> dict[str, Any]:
    """Some ranks get a signal when so many steps are over, each at a hook of its own."""
    hook = hooks.get(dist.get_rank())
    callbacks = [At(hook, step, lambda _: signal.raise_signal(number))] if hook else []
    return fit(directory, strategy, *callbacks)


def under_slurm(directory: str, strategy: str, hooks: dict[int, str]) -> dict[str, Any]:
    """SLURM's signal comes in the sixth step, and two steps later SLURM ends the job."""
    hook = hooks.get(dist.get_rank())
    callbacks = [At(hook, 5, lambda _: signal.raise_signal(signal.SIGUSR1))] if hook else []
    ending = At("on_train_batch_start", 7, lambda _: signal.raise_signal(signal.SIGTERM))
    return started_by_slurm(directory, strategy, *callbacks, ending)


def started_by_slurm(directory: str, strategy: str, *callbacks: pl.Callback) -> dict[str, Any]:
    """A job under SLURM, with a `scontrol` that writes down what it was asked."""
    rank, commands = str(dist.get_rank()), Path(directory) / "bin"
    if rank == "0" and not commands.exists():
        commands.mkdir()
        (commands / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {directory}/asked\n')
        (commands / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    names = {"JOB_ID": "7", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0"}
    for name, value in {**names, "PROCID": rank, "LOCALID": rank}.items():
        os.environ[f"SLURM_{name}"] = value
    return fit(directory, strategy, *callbacks, plugins=[SLURMEnvironment(auto_requeue=True)])


class Fails(Regression):
    """Fails in its sixth step, when the pass is over."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 5:
            raise LookupError("no such column")
        return loss


def fails(directory: str, strategy: str, ranks: list[int]) -> dict[str, Any]:
    """Some ranks fail in their sixth step, and a checkpoint is written on it."""
    world._PATIENCE, world._GRACE = timedelta(seconds=1), timedelta(seconds=20)
    here = dist.get_rank() in ranks
    module = Fails() if here else Regression()
    return fit(directory, strategy, module=module, save_on_exception=True)


def charged_in(path: Path) -> int:
    """How many steps a checkpoint charges."""
    file = path / "meta.pt" if path.is_dir() else path
    saved = torch.load(file, weights_only=True)
    state = saved["callbacks"]["lightning_privacy.DifferentialPrivacy"]
    return sum(release["count"] for release in state["ledger"]["releases"])
