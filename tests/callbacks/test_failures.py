"""Whatever ends a run, the ledger is never below the truth, and a whole checkpoint goes on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_privacy import GuaranteeError, PrivacyLedger
from lightning_privacy.callbacks import newest_checkpoint
from tests.callbacks.test_resume import KEY, saving
from tests.callbacks.training import (
    LIGHTNING_NOISE,
    Regression,
    data,
    loader,
    privacy,
    same,
    trainer,
    weights,
)

NOISE = [*LIGHTNING_NOISE, "ignore:Checkpoint directory .* exists and is not empty"]
pytestmark = [pytest.mark.filterwarnings(text) for text in NOISE]
RESUMED = "private steps since the checkpoint are charged"


def real(**settings: Any) -> Any:
    return privacy(test_seed=None, **settings)


class At(pl.Callback):
    """Does something at a hook of the first step that has come so far."""

    def __init__(self, hook: str, step: int, action: Callable[[pl.Trainer], object]) -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, hook, self._run)

    def _run(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.action(trainer)


def killed(fit: Callable[[], object]) -> None:
    """Run a fit in a child process that has to die by SIGKILL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer versions, about forks and threads
        child = os.fork()
    if not child:
        try:
            fit()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def go_on(directory: Path, **settings: Any) -> Any:
    callback, fit = real(**settings), None
    fit = trainer(directory, callback)
    fit.fit(Regression(), loader(), ckpt_path=str(newest_checkpoint(directory)))
    assert fit.global_step == 10
    return callback


# ---------------------------------------------------------------------- kill -9
@pytest.mark.parametrize(
    ("hook", "started"),
    [
        ("on_train_batch_start", 6),  # drawn, and not yet computed
        ("on_before_zero_grad", 6),  # computed, and not yet charged
        ("on_before_optimizer_step", 7),  # noised, and not yet in the weights
        ("on_train_batch_end", 6),
    ],
)
def test_kill_9_anywhere_in_a_step(tmp_path: Path, hook: str, started: int) -> None:
    def fit() -> None:
        trainer(tmp_path, real(), saving(tmp_path, 4), At(hook, 6, kill)).fit(
            Regression(), loader()
        )

    killed(fit)
    with pytest.warns(UserWarning, match=RESUMED):
        callback = go_on(tmp_path)
    # Blocks are a hundredth of the run, here one step: nothing is charged that had not started.
    assert callback.steps == started + 6


class Torn(TorchCheckpointIO):
    """Writes half of a checkpoint, as a file system that cannot rename at once, and then dies."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end, self.count = end, 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.count += 1
        super().save_checkpoint(checkpoint, path, storage_options)
        if self.count == 2:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            self.end()


def test_kill_9_during_the_write_of_a_checkpoint(tmp_path: Path) -> None:
    def fit() -> None:
        trainer(tmp_path, real(), saving(tmp_path, 4), plugins=[Torn(kill)]).fit(
            Regression(), loader()
        )

    killed(fit)
    with pytest.warns(UserWarning, match="passed over|private steps since") as caught:
        callback = go_on(tmp_path)
    said = " ".join(str(warning.message) for warning in caught)
    assert "step=8.ckpt is passed over: it cannot be read" in said
    assert "4 private steps since" in said
    assert callback.steps == 8 + 6


def test_kill_9_before_any_checkpoint_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    def fit() -> None:
        at = At("on_train_batch_start", 2, kill)
        trainer(tmp_path, real(), saving(tmp_path, 4), at).fit(Regression(), loader())

    killed(fit)
    assert newest_checkpoint(tmp_path) is None


def test_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"half")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(GuaranteeError):
        newest_checkpoint(tmp_path)


# ---------------------------------------------------------------------- a full disk
@pytest.fixture
def full_disk() -> Any:
    """Files cannot grow beyond some size, from the moment that the test calls this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_for_a_checkpoint(tmp_path: Path, full_disk: Any) -> None:
    at = At("on_train_batch_start", 6, lambda _: full_disk(3000))
    with pytest.raises(OSError, match="File too large"):
        trainer(tmp_path, real(), saving(tmp_path, 4), at).fit(Regression(), loader())
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt"]
    with pytest.warns(UserWarning, match="4 " + RESUMED):
        assert go_on(tmp_path).steps == 8 + 6


