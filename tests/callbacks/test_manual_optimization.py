"""Manual optimization and several optimizers: a whole draw at once, each step a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_privacy import GuaranteeError, UnsupportedOperationError
from lightning_privacy.accounting import GaussianRelease, epsilon
from tests.callbacks.training import (
    BATCH,
    LIGHTNING_NOISE,
    Regression,
    loader,
    privacy,
    reference,
    same,
    sampler,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(len(batch[0]))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class WithClosure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Two(Manual):
    """Two optimizers, each with a loss of its own on the same batch."""

    toggles = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)


class Toggled(Two):
    toggles = True


class Shared(Two):
    """Two optimizers that step on one backward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("module_class", [Manual, WithClosure])
def test_equals_automatic_optimization(tmp_path: Path, module_class: type[Regression]) -> None:
    automatic, manual = Regression(), module_class()
    trainer(tmp_path, privacy(expected_batch_size=BATCH)).fit(automatic, loader(batch_size=40))
    callback = privacy(expected_batch_size=BATCH)
    fit = trainer(tmp_path, callback)
    fit.fit(manual, loader(batch_size=1))
    assert same(weights(automatic), weights(manual))
    assert callback.steps == fit.global_step == 10
    if module_class is Manual:
        draws = [max(1, len(sampler().draw(cursor))) for cursor in range(10)]
        assert manual.calls[-10:] == draws


def test_one_backward_for_two_optimizers_is_one_sum(tmp_path: Path) -> None:
    module = Shared()
    callback = privacy(noise_multiplier=0.0)
    trainer(tmp_path, callback).fit(module, loader())
    expected = reference(10)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    callback.summary()
    assert callback._tally.units == sum(len(sampler().draw(cursor)) for cursor in range(10))


@pytest.mark.parametrize("module_class", [Two, Toggled, Shared])
def test_two_releases_on_a_draw_are_accounted_as_one_of_less_noise(
    tmp_path: Path, module_class: type[Two]
) -> None:
    callback = privacy(test_seed=None, noise_multiplier=1.0)
    fit = trainer(tmp_path, callback)
    fit.fit(module_class(), loader())
    assert fit.global_step == 20
    assert callback.steps == 10
    assert callback.plan is not None
    assert callback.plan.releases_per_draw == 2
    sigma = 1.0 / (1 + callback.plan.precision_slack) / 2**0.5
    spent = [GaussianRelease(noise_multiplier=sigma, sample_rate=0.1, count=10)]
    assert callback.epsilon() == pytest.approx(epsilon(spent, 1e-5))


def test_the_two_releases_have_different_noise(tmp_path: Path) -> None:
    class Tied(Two):
        """Both optimizers hold the same parameters."""

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(2)]

    class Seen(pl.Callback):
        def __init__(self) -> None:
            self.gradients: list[Tensor] = []

        def on_before_optimizer_step(self, _t: Any, module: Any, _o: Any) -> None:
            self.gradients.append(module.net[0].weight.grad.clone())

    seen = Seen()
    trainer(tmp_path, privacy(), seen, max_steps=4, max_epochs=None).fit(Tied(), loader())
    assert len(seen.gradients) == 4
    for i, gradient in enumerate(seen.gradients):
        assert all(not torch.equal(gradient, other) for other in seen.gradients[:i])


def test_the_first_loss_leaves_nothing_in_the_second_release(tmp_path: Path) -> None:
    class Norms(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second = self.optimizers()
            self.manual_backward(100 * self.loss(batch))
            first.step()
            self.manual_backward(100 * self.loss(batch))
            second.step()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = [p.detach().clone() for p in self.net[2].parameters()]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            after = self.net[2].parameters()
            moved = [(p.detach() - b).flatten() for p, b in zip(after, self.before, strict=True)]
            moves.append(float(torch.cat(moved).norm()) / len(batch[0]))

    moves: list[float] = []
    callback = privacy(noise_multiplier=0.0, independence_check=False)
    trainer(tmp_path, callback).fit(Norms(), loader())
    # Each example moves the weights by at most lr * clip_norm / expected batch size.
    assert 0 < max(moves) <= 0.1 / BATCH * (1 + 1e-4)


def test_max_steps_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, max_steps=6, max_epochs=None)
    fit.fit(Two(), loader())
    assert fit.global_step == 6
    assert callback.steps == 3
    assert callback.plan is not None
    assert callback.plan.steps == 3


def test_more_releases_than_planned(tmp_path: Path) -> None:
    callback = privacy(releases_per_draw=1)
    fit = trainer(tmp_path, callback)
    with pytest.raises(UnsupportedOperationError, match=r"release 2 on one draw"):
        fit.fit(Two(), loader())
    assert callback.steps == 1


class Accumulating(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Direct(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss(batch).backward()
        self.optimizers().step()


class Early(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.optimizers().step()
        self.manual_backward(loss)


@pytest.mark.parametrize(
    ("module_class", "found"),
    [
        (Accumulating, "a second manual_backward"),
        (Direct, "a backward inside the forward"),
        (Early, "SGD.step without one"),
    ],
)
def test_what_would_break_the_sensitivity(
    tmp_path: Path, module_class: type[Manual], found: str
) -> None:
    module = module_class()
    before = weights(module)
    with pytest.raises(UnsupportedOperationError) as caught:
        trainer(tmp_path, privacy(independence_check=False)).fit(module, loader())
    assert found in caught.value.found
    assert same(weights(module), before)
    assert all(type(p) is nn.Parameter for p in module.parameters())


def test_a_draw_without_a_step_warns(tmp_path: Path) -> None:
    class EverySecond(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))
            if batch_idx % 2:
                self.optimizers().step()

    callback = privacy()
    with pytest.warns(UserWarning, match="never followed by an optimizer step"):
        trainer(tmp_path, callback).fit(EverySecond(), loader())
    assert callback.steps == 5


def test_the_independence_check_reaches_manual_modules(tmp_path: Path) -> None:
    class Contrast(Toggled):
        def loss(self, batch: Any) -> Tensor:
            out = self.net(batch[0])
            return (out - out.mean()).square().mean()

    module = Contrast()
    with pytest.raises(GuaranteeError, match="depends on that example alone"):
        trainer(tmp_path, privacy()).fit(module, loader())
    assert all(p.requires_grad for p in module.parameters())


def test_resume(tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "step=6.ckpt")

    unbroken, resumed = Two(), Two()
    trainer(tmp_path, privacy(), Saving()).fit(unbroken, loader())
    callback = privacy()
    trainer(tmp_path, callback).fit(resumed, loader(), ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert same(weights(unbroken), weights(resumed))
    assert callback.steps == 10


def test_fewer_releases_than_declared_do_not_go_beyond_the_plan(tmp_path: Path) -> None:
    callback = privacy(releases_per_draw=2)
    trainer(tmp_path, callback, max_steps=6).fit(Manual(), loader())
    assert callback.plan is not None
    assert callback.steps == callback.plan.steps == 3
