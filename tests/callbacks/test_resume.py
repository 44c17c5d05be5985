"""Checkpoints, resumes and crashes: no draw twice, no noise twice, no spent budget lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_privacy import GuaranteeError
from lightning_privacy.accounting import Journal
from lightning_privacy.callbacks import DifferentialPrivacy
from tests.callbacks.training import (
    LIGHTNING_NOISE,
    Regression,
    loader,
    privacy,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
KEY = "lightning_privacy.DifferentialPrivacy"
CHARGED = r"private steps since the checkpoint are charged"


def saving(directory: Path, every: int = 7) -> ModelCheckpoint:
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=every, save_top_k=-1)


class Failing(pl.Callback):
    """Raises at the start of a batch, or inside a draw."""

    def __init__(self, step: int, error: type[BaseException] = OSError, inside: bool = False):
        self.step, self.error, self.inside = step, error, inside

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.inside:
            raise self.error("stop")

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.inside:
            raise self.error("stop")


class Drawn(pl.Callback):
    def __init__(self) -> None:
        self.cursors: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.cursors.append(trainer.train_dataloader.cursor_of_current)


class OneCycle(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


# ---------------------------------------------------------------------- the same, bit for bit
@pytest.mark.parametrize("step", [7, 14])
@pytest.mark.parametrize("module_class", [Regression, OneCycle])
def test_a_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, step: int, module_class: type[Regression]
) -> None:
    unbroken = module_class()
    whole = trainer(tmp_path, privacy(expected_batch_size=4), saving(tmp_path), max_epochs=2)
    whole.fit(unbroken, loader(batch_size=2))
    resumed, callback, drawn = module_class(), privacy(expected_batch_size=4), Drawn()
    again = trainer(tmp_path, callback, drawn, max_epochs=2)
    again.fit(resumed, loader(batch_size=2), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert same(weights(resumed), weights(unbroken))
    assert drawn.cursors == list(range(step, 20))
    assert callback.steps == again.global_step == 20
    assert callback.epsilon() == float("inf")


@pytest.mark.parametrize("every_epoch", [True, False])
def test_resume_at_the_end_of_an_epoch(tmp_path: Path, every_epoch: bool) -> None:
    options: dict[str, Any] = {"max_epochs": 3} if every_epoch else {"max_steps": 30}
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    unbroken = Regression()
    trainer(tmp_path, privacy(), checkpoint, **options).fit(unbroken, loader())
    resumed = Regression()
    trainer(tmp_path, privacy(), **options).fit(
        resumed, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt")
    )
    assert same(weights(resumed), weights(unbroken))


@pytest.mark.parametrize("inside", [True, False])
def test_resume_after_a_failure_in_test_mode(tmp_path: Path, inside: bool) -> None:
    unbroken = Regression()
    trainer(tmp_path, privacy()).fit(unbroken, loader())
    broken = Regression()
    with pytest.raises(OSError, match="stop"):
        trainer(tmp_path, privacy(), saving(tmp_path), Failing(8, inside=inside)).fit(
            broken, loader()
        )
    resumed = Regression()
    trainer(tmp_path, privacy()).fit(resumed, loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert same(weights(resumed), weights(unbroken))


# ---------------------------------------------------------------------- real runs
def test_a_real_resume_goes_on_with_the_ledger_and_fresh_seeds(tmp_path: Path) -> None:
    first, callback = Regression(), privacy(test_seed=None)
    trainer(tmp_path, callback, saving(tmp_path), max_steps=8).fit(first, loader())
    results = []
    for _ in range(2):
        module, other = Regression(), privacy(test_seed=None)
        fit = trainer(tmp_path, other, max_epochs=1)
        with pytest.warns(UserWarning, match=CHARGED):
            fit.fit(module, loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
        results.append((weights(module), other))
    assert not same(results[0][0], results[1][0])
    # The first run made one step after the checkpoint, the first resume three more.
    assert [callback.steps for _, callback in results] == [8 + 3, 11 + 3]
    one, two = (callback for _, callback in results)
    assert two.epsilon() > one.epsilon() > 0
    assert one.summary().epsilon == pytest.approx(one.epsilon())


def test_a_clean_end_charges_nothing_twice(tmp_path: Path) -> None:
    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, saving(tmp_path), max_steps=7)
    fit.fit(Regression(), loader())
    other = privacy(test_seed=None)
    trainer(tmp_path, other).fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert other.steps == 10


def test_a_failure_charges_what_ran(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="stop"):
        trainer(tmp_path, privacy(test_seed=None), saving(tmp_path, 3), Failing(5)).fit(
            Regression(), loader()
        )
    callback = privacy(test_seed=None)
    with pytest.warns(UserWarning, match="2 private steps since"):
        trainer(tmp_path, callback).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "step=3.ckpt")
        )
    assert callback.steps == 5 + 7


def test_with_a_budget_a_resume_stops_in_time(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"test_seed": None, "epsilon": 4.0}
    with pytest.raises(OSError, match="stop"):
        trainer(tmp_path, privacy(**settings), saving(tmp_path, 3), Failing(5)).fit(
            Regression(), loader()
        )
    callback = privacy(**settings)
    fit = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=r"2 private steps since|The budget allows"):
        fit.fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert callback.steps == 10
    assert fit.global_step == 8
    assert callback.epsilon() <= 4.0


def test_going_back_in_one_process_forgets_nothing(tmp_path: Path) -> None:
    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, saving(tmp_path, 3), max_epochs=1)
    fit.fit(Regression(), loader())
    again = trainer(tmp_path, callback, max_epochs=1)
    again.fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert callback.steps == 10 + 7


def test_two_lineages_in_one_callback_add_up(tmp_path: Path) -> None:
    trainer(tmp_path, privacy(test_seed=None), saving(tmp_path), max_steps=7).fit(
        Regression(), loader()
    )
    callback = privacy(test_seed=None)
    trainer(tmp_path, callback).fit(Regression(), loader())
    trainer(tmp_path, callback).fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert callback.steps == 10 + 7 + 3


def test_a_failed_fit_can_be_repeated(tmp_path: Path) -> None:
    module, callback = Regression(), privacy(test_seed=None)
    with pytest.raises(OSError, match="stop"):
        trainer(tmp_path, callback, Failing(2, inside=True)).fit(module, loader())
    assert all(type(p) is torch.nn.Parameter for p in module.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.steps == 12


def test_ctrl_c_restores_everything(tmp_path: Path) -> None:
    module = Regression()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, privacy(), Failing(2, KeyboardInterrupt, inside=True)).fit(
                module, loader()
            )
    finally:
        signal.signal(signal.SIGINT, handler)
    assert all(type(p) is torch.nn.Parameter for p in module.parameters())
    module.loss((torch.ones(2, 3), torch.ones(2, 1))).backward()


@pytest.mark.parametrize("seed", [None, 11])
def test_evaluation_from_an_old_checkpoint_does_not_turn_the_ledger_back(
    tmp_path: Path, seed: int | None
) -> None:
    callback = privacy(test_seed=seed)
    module = Regression()
    fit = trainer(tmp_path, callback, saving(tmp_path, 3))
    fit.fit(module, loader())
    fit.validate(module, loader(), ckpt_path=str(tmp_path / "step=3.ckpt"), verbose=False)
    assert callback.steps == callback._state.cursor == 10


@pytest.mark.parametrize("resume", [True, False])
def test_neither_noise_nor_draws_follow_from_the_seed_of_everything(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "1")  # seed_everything sets them; undone afterwards
    start = None
    if resume:
        callback = privacy(test_seed=None, journal=False)
        trainer(tmp_path, callback, saving(tmp_path), max_steps=7).fit(Regression(), loader())
        start = str(tmp_path / "step=7.ckpt")
    results, cursors = [], []
    for _ in range(2):
        pl.seed_everything(1, verbose=False)
        module, drawn = Regression(), Drawn()
        callback = privacy(test_seed=None, journal=False)
        trainer(tmp_path, callback, drawn).fit(module, loader(), ckpt_path=start)
        results.append(weights(module))
        cursors.append(drawn.cursors)
        assert callback.steps == 10
    assert cursors[0] == cursors[1]
    assert not same(*results)


def test_a_checkpoint_holds_no_secret_and_loads_safely(tmp_path: Path) -> None:
    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, saving(tmp_path))
    fit.fit(Regression(), loader())
    state = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["callbacks"][KEY]
    assert callback._secret
    assert callback._secret.hex() not in repr(state)
    assert repr(callback._secret)[2:-1] not in repr(state)
    assert state["test_seed"] is None
    assert state["cursor"] == state["releases"] == 7


def test_a_checkpoint_saved_by_hand_opens_the_journal(tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "by_hand.ckpt")

    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, Saving(), max_steps=6)
    fit.fit(Regression(), loader())
    (journal,) = tmp_path.glob("privacy-journal-*.jsonl")
    assert Journal(journal, 20).reserved == 6
    other = privacy(test_seed=None)
    with pytest.warns(UserWarning, match="2 private steps"):
        trainer(tmp_path, other).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "by_hand.ckpt")
        )
    assert other.steps == 6 + 6


def test_without_checkpoints_there_is_no_journal(tmp_path: Path) -> None:
    trainer(tmp_path, privacy(test_seed=None)).fit(Regression(), loader())
    assert list(tmp_path.iterdir()) == []


def test_the_journal_is_found_beside_a_moved_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    trainer(tmp_path, privacy(test_seed=None), saving(old), max_steps=8).fit(Regression(), loader())
    old.rename(new)
    callback = privacy(test_seed=None)
    with pytest.warns(UserWarning, match="1 private steps"):
        trainer(tmp_path, callback).fit(Regression(), loader(), ckpt_path=str(new / "step=7.ckpt"))
    assert callback.steps == 8 + 3


def test_a_missing_journal_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, privacy(test_seed=None), saving(tmp_path), max_steps=8).fit(
        Regression(), loader()
    )
    for journal in tmp_path.glob("*.jsonl"):
        journal.unlink()
    where = str(tmp_path / "step=7.ckpt")
    with pytest.raises(GuaranteeError, match="every release since its checkpoint"):
        trainer(tmp_path, privacy(test_seed=None)).fit(Regression(), loader(), ckpt_path=where)
    callback = privacy(test_seed=None, journal=False)
    trainer(tmp_path, callback).fit(Regression(), loader(), ckpt_path=where)
    assert callback.steps == 10


def test_the_journal_goes_where_it_is_told(tmp_path: Path) -> None:
    callback = privacy(test_seed=None, journal_dir=str(tmp_path / "journals"))
    fit = trainer(tmp_path, callback, saving(tmp_path / "checkpoints"))
    fit.fit(Regression(), loader())
    assert len(list((tmp_path / "journals").iterdir())) == 1
    assert not list((tmp_path / "checkpoints").glob("*.jsonl"))


# ---------------------------------------------------------------------- what is refused
def test_a_checkpoint_without_privacy_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, saving(tmp_path), max_steps=7).fit(Regression(), loader())
    with pytest.raises(GuaranteeError, match="7 training steps, and no such state"):
        trainer(tmp_path, privacy()).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt")
        )


def test_a_checkpoint_without_any_callback_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, privacy(), saving(tmp_path), max_steps=7).fit(Regression(), loader())
    path = tmp_path / "step=7.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]
    torch.save(checkpoint, path)
    with pytest.raises(GuaranteeError, match="and no such state"):
        trainer(tmp_path, privacy()).fit(Regression(), loader(), ckpt_path=str(path))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"noise_multiplier": 0.8}, "noise_multiplier 0.7 there, 0.8 here"),
        ({"clip_norm": 2.0}, "clip_norm 1.0 there, 2.0 here"),
        ({"expected_batch_size": 5}, "sample_rate 0.1 there, 0.125 here"),
        ({"dataset_size": 40}, "relation 'zero_out' there, 'add_or_remove' here"),
        ({"delta": 1e-6}, "delta 1e-05 there, 1e-06 here"),
        ({"accountant": "rdp"}, "accountant 'pld' there, 'rdp' here"),
        ({"clipping": "automatic"}, "clipping 'flat' there, 'automatic' here"),
        ({"test_seed": 12}, "test_seed"),
        ({"test_seed": None}, "deterministic True there, False here"),
        ({"noise_multiplier": None, "epsilon": 3.0}, "noise calibrated for ε None there, 3.0"),
    ],
)
def test_a_changed_mechanism_is_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    settings = {"expected_batch_size": 4}
    trainer(tmp_path, privacy(**settings), saving(tmp_path), max_steps=7).fit(
        Regression(), loader()
    )
    other = privacy(**{**settings, **change})
    with pytest.raises(GuaranteeError, match="the mechanism that it began with") as caught:
        trainer(tmp_path, other).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt")
        )
    assert found in caught.value.found


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(GuaranteeError, match="version 1"):
        privacy(trust_checkpoint=True).load_state_dict({"version": 99})


def test_a_renamed_callback_keeps_its_state(tmp_path: Path) -> None:
    class Renamed(DifferentialPrivacy):
        pass

    trainer(tmp_path, privacy(), saving(tmp_path), max_steps=7).fit(Regression(), loader())
    other = Renamed(delta=1e-5, noise_multiplier=0.7, test_seed=11, print_table=False)
    trainer(tmp_path, other).fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert other.steps == 10


# ---------------------------------------------------------------------- kill -9
KILLED = """
import os, signal, sys
import lightning.pytorch as pl
from pathlib import Path
from tests.callbacks.training import Regression, loader, privacy, trainer
from tests.callbacks.test_resume import saving

class Killing(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 6:
            print(trainer.global_step, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

place = Path(sys.argv[1])
trainer(place, privacy(test_seed=None), saving(place, 4), Killing()).fit(Regression(), loader())
"""


@pytest.mark.slow
def test_kill_9_between_steps_loses_no_spent_budget(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=environment,
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    callback = privacy(test_seed=None)
    with pytest.warns(UserWarning, match=CHARGED):
        trainer(tmp_path, callback).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "step=4.ckpt")
        )
    # Two steps had run since the checkpoint, in blocks of a hundredth of the run: of one step.
    assert callback.steps == 6 + 6
    assert callback.epsilon() > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_fit_says_what_stays_charged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    fit = trainer(tmp_path, privacy(), Failing(3, error))
    with caplog.at_level("INFO"), pytest.raises((SystemExit, OSError)):
        fit.fit(Regression(), loader())
    assert "The 3 private steps so far stay charged" in caplog.text


def test_a_fit_that_is_refused_before_its_first_step_has_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), pytest.raises(OSError, match="stop"):
        trainer(tmp_path, privacy(), Failing(0)).fit(Regression(), loader())
    assert "charged" not in caplog.text
