"""The report of a fit: written at its end, or when it fails, and holding no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_privacy import ConfigurationError, PrivacyLedger
from lightning_privacy.callbacks import PrivacyReport
from lightning_privacy.reports import Finding
from lightning_privacy.reports.files import file_hash
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]


class Attack(pl.Callback):
    def findings(self) -> list[Finding]:
        return [Finding(name="an attack", figures={"AUROC": 0.7})]


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("row 17 of the data")


def fitted(directory: Path, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    own = privacy(**{"test_seed": None, "noise_multiplier": 1.0, **settings})
    report = PrivacyReport(directory=str(directory / "report"))
    made = trainer(directory, report, own, *callbacks, max_steps=6, log_every_n_steps=2,
                   val_check_interval=3)  # fmt: skip
    made.fit(Regression(), loader(), loader())
    assert report.page is not None
    return json.loads((directory / "report" / "privacy_report.json").read_text())


def test_a_fit_writes_the_report(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", save_last=True)
    ledger = PrivacyLedger(tmp_path / "l.sqlite", dataset="rows", budget=(50.0, 1e-5))
    record = fitted(tmp_path, saving, Attack(), ledger=ledger)
    assert record["outcome"] == "completed"
    assert record["guarantee"]["steps"] == record["guarantee"]["planned_steps"] == 6
    assert record["ledger"]["releases"][0]["count"] == 6
    assert record["ledger"]["data_set"]["dataset"] == "rows"
    assert record["leakage"] == [{"name": "an attack", "figures": {"AUROC": 0.7}, "note": ""}]
    series = record["uncovered"]["series"]
    assert len(series["loss"]) == len(series["clipped_share"]) == 6
    assert [step for step, _ in series["noise_to_signal"]] == [2, 4, 6]
    assert file_hash(tmp_path / "saved" / "last.ckpt") in record["checkpoint"].values()
    assert record["software"]["torch"]


def test_a_run_that_fails_is_reported_without_its_message(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="row 17"):
        fitted(tmp_path, Fails())
    text = (tmp_path / "report" / "privacy_report.json").read_text()
    record = json.loads(text)
    assert record["guarantee"]["steps"] == 3
    assert "RuntimeError" in record["outcome"]
    assert "row 17" not in text


def test_no_seed_is_written(tmp_path: Path) -> None:
    fitted(tmp_path, test_seed=9182736455)
    for file in (tmp_path / "report").iterdir():
        assert "9182736455" not in file.read_text()


def test_choices_by_private_figures_are_named(tmp_path: Path) -> None:
    stopping = pl.callbacks.EarlyStopping("val_loss")
    saving = pl.callbacks.ModelCheckpoint(
        tmp_path / "saved", filename="{val_loss:.3f}", monitor="val_loss"
    )
    record = fitted(tmp_path, stopping, saving)
    choices = [why for what, why in record["not_covered"] if what == "Choices"]
    assert len(choices) == 2
    assert all("'val_loss'" in why for why in choices)
    # The file's name is a figure of private data.
    assert "best checkpoint, SHA-256" in record["checkpoint"]


def test_a_report_needs_the_callback(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="PrivacyReport goes with"):
        trainer(tmp_path, PrivacyReport()).fit(Regression(), loader())
