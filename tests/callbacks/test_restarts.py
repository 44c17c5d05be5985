"""A job that a launcher has started again says so where it forgets what was spent."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.callbacks.test_failures import NOISE, real
from tests.callbacks.test_resume import saving
from tests.callbacks.training import Regression, loader, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in NOISE]
COUNTS = ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"]


@pytest.mark.parametrize("name", COUNTS)
def test_a_fresh_start_of_a_restarted_job_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.warns(UserWarning, match=f"started again \\({name}=1\\).* run of its own"):
        trainer(tmp_path, real(), max_steps=2).fit(Regression(), loader())


@pytest.mark.parametrize("count", ["", "0", None])
def test_a_first_start_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str | None
) -> None:
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
        if count is not None:
            monkeypatch.setenv(name, count)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This job was started again")
        trainer(tmp_path, real(), max_steps=2).fit(Regression(), loader())


def test_a_restart_from_a_checkpoint_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, real(), saving(tmp_path, 4), max_steps=4).fit(Regression(), loader())
    monkeypatch.setenv(COUNTS[0], "1")
    callback = real()
    fit = trainer(tmp_path, callback)
    fit.fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert callback.steps == 10
