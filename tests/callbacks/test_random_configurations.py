"""Whatever is configured trains privately, or is refused by an error of ours before it starts."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_privacy import DifferentialPrivacy, PrivacyError, PrivacyPlan
from lightning_privacy.callbacks._planning import make_plan, sampling_of
from lightning_privacy.callbacks._population import population_of
from lightning_privacy.callbacks._state import RunState
from lightning_privacy.callbacks._validation import refuse_module
from tests.callbacks.configurations import Configuration, Small, configurations, loader_of
from tests.callbacks.training import LIGHTNING_NOISE

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE],
    # A random configuration may well deserve the advice of torch or Lightning.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


# ---------------------------------------------------------------------- planned, without a trainer
def planned(case: Configuration) -> PrivacyPlan | None:
    """The plan, or None where it is refused; no other error is allowed."""
    options = {"max_epochs": None, "max_steps": -1, "limit_train_batches": 1.0, **case.trainer}
    module: Any = SimpleNamespace(automatic_optimization=not case.module["manual"], parameters=list)
    trainer = SimpleNamespace(
        global_step=0,
        lightning_module=module,
        optimizers=[object()],
        world_size=1,
        datamodule=None,
        **{"min_steps": None, "min_epochs": None, **options},
    )
    try:
        callback = DifferentialPrivacy(**case.privacy)
        state, loader = RunState(), loader_of(case)
        refuse_module(nn.Linear(2, 1), ())
        population = population_of(callback.settings, state, loader.dataset, trainer)
        sampling = sampling_of(callback.settings, loader, 1, population)
        plan = make_plan(callback.settings, state, trainer, sampling)
        drawn = population.sampler(plan, bytes(32))
        _ = [len(drawn.draw(cursor)) for cursor in range(2)]
    except PrivacyError as error:
        check_error(error)
        return None
    assert state.plan is plan
    return plan


def check_error(error: PrivacyError) -> None:
    assert all((error.must, error.found, error.cost, error.remedy))


def check_plan(case: Configuration) -> None:
    plan = planned(case)
    if plan is None:
        return
    assert 0 < plan.sample_rate <= 1
    assert plan.steps >= 1
    assert plan.delta == case.privacy["delta"]
    assert plan.clip_norm == case.privacy["clip_norm"]
    assert plan.deterministic == ("test_seed" in case.privacy)
    assert plan.noise_std > 0 or plan.deterministic
    assert plan.effective_noise_multiplier <= plan.noise_multiplier
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    target = case.privacy.get("epsilon")
    if target is not None and not plan.deterministic:
        assert 0 <= plan.epsilon() <= target


@settings(QUIET, max_examples=1000)
@given(configurations())
def test_a_thousand_configurations_are_planned_or_refused(case: Configuration) -> None:
    check_plan(case)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(QUIET, max_examples=10_000)
@given(configurations(calibrated=True))
def test_ten_thousand_configurations_with_budgets(case: Configuration) -> None:
    check_plan(case)


# ---------------------------------------------------------------------- really fitted
def check_fit(case: Configuration) -> bool:
    """Train, or be refused before the first step.

    Returns:
        Whether it trained.
    """
    torch.manual_seed(0)
    module = Small(**case.module, reduction=case.privacy["loss_reduction"])
    before = [p.detach().clone() for p in module.parameters()]
    with tempfile.TemporaryDirectory() as directory:
        fit = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
            **case.trainer,
        )
        try:
            callback = DifferentialPrivacy(**case.privacy)
            fit.callbacks.append(callback)
            fit.fit(module, loader_of(case))
        except PrivacyError as error:
            check_error(error)
            assert fit.global_step == 0, "refused after a step"
            for parameter, value in zip(module.parameters(), before, strict=True):
                assert type(parameter) is nn.Parameter
                assert torch.equal(parameter.float(), value)
            return False
        except MisconfigurationException:
            # Lightning refuses these two before any callback is asked.
            own = {"gradient_clip_val", "accumulate_grad_batches"} & case.trainer.keys()
            if not (case.module["manual"] and own):
                raise
            return False
        finally:
            torch.set_anomaly_enabled(False)
        left = list(Path(directory).iterdir())
    assert not left
    assert callback.steps == fit.global_step >= 1
    plan = callback.plan
    assert plan is not None
    assert callback.steps <= plan.steps
    spent = callback.epsilon()
    assert math.isinf(spent) == plan.deterministic
    # Of much noise and few draws δ alone is enough.
    assert spent >= 0
    if "epsilon" in case.privacy and not plan.deterministic:
        assert spent <= case.privacy["epsilon"]
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    return True


def fits(count: int, *, calibrated: bool) -> dict[bool, int]:
    seen = {True: 0, False: 0}

    @settings(QUIET, max_examples=count)
    @given(configurations(calibrated=calibrated))
    def run(case: Configuration) -> None:
        seen[check_fit(case)] += 1

    run()
    return seen


def test_two_hundred_configurations_train_or_are_refused_before_the_first_step() -> None:
    seen = fits(200, calibrated=False)
    # Enough of either kind to mean something.
    assert min(seen.values()) >= 40, seen


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_configurations_train_or_are_refused_before_the_first_step() -> None:
    seen = fits(2000, calibrated=True)
    assert min(seen.values()) >= 400, seen
