"""What ε is promised, shown and never exceeded."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_privacy import BudgetExceededError, GuaranteeError, accounting
from lightning_privacy.callbacks import _epsilon
from lightning_privacy.callbacks._epsilon import EpsilonSoFar
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.types import NeighbouringRelation
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


def plan(**changes: Any) -> PrivacyPlan:
    fields: dict[str, Any] = {
        "relation": NeighbouringRelation.ZERO_OUT,
        "sample_rate": 0.1,
        "expected_batch_size": 4,
        "noise_multiplier": 1.0,
        "clip_norm": 1.0,
        "steps": 40,
        "delta": 1e-5,
    }
    return PrivacyPlan(**{**fields, **changes})


class Shown(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.progress_bar_metrics.get("privacy/epsilon", 0.0)))


def test_an_epsilon_alone_is_calibrated_for_the_planned_steps(tmp_path: Path) -> None:
    callback, shown = privacy(epsilon=3.0, test_seed=None), Shown()
    trainer(tmp_path, callback, shown).fit(Regression(), loader())
    assert callback.steps == 10
    assert 2.97 < callback.epsilon() <= 3.0
    assert callback.plan is not None
    assert callback.plan.noise_multiplier > 0
    assert shown.values[1:] == sorted(shown.values[1:])
    assert shown.values[-1] <= 3.0
    summary = callback.summary()
    assert summary.epsilon == summary.epsilon_at_stop == callback.epsilon()


def test_noise_alone_gives_the_epsilon_of_the_planned_steps(tmp_path: Path) -> None:
    callback = privacy(noise_multiplier=2.0, test_seed=None)
    trainer(tmp_path, callback).fit(Regression(), loader())
    assert callback.plan is not None
    assert callback.epsilon() == pytest.approx(callback.plan.epsilon())


@pytest.mark.parametrize("options", [{"max_epochs": 50}, {"max_epochs": -1}])
def test_both_stop_before_the_budget_is_exceeded(tmp_path: Path, options: Any) -> None:
    callback = privacy(noise_multiplier=1.2, epsilon=3.0, test_seed=None)
    fit = trainer(tmp_path, callback, **options)
    fit.fit(Regression(), loader())
    assert callback.plan is not None
    assert 0 < callback.steps < 500
    assert callback.epsilon() <= 3.0 < callback.plan.epsilon(callback.steps + 1)
    assert fit.global_step == callback.steps == callback.plan.steps
    with pytest.raises(BudgetExceededError, match="at most"):
        trainer(tmp_path, callback).fit(Regression(), loader())


def test_a_spent_budget_refuses_the_next_fit(tmp_path: Path) -> None:
    callback = privacy(epsilon=3.0, test_seed=None)
    fit = trainer(tmp_path, callback)
    fit.fit(Regression(), loader())
    fit.fit_loop.max_epochs = 2
    with pytest.raises(BudgetExceededError):
        fit.fit(Regression(), loader())
    assert callback.steps == 10


def test_another_loader_in_the_next_fit_is_another_mechanism(tmp_path: Path) -> None:
    callback = privacy(test_seed=None)
    trainer(tmp_path, callback).fit(Regression(), loader())
    with pytest.raises(GuaranteeError, match="sample_rate"):
        trainer(tmp_path, callback).fit(Regression(), loader(rows=44))


def test_epsilon_so_far_is_never_too_small_and_never_above_the_plan() -> None:
    whole = plan()
    planned = whole.epsilon()
    so_far = EpsilonSoFar(whole, planned)
    before = 0.0
    for count in (1, 2, 3, 5, 9, 14, 22, 31, 39, 40):
        value = so_far.at(count)
        assert whole.epsilon(count) - 1e-9 <= value <= planned
        assert value >= before
        before = value
    assert value == pytest.approx(planned)
    assert so_far.at(50) >= whole.epsilon(50) > planned


def test_epsilon_so_far_is_computed_before_the_second_step(monkeypatch: Any) -> None:
    whole, asked = plan(steps=400), []
    monkeypatch.setattr(_epsilon, "epsilon", lambda *a: asked.append(a) or accounting.epsilon(*a))
    so_far = EpsilonSoFar(whole, whole.epsilon())
    so_far.at(1)
    assert 1 < len(asked) < 20
    before = len(asked)
    values = [so_far.at(count) for count in range(1, 401)]
    assert len(asked) == before
    assert values == sorted(values)
    for count in (1, 2, 21, 22, 23, 99, 250, 399):
        truth = whole.epsilon(count)
        assert truth - 1e-9 <= values[count - 1] <= 1.01 * whole.epsilon(int(1.1 * count) + 21)
    # A run that is taken up asks for nothing that was not asked for before.
    EpsilonSoFar(whole, whole.epsilon()).at(77)
    assert {spent[0].count for spent, *_ in asked[before:]} <= {
        spent[0].count for spent, *_ in asked[:before]
    }


def test_epsilon_so_far_counts_what_another_plan_has_released() -> None:
    # A checkpoint of another run may be taken up whose noise was calibrated for more steps.
    whole, louder = plan(noise_multiplier=2.0), plan(noise_multiplier=0.7).release(10)
    charged = [louder, whole.release(5)]

    def truth(count: int) -> float:
        return accounting.epsilon([louder, whole.release(count - 10)], whole.delta)

    so_far = EpsilonSoFar(whole, truth(40), charged)
    for count in (15, 16, 20, 39, 40):
        assert truth(count) - 1e-9 <= so_far.at(count) <= truth(40)


class Logging(pl.Callback):
    """A user's own figure, under the hook in which ε is logged, too."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.log("own", 1.0)


