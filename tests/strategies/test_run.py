"""One draw through the private step, and what a run refuses by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy import GuaranteeError
from lightning_privacy.noise import GaussianNoise, fresh_secret
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.sampling import MicroBatch
from lightning_privacy.step import PrivateStep
from lightning_privacy.strategies import PrivateRun
from lightning_privacy.strategies.draw import RowMean, loss_in
from lightning_privacy.strategies.refusals import refuse_strangers
from lightning_privacy.types import NeighbouringRelation


def run_of(module: Any, *, automatic: bool = True) -> PrivateRun:
    module.automatic_optimization = automatic
    module.trainer = SimpleNamespace(
        accumulate_grad_batches=1, _results=None, train_dataloader=None
    )
    strategy: Any = SimpleNamespace(lightning_module=module, root_device=torch.device("cpu"))

    def unused(*_: Any) -> Any:
        raise AssertionError

    return PrivateRun(
        strategy, prepare_loader=unused, start=unused, charge=unused, record=unused, drawn=unused
    )


def test_nothing_trains_before_the_checks_have_run() -> None:
    run = run_of(nn.Linear(1, 1).requires_grad_(False))
    with pytest.raises(GuaranteeError, match="before the checks had run"):
        run.training_step(lambda *_: None, None)
    with pytest.raises(GuaranteeError, match="before the checks had run"):
        run.backward(lambda *_: None, torch.zeros(()))


def test_a_run_without_a_step_can_be_aborted_and_closed() -> None:
    run = run_of(nn.Linear(1, 1))
    run.abort()
    run.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_user_code_untags_the_parameters_at_once(error: type[BaseException]) -> None:
    module = nn.Linear(1, 1)
    run = run_of(module)
    plan = PrivacyPlan(
        relation=NeighbouringRelation.ZERO_OUT,
        sample_rate=0.1,
        expected_batch_size=4,
        noise_multiplier=1.0,
        clip_norm=1.0,
        steps=1,
        delta=1e-5,
    )
    parameters = dict(module.named_parameters())
    run.step = PrivateStep(parameters=parameters, plan=plan, noise=GaussianNoise(fresh_secret()))
    run.loader = SimpleNamespace(  # type: ignore[assignment]
        cursor_of_current=0, current=(MicroBatch(indices=(0,), weights=(1.0,)),)
    )
    run._covered = frozenset(map(id, parameters.values()))

    def fails(*_: Any) -> None:
        assert type(module.weight) is not nn.Parameter
        raise error

    with pytest.raises(error):
        run.training_step(fails, None)
    assert type(module.weight) is nn.Parameter


def test_manual_optimization_refuses_a_part_of_a_draw() -> None:
    run = run_of(nn.Linear(1, 1), automatic=False)
    parts = tuple(MicroBatch(indices=(i,), weights=(1.0,)) for i in range(3))
    run.loader = SimpleNamespace(current=parts, cursor_of_current=0)  # type: ignore[assignment]
    run.step = SimpleNamespace(pending=False, discard=lambda: None, abort=lambda: None)  # type: ignore[assignment]
    run._covered = frozenset(map(id, run.module.parameters()))
    with pytest.raises(GuaranteeError, match="a draw of 3 micro-batches"):
        run.training_step(lambda *_: None, None)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_row_mean_changes_the_value_and_not_the_graph(wrapped: bool) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    mean = RowMean()
    mean.add(torch.tensor(1.0), 3)
    mean.add(None, 2)
    mean.add(torch.tensor(float("nan")), 0)
    last = weight * 5
    mean.add(last, 1)
    output = mean.shown_by({"loss": last, "more": 7} if wrapped else last)
    shown: Tensor = loss_in(output)
    assert float(shown.detach()) == pytest.approx((3 * 1 + 10) / 4)
    shown.backward()
    assert float(weight.grad) == 5  # type: ignore[arg-type]
    assert not wrapped or output["more"] == 7


def test_an_empty_draw_shows_its_loss_as_it_is() -> None:
    mean = RowMean()
    loss = torch.tensor(3.0)
    mean.add(loss, 0)
    assert mean.shown_by(loss) is loss


def test_a_buffer_that_requires_a_gradient_is_no_stranger() -> None:
    module = torch.nn.Linear(2, 1)
    module.register_buffer("scale", torch.ones(1, requires_grad=True))
    held = [*module.parameters(), *module.buffers()]
    refuse_strangers(module, held, frozenset(map(id, module.parameters())))
    with pytest.raises(GuaranteeError, match=r"became trainable .*: bias\n"):
        refuse_strangers(module, held, frozenset({id(module.weight)}))