def test_a_disk_that_is_full_for_the_journal(tmp_path: Path, full_disk: Any) -> None:
    at = At("on_train_batch_start", 6, lambda _: full_disk(1))
    module = Regression()
    with pytest.warns(UserWarning, match="could not be closed"):
        with pytest.raises(OSError, match="File too large"):
            trainer(tmp_path, real(), saving(tmp_path, 4), at).fit(module, loader())
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert all(type(p) is torch.nn.Parameter for p in module.parameters())
    # The seventh step never released anything: it could not be charged.
    with pytest.warns(UserWarning, match="2 " + RESUMED):
        assert go_on(tmp_path).steps == 6 + 6


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_no_space_at_the_flush_of_a_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real_fsync = os.fsync
    module = Regression()
    before: dict[str, Tensor] = {}

    def no_space(descriptor: int) -> None:
        if call == "write":
            real_fsync(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    def begin(_: Any) -> None:
        before.update(weights(module))
        monkeypatch.setattr(os, "fsync", no_space)

    at = At("on_train_batch_start", 6, begin)
    with pytest.warns(UserWarning, match="could not be closed"):
        with pytest.raises(OSError, match="No space left"):
            trainer(tmp_path, real(), saving(tmp_path, 4), at).fit(module, loader())
    assert same(weights(module), before)  # what cannot be charged is not released
    monkeypatch.setattr(os, "fsync", real_fsync)
    with pytest.warns(UserWarning, match=RESUMED):
        assert go_on(tmp_path).steps in {6 + 6, 7 + 6}


def test_a_ledger_that_cannot_be_settled_keeps_its_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.sqlite", dataset="d", budget=(50.0, 1e-4))

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(PrivacyLedger, "settle", full)
    with pytest.warns(UserWarning, match="disk is full"):
        trainer(tmp_path, real(ledger=ledger)).fit(Regression(), loader())
    (entry,) = ledger.entries()
    assert not entry.settled
    assert sum(release.count for release in entry.releases) == 10


# ---------------------------------------------------------------------- signals
@pytest.fixture
def _handlers() -> Any:
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_sigterm_ends_after_a_step_and_charges_what_ran(tmp_path: Path, hook: str) -> None:
    at = At(hook, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    module = Regression()
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, real(), saving(tmp_path, 4), at).fit(module, loader())
    assert all(type(p) is torch.nn.Parameter for p in module.parameters())
    with pytest.warns(UserWarning, match="2 " + RESUMED):
        assert go_on(tmp_path).steps == 6 + 6


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("hook", "at_save"),
    [
        ("on_train_batch_start", 5),
        ("on_before_zero_grad", 5),
        ("on_before_optimizer_step", 6),
        ("training_step", 5),
    ],
)
def test_slurm_takes_the_job_back_and_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, at_save: int
) -> None:
    # Lightning saves from within the signal's handler, wherever training is, and asks SLURM to
    # start the job again; SLURM then ends it.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")

    class Interrupted(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if hook == "training_step" and self.trainer.global_step == 5:
                signal.raise_signal(signal.SIGUSR1)
            return loss

    at = At(hook, 5, lambda _: signal.raise_signal(signal.SIGUSR1))
    options = {"plugins": [SLURMEnvironment(auto_requeue=True)], "max_epochs": 1}
    callbacks = [at, At("on_train_batch_start", 7, kill)]
    killed(
        lambda: trainer(tmp_path, real(), saving(tmp_path / "other", 4), *callbacks, **options).fit(
            Interrupted(), loader()
        )
    )
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["callbacks"][KEY]["ledger"]["releases"][0]["count"] == at_save
    assert all(value.shape for value in saved["state_dict"].values())
    # The second job finds the checkpoint by itself.
    callback = real(journal_dir=str(tmp_path / "other"))
    fit = trainer(tmp_path, callback, **options)
    with pytest.warns(UserWarning, match=RESUMED):
        fit.fit(Regression(), loader())
    assert fit.global_step == 10
    assert callback.steps >= 7 + 4


# ---------------------------------------------------------------------- other configurations
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_resume_with_another_micro_batch_size(tmp_path: Path, batch_size: int) -> None:
    settings: dict[str, Any] = {"expected_batch_size": 4}
    unbroken, resumed = Regression(), Regression()
    trainer(tmp_path, privacy(**settings), saving(tmp_path)).fit(unbroken, loader(batch_size=2))
    callback = privacy(**settings)
    trainer(tmp_path, callback).fit(
        resumed, loader(batch_size=batch_size), ckpt_path=str(tmp_path / "step=7.ckpt")
    )
    assert callback.steps == 10
    for name, value in weights(unbroken).items():
        torch.testing.assert_close(weights(resumed)[name], value)


def test_the_batch_size_is_part_of_the_mechanism_where_nothing_else_gives_it(
    tmp_path: Path,
) -> None:
    trainer(tmp_path, real(), saving(tmp_path), max_steps=7).fit(Regression(), loader())
    with pytest.raises(GuaranteeError, match="sample_rate 0.1 there, 0.2 here"):
        trainer(tmp_path, real()).fit(
            Regression(), loader(batch_size=8), ckpt_path=str(tmp_path / "step=7.ckpt")
        )


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ("bf16-mixed", "32-true", True),
        ("32-true", "64-true", True),
        ("32-true", "bf16-mixed", False),
        ("64-true", "32-true", False),
    ],
)
def test_resume_in_another_precision(
    tmp_path: Path, first: str, second: str, allowed: bool
) -> None:
    class Cast(Regression):
        def loss(self, batch: Any) -> Tensor:
            kind = self.net[0].weight.dtype
            return super().loss([part.to(kind) for part in batch])

    begun = real()
    trainer(tmp_path, begun, saving(tmp_path), max_steps=7, precision=first).fit(Cast(), loader())
    callback = real()
    fit = trainer(tmp_path, callback, precision=second)
    if not allowed:
        with pytest.raises(GuaranteeError, match="precision_slack"):
            fit.fit(Cast(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
        return
    fit.fit(Cast(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    # Counted with the larger slack from the first step to the last.
    (release,) = callback._state.ledger.releases
    assert release == begun._state.ledger.releases[0].times(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sample_rate 0.1 there, 0.08"),
        ({"expected_batch_size": 4}, "sample_rate 0.1 there, 0.08"),
        (
            {"unit": "user", "users": [*range(25)] * 2, "group_size": 2, "expected_batch_size": 4},
            "unit 'example' there",
        ),
    ],
)
def test_another_size_of_the_data_or_unit_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    usual = {k: v for k, v in settings.items() if k == "expected_batch_size"}
    trainer(tmp_path, real(**usual), saving(tmp_path), max_steps=7).fit(Regression(), loader())
    with pytest.raises(GuaranteeError, match=message):
        trainer(tmp_path, real(**settings)).fit(
            Regression(), loader(50), ckpt_path=str(tmp_path / "step=7.ckpt")
        )


def test_a_private_size_may_change_and_is_stored_nowhere(tmp_path: Path) -> None:
    # The declared number enters the rate; whoever joined or left is covered by what they took
    # part in, and what the true number is must not be read off a checkpoint.
    settings: dict[str, Any] = {"expected_batch_size": 4, "dataset_size": 64}
    trainer(tmp_path, real(**settings), saving(tmp_path), max_steps=7).fit(Regression(), loader(37))
    assert "37" not in repr(torch.load(tmp_path / "step=7.ckpt")["callbacks"][KEY]["plan"])
    callback = real(**settings)
    trainer(tmp_path, callback).fit(
        Regression(), loader(41), ckpt_path=str(tmp_path / "step=7.ckpt")
    )
    assert callback.steps == 16


# ---------------------------------------------------------------------- broken numbers
class Broken(Regression):
    """A loss or a gradient that is no number, from some step on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.kind == "NaN loss":
            return loss * float("nan")
        if self.kind == "infinite loss":
            return loss * float("inf")
        # A finite loss whose gradient is infinite.
        return loss + (self.net[0].weight.sum() * 0).abs().sqrt() * batch[0].mean()


@pytest.mark.parametrize("kind", ["NaN loss", "infinite loss", "infinite gradient"])
def test_a_run_of_broken_numbers_releases_noise_and_charges_it(tmp_path: Path, kind: str) -> None:
    module, callback = Broken(kind), real(independence_check=False)
    start = weights(module)
    trainer(tmp_path, callback).fit(module, loader())
    found = weights(module)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert not same(found, start)
    summary = callback.summary()
    assert summary.nonfinite_units == callback._tally.units > 0
    assert callback.steps == 10
    assert callback.epsilon() > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -3e38, 1e30])
def test_poisoned_examples_leave_the_others_their_training(tmp_path: Path, poison: float) -> None:
    rows = data()
    rows.tensors[0][::5] = poison
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "clip_norm": 0.5}
    settings["independence_check"] = False
    module, callback = Regression(), privacy(**settings)
    start = weights(module)
    trainer(tmp_path, callback).fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    callback._tally.catch_up()
    moved = [value - start[name] for name, value in weights(module).items()]
    assert all(bool(value.isfinite().all()) for value in moved)
    # Nobody moves the weights by more than C / batch times the learning rate.
    length = float(torch.cat([value.flatten() for value in moved]).norm())
    assert 0 < length <= callback._tally.units * 0.5 / 4 * 0.1
