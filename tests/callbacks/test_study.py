"""Study mode leaves out what it says, never shows a finite ε, and is never entered by accident."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import DifferentialPrivacy, PrivacyLedger, PrivacyPlan
from lightning_privacy.callbacks import Study, StudyMode
from lightning_privacy.cli import main
from lightning_privacy.errors import BudgetExceededError, ConfigurationError, PrivacyError
from lightning_privacy.reports import summary_rows
from lightning_privacy.study import StudyPlan

ROWS, RATE = 64, 0.1
NO_NOISE = Study(without=("noise",), not_private=True)
NO_CLIPPING = Study(without=("clipping",), not_private=True)
NEITHER = Study(without=("clipping", "noise"), not_private=True)


class Line(L.LightningModule):
    """One weight for each input, whose per-example gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(10 * torch.rand(ROWS, 4, generator=generator)), batch_size=16)


def whole(**settings) -> DifferentialPrivacy:
    given = {"epsilon": 2.0, "delta": 1e-3, "expected_batch_size": ROWS, "print_table": False}
    return DifferentialPrivacy(**{**given, **settings})


def fit(callback, folder, *, max_steps=1, ckpt_path=None, **settings) -> tuple[L.Trainer, Line]:
    model = Line()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=[callback],
        **{"enable_checkpointing": False, **settings},
    )
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer, model


def gradient(model: Line) -> torch.Tensor:
    """What the one step of SGD subtracted, of the mean over the expected batch."""
    return -model.weight.detach() / RATE


def test_without_clipping_and_noise_it_is_ordinary_training(tmp_path):
    # Every row is drawn at rate 1.
    _, model = fit(StudyMode(whole(), NEITHER), tmp_path)
    rows = loader().dataset.tensors[0]
    torch.testing.assert_close(gradient(model), rows.mean(dim=0))


def test_without_noise_the_gradient_is_the_clipped_mean(tmp_path):
    _, model = fit(StudyMode(whole(clip_norm=0.5), NO_NOISE), tmp_path)
    rows = loader().dataset.tensors[0]
    norms = rows.norm(dim=1, keepdim=True)
    assert (norms > 0.5).all()
    torch.testing.assert_close(gradient(model), (0.5 * rows / norms).mean(dim=0))


def test_without_clipping_the_noise_is_that_of_the_whole_mechanism(tmp_path):
    rows = loader().dataset.tensors[0]
    found, std = [], 0.0
    for _ in range(40):
        callback = StudyMode(whole(clip_norm=0.5), NO_CLIPPING)
        _, model = fit(callback, tmp_path)
        std = callback.plan.noise_multiplier * 0.5 / ROWS
        found.append((gradient(model) - rows.mean(dim=0)) / std)
    _, ordinary = fit(private := whole(clip_norm=0.5), tmp_path)
    assert private.plan.noise_multiplier == pytest.approx(callback.plan.noise_multiplier)
    # Of 160 numbers: by chance further away once in ten million runs, and never as far as 2.
    assert torch.stack(found).std() == pytest.approx(1.0, abs=0.3)
    assert ordinary.weight.detach().norm() > 0


@pytest.mark.parametrize("study", [NO_NOISE, NO_CLIPPING, NEITHER], ids=str)
def test_no_finite_epsilon_is_ever_shown(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    callback = StudyMode(whole(print_table=True), study)
    trainer, _ = fit(callback, tmp_path, max_steps=3)
    assert callback.steps == 3
    assert callback.epsilon() == math.inf
    assert trainer.callback_metrics["privacy/epsilon"] == math.inf
    plan = callback.plan
    assert plan.epsilon() == plan.epsilon(1) == math.inf
    assert plan.epsilon_by_tier() == {}
    summary = callback.summary()
    assert summary.epsilon == summary.epsilon_at_stop == math.inf
    assert dict(summary_rows(summary))["epsilon spent"].startswith("infinite (study mode, without")
    shown = capsys.readouterr().out
    assert "NOT private" in shown
    assert "infinite (study mode" in shown
    lines = [line for line in shown.splitlines() if "epsilon" in line]
    assert lines
    assert all("infinite" in line for line in lines)


def test_a_study_plan_cannot_be_made_finite():
    plan = PrivacyPlan(
        relation="zero_out", sample_rate=0.1, expected_batch_size=8, noise_multiplier=1.0,
        clip_norm=1.0, steps=10, delta=1e-5, deterministic=True,
    )  # fmt: skip
    study = NEITHER.applied_to(plan)
    assert NEITHER.applied_to(study) is study
    assert study.noise_std == 0.0
    with pytest.raises(ConfigurationError, match="deterministic=False"):
        replace(study, deterministic=False)
    with pytest.raises(ConfigurationError, match="deterministic=False"):
        NO_NOISE.applied_to(replace(plan, deterministic=False))
    with pytest.raises(ConfigurationError, match="calibrate"):
        StudyPlan.calibrated(epsilon=1.0)
    with pytest.raises(ConfigurationError, match="unknown \\['without'\\]"):
        PrivacyPlan.from_dict(study.to_dict())
    assert {field.name for field in fields(study)} - {field.name for field in fields(plan)}


@pytest.mark.parametrize(
    "settings",
    [
        {"without": ("noise",)},
        {"without": ("noise",), "not_private": "yes"},
        {"without": (), "not_private": True},
        {"without": ("seatbelt",), "not_private": True},
    ],
    ids=str,
)
def test_nobody_enters_a_study_by_accident(settings):
    with pytest.raises(ConfigurationError):
        Study(**settings)


def test_an_ordinary_callback_has_no_study():
    assert whole().settings.study is None
    with pytest.raises(TypeError):
        whole(study=NEITHER)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_its_checkpoints_are_marked_and_no_run_goes_on_from_one(tmp_path):
    trainer, _ = fit(StudyMode(whole(), NO_NOISE), tmp_path, enable_checkpointing=True)
    path = tmp_path / "study.ckpt"
    trainer.save_checkpoint(path)
    held = torch.load(path, weights_only=False)
    assert "infinite" in held["not_private"]
    for callback in (whole(), StudyMode(whole(), NO_NOISE)):
        with pytest.raises(PrivacyError):
            fit(callback, tmp_path, max_steps=2, ckpt_path=path)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_an_ordinary_checkpoint_does_not_become_a_study(tmp_path):
    trainer, _ = fit(whole(), tmp_path, enable_checkpointing=True)
    path = tmp_path / "private.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(ConfigurationError, match="starts from its beginning"):
        fit(StudyMode(whole(), NO_NOISE), tmp_path, max_steps=2, ckpt_path=path)


def test_a_callback_that_has_trained_is_no_study(tmp_path):
    private = whole()
    fit(private, tmp_path)
    with pytest.raises(ConfigurationError, match="has made 1 private steps"):
        StudyMode(private, NO_NOISE)


def test_a_ledger_has_no_room_for_a_study(tmp_path):
    ledger = PrivacyLedger(tmp_path / "spent.sqlite", dataset="rows", budget=(8.0, 1e-3))
    with pytest.raises(BudgetExceededError):
        fit(StudyMode(whole(ledger=ledger), NO_NOISE), tmp_path)
    assert ledger.epsilon() == 0.0


def test_the_command_plan_prints_no_epsilon_for_a_study(capsys):
    words = ["--config", "recipes/quickstart.yaml", "--study.without=[noise]"]
    assert main(["plan", *words, "--study.not_private=true"]) == 2
    assert "recipe with the group `study`" in capsys.readouterr().err
