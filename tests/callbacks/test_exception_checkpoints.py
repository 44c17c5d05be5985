"""Checkpoints that Lightning writes when a fit fails: charged to the full, or not written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_privacy import GuaranteeError
from lightning_privacy.callbacks import newest_checkpoint
from tests.callbacks.test_failures import NOISE, At, real
from tests.callbacks.test_resume import KEY
from tests.callbacks.training import Regression, loader, trainer

# Lightning looks by itself for what an OnExceptionCheckpoint has left.
NOISE = [
    *NOISE,
    r"ignore:`\.fit\(ckpt_path=None\)` was called",
    r"ignore:\.fit\(ckpt_path=\"last\"\)",
]
pytestmark = [pytest.mark.filterwarnings(text) for text in NOISE]
STEPS = 10


def on_exception(directory: Path, kind: str) -> pl.Callback:
    if kind == "OnExceptionCheckpoint":
        return OnExceptionCheckpoint(directory)
    return ModelCheckpoint(
        directory, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_on_exception=True
    )


KINDS = ["OnExceptionCheckpoint", "ModelCheckpoint"]


def boom(_: Any) -> None:
    raise LookupError("no such column")


def terminate(_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("hook", "drawn", "charged", "step", "end"),
    [
        ("on_train_batch_start", 5, 5, 5, boom),
        ("on_before_zero_grad", 6, 5, 5, boom),  # computed, and not yet charged
        ("on_before_optimizer_step", 6, 6, 5, boom),  # noised, and not yet in the weights
        ("on_train_batch_end", 6, 6, 6, boom),
        ("on_train_batch_start", 6, 6, 6, terminate),
    ],
)
def test_what_is_written_charges_all_that_was_released(
    tmp_path: Path, kind: str, hook: str, drawn: int, charged: int, step: int, end: Any
) -> None:
    begun = real()
    at = At(hook, 6 if hook == "on_train_batch_end" else 5, end)
    with pytest.raises((LookupError, SIGTERMException)):
        trainer(tmp_path, begun, at, on_exception(tmp_path, kind)).fit(Regression(), loader())
    path = newest_checkpoint(tmp_path)
    assert path is not None
    assert path.name == ("on_exception.ckpt" if kind == KINDS[0] else f"step={step}.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == step
    assert saved["callbacks"][KEY]["ledger"]["releases"][0]["count"] == charged
    resumed = real()
    fit = trainer(tmp_path, resumed)
    fit.fit(Regression(), loader(), ckpt_path=str(path))
    assert fit.global_step == STEPS
    assert resumed.steps == charged + STEPS - step
    # What was drawn before the failure is not drawn again, nor noised by the same key.
    assert resumed._state.cursor == drawn + STEPS - step
    assert not {begun._secret, begun._noise_secret} & {resumed._secret, resumed._noise_secret}


class Writes(Regression):
    """Writes into a buffer in its sixth step, which then fails, or is found out."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.register_buffer("seen", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            self.seen += batch[0].sum(0) + 1
            if self.fails:
                raise LookupError("no such column")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [True, False])
def test_what_no_epsilon_covers_is_not_written(tmp_path: Path, kind: str, fails: bool) -> None:
    fit = trainer(tmp_path, real(), on_exception(tmp_path, kind))
    with pytest.raises(GuaranteeError, match="in the step that failed: seen") as caught:
        fit.fit(Writes(fails), loader())
    # The error that ended the fit is told, too.
    assert isinstance(caught.value.__context__, LookupError if fails else GuaranteeError)
    assert not {path.name for path in tmp_path.glob("*.ckpt")} - {"step=4.ckpt"}
    # Nor later on, by hand.
    fit.validate(fit.lightning_module, loader(), verbose=False)
    with pytest.raises(GuaranteeError, match="in the step that failed: seen"):
        fit.save_checkpoint(tmp_path / "by_hand.ckpt")


def test_another_fit_of_the_trainer_may_save(tmp_path: Path) -> None:
    fit = trainer(tmp_path, real())
    with pytest.raises(LookupError):
        fit.fit(Writes(True), loader())
    with pytest.raises(GuaranteeError, match="in the step that failed"):
        fit.save_checkpoint(tmp_path / "by_hand.ckpt")
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "by_hand.ckpt")
