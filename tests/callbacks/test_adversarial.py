"""Ways around the guarantee that ordinary user code can take, each refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


class StepsTwice(Regression):
    """Steps on one draw more than once: one release each, on the same units."""

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        super().optimizer_step(*arguments, **named)


def test_a_second_step_on_a_released_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperationError, match="each draw is followed by one"):
        trainer(tmp_path, privacy()).fit(StepsTwice(), loader())


class RemembersBetweenSteps(Regression):
    """Writes raw data into a buffer outside ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        first = next(t for t in _tensors(batch))
        self.seen += first.float().mean()


def test_a_buffer_written_between_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuaranteeError, match="seen"):
        trainer(tmp_path, privacy()).fit(RemembersBetweenSteps(), loader())


class AddsRawGradients(Regression):
    """Adds an unclipped gradient after the release."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        loss = sum((p * p).sum() for p in parameters)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad += gradient


def test_a_gradient_computed_after_the_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuaranteeError, match="raw gradient"):
        trainer(tmp_path, privacy()).fit(AddsRawGradients(), loader())


def _tensors(batch: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_flatten

    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]


def test_parameters_carry_no_hook_after_the_fit(tmp_path: Path) -> None:
    module = Regression()
    trainer(tmp_path, privacy()).fit(module, loader())
    assert all(type(p) is nn.Parameter and not p._backward_hooks for p in module.parameters())
