"""What ε is promised, shown and never exceeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_privacy import BudgetExceededError, GuaranteeError
from lightning_privacy.callbacks._planning import EpsilonSoFar
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
