"""Runs and the ledger of their data set: reserved before the first step, settled at the end."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_privacy import BudgetExceededError, ConfigurationError, PrivacyLedger
from lightning_privacy.callbacks import newest_checkpoint
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "spent.sqlite", dataset="rows", budget=(30.0, 1e-5))


class Watch(pl.Callback):
    """Looks at the ledger at the first step, and may end the run at a later one."""

    def __init__(self, ledger: PrivacyLedger, fails_at: int | None = None) -> None:
        self.ledger, self.fails_at, self.seen = ledger, fails_at, ()  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.fails_at:
            raise RuntimeError("the lights went out")

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.seen = self.ledger.entries()  # type: ignore[assignment]


def fitted(directory: Path, ledger: PrivacyLedger, *others: Any, **options: Any) -> Any:
    callback = privacy(
        test_seed=None, noise_multiplier=options.pop("noise_multiplier", 1.0), ledger=ledger
    )
    checkpoint = options.pop("ckpt_path", None)
    trainer(directory, callback, *others, **options).fit(
        Regression(), loader(), ckpt_path=checkpoint
    )
    return callback


def test_steps_are_reserved_before_the_first_and_settled(
    tmp_path: Path, ledger: PrivacyLedger
) -> None:
    watch = Watch(ledger)
    callback = fitted(tmp_path, ledger, watch, max_steps=5)
    (reserved,) = watch.seen
    assert not reserved.settled
    assert sum(release.count for release in reserved.releases) == 5
    (settled,) = ledger.entries()
    assert settled.settled
    assert ledger.epsilon() == pytest.approx(callback.epsilon())


def test_a_run_that_fails_settles_what_it_did(tmp_path: Path, ledger: PrivacyLedger) -> None:
    with pytest.raises(RuntimeError, match="lights"):
        fitted(tmp_path, ledger, Watch(ledger, fails_at=3), max_steps=8)
    (entry,) = ledger.entries()
    assert sum(release.count for release in entry.releases) == 3


def test_a_run_beyond_the_budget_makes_no_step(tmp_path: Path, ledger: PrivacyLedger) -> None:
    watch = Watch(ledger)
    with pytest.raises(BudgetExceededError, match="rows"):
        fitted(tmp_path, ledger, watch, noise_multiplier=0.3, max_steps=9)
    assert watch.seen == ()
    assert ledger.entries() == ()


def test_a_resume_uses_the_run_s_own_entry(tmp_path: Path, ledger: PrivacyLedger) -> None:
    folder = tmp_path / "checkpoints"
    saving = pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
    with pytest.raises(RuntimeError, match="lights"):
        fitted(tmp_path, ledger, saving, Watch(ledger, fails_at=3), max_steps=8)
    with pytest.warns(UserWarning, match="since the checkpoint are charged"):
        fitted(tmp_path, ledger, max_steps=8, ckpt_path=folder / "last.ckpt")
    (entry,) = ledger.entries()
    assert entry.settled
    # Three steps, of which the third was lost with the weights, and six from the second on.
    assert sum(release.count for release in entry.releases) == 9


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_two_continuations_of_a_copied_checkpoint_are_both_charged(
    tmp_path: Path, ledger: PrivacyLedger
) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "run", save_last=True)
    fitted(tmp_path, ledger, saving, max_steps=4)
    for name in ("a", "b"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    for name in ("a", "b"):
        last = tmp_path / name / "last.ckpt"
        saving = pl.callbacks.ModelCheckpoint(tmp_path / name, save_last=True)
        continued = {"max_steps": 9, "max_epochs": 9, "ckpt_path": last}
        assert fitted(tmp_path, ledger, saving, **continued).steps == 9
    # The second one does not know of the first one's steps, and is charged beside it.
    assert [sum(r.count for r in entry.releases) for entry in ledger.entries()] == [9, 9]
    again = newest_checkpoint(tmp_path / "b")
    fitted(tmp_path, ledger, max_steps=11, max_epochs=9, ckpt_path=again)
    assert [sum(r.count for r in entry.releases) for entry in ledger.entries()] == [9, 11]


def test_a_clock_that_goes_back_neither_loses_nor_doubles_spending(
    tmp_path: Path, ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, hours = time.time(), itertools.count(1)
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (now - 3600 * next(hours))))
    folder = tmp_path / "checkpoints"
    saving = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    with pytest.raises(RuntimeError, match="lights"):
        fitted(tmp_path, ledger, saving, Watch(ledger, fails_at=5), max_steps=8)
    # As a clock that was put back between the two leaves them: the newer one looks older.
    for hour, step in enumerate((4, 2)):
        os.utime(folder / f"step={step}.ckpt", (now - 9e5 + hour, now - 9e5 + hour))
    os.utime(ledger.path, (now + 9e5, now + 9e5))
    path = newest_checkpoint(folder)
    assert path == folder / "step=2.ckpt"
    with pytest.warns(UserWarning, match="since the checkpoint are charged"):
        callback = fitted(tmp_path, ledger, max_steps=8, ckpt_path=path)
    (entry,) = ledger.entries()
    assert entry.settled
    # Five steps, and six more from the second on: none is forgotten, and none is charged twice.
    assert sum(release.count for release in entry.releases) == callback.steps == 5 + 6
    fitted(tmp_path, ledger, max_steps=3)
    assert [sum(r.count for r in entry.releases) for entry in ledger.entries()] == [11, 3]


def test_two_fits_of_one_callback_are_one_run(tmp_path: Path, ledger: PrivacyLedger) -> None:
    callback = fitted(tmp_path, ledger, max_steps=3)
    trainer(tmp_path, callback, max_steps=4).fit(Regression(), loader())
    (entry,) = ledger.entries()
    assert sum(release.count for release in entry.releases) == callback.steps == 7


def test_known_noise_costs_everything(tmp_path: Path, ledger: PrivacyLedger) -> None:
    callback = privacy(noise_multiplier=1.0, ledger=ledger)
    with pytest.raises(BudgetExceededError, match="inf"):
        trainer(tmp_path, callback, max_steps=2).fit(Regression(), loader())


def test_a_ledger_needs_the_journal(ledger: PrivacyLedger) -> None:
    with pytest.raises(ConfigurationError, match="journal"):
        privacy(noise_multiplier=1.0, ledger=ledger, journal=False)