def test_each_step_that_is_logged_says_epsilon(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    options = {"max_epochs": 3, "log_every_n_steps": 1, "val_check_interval": 4, "logger": logger}
    # In test mode ε is the same at all steps, so that it would be logged once.
    fit = trainer(tmp_path, privacy(), Logging(), **options)
    fit.fit(Regression(), loader(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["own"]]
    assert len(rows) == 30
    assert all(row["privacy/epsilon"] == "inf" for row in rows)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_so_far_with_other_accountants(accountant: Any) -> None:
    whole = plan(accountant=accountant, steps=10)
    so_far = EpsilonSoFar(whole, whole.epsilon())
    assert 0 < so_far.at(1) <= so_far.at(10) == whole.epsilon()


def test_nothing_to_sum_up_before_a_fit() -> None:
    callback = privacy()
    assert callback.epsilon() == 0.0
    assert callback.plan is None
    with pytest.raises(GuaranteeError, match="has not trained"):
        callback.summary()


def test_the_closing_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    callback = privacy(test_seed=None, print_table=True)
    trainer(tmp_path, callback).fit(Regression(), loader(), loader())
    printed = capsys.readouterr().out
    for words in ("epsilon spent", "noise multiplier", "10 of 10 planned", "not covered by ε"):
        assert words in printed
    assert callback.summary().validation_loss is not None
    share = callback.summary().clipped_share
    assert share is not None
    assert 0 <= share <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_examples_that_are_not_finite_contribute_nothing_and_are_counted(
    tmp_path: Path, bad: float
) -> None:
    rows = loader(batch_size=3)
    rows.dataset.tensors[0][7] = bad
    module, callback = Regression(), privacy(expected_batch_size=20)
    trainer(tmp_path, callback, max_epochs=2).fit(module, rows)
    assert callback.summary().nonfinite_units > 0
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_a_delta_that_promises_nothing_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="delta=0.1 is not below one over the number of units, 40"):
        trainer(tmp_path, privacy(delta=0.1)).fit(Regression(), loader())


def test_a_budget_for_no_step_at_all_says_what_to_change(tmp_path: Path) -> None:
    small = privacy(epsilon=0.1, noise_multiplier=0.3, test_seed=None)
    with pytest.raises(BudgetExceededError, match="raise noise_multiplier or epsilon"):
        trainer(tmp_path, small).fit(Regression(), loader())


@pytest.mark.filterwarnings("ignore:The budget allows")
def test_the_budget_counts_what_another_run_of_the_callback_has_released(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epsilon": 3.0, "test_seed": None, "journal": False}
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer(tmp_path, privacy(**settings), saving, max_epochs=20).fit(Regression(), loader())
    callback = privacy(**settings)
    trainer(tmp_path, callback).fit(Regression(), loader())
    second = trainer(tmp_path, callback, max_epochs=20)
    with pytest.raises(BudgetExceededError, match="with another noise that it has charged"):
        second.fit(Regression(), loader(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert callback._state.ledger.count == 17  # nothing more was released
