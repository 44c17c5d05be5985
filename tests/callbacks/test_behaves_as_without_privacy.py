"""A private fit drives trainer, module and other callbacks as an ordinary fit does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_privacy import PrivacyError
from lightning_privacy.sampling import micro_batches
from lightning_privacy.strategies import PrivateSingleDeviceStrategy
from tests.callbacks.training import (
    BATCH,
    LIGHTNING_NOISE,
    ROWS,
    Regression,
    data,
    loader,
    privacy,
    reference,
    same,
    sampler,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
STEPS = ROWS // BATCH


@pytest.mark.parametrize("physical", [1, 2, 3, 64])
def test_equals_one_example_at_a_time(tmp_path: Path, physical: int) -> None:
    module = Regression()
    callback = privacy(noise_multiplier=0.0, expected_batch_size=BATCH)
    trainer(tmp_path, callback).fit(module, loader(batch_size=physical))
    expected = reference(STEPS)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    draws = [len(sampler().draw(cursor)) for cursor in range(STEPS)]
    rows = module.calls[-sum(max(1, -(-size // physical)) for size in draws) :]
    assert sum(rows) == sum(draws) + draws.count(0)


def test_the_physical_batch_does_not_change_a_noised_run(tmp_path: Path) -> None:
    results = []
    for physical, workers in ((1, 0), (3, 0), (64, 0)):
        module = Regression()
        fit = trainer(tmp_path, privacy(expected_batch_size=BATCH))
        fit.fit(module, loader(batch_size=physical, num_workers=workers, shuffle=True))
        results.append(weights(module))
    for name in results[0]:
        for other in results[1:]:
            torch.testing.assert_close(results[0][name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    results = []
    for workers in (0, 2):
        module = Regression()
        trainer(tmp_path, privacy()).fit(module, loader(num_workers=workers))
        results.append(weights(module))
    assert same(*results)


def test_counts_are_those_of_logical_batches(tmp_path: Path) -> None:
    class Counting(pl.Callback):
        starts = ends = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.starts += 1

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends += 1

    counting, callback = Counting(), privacy(expected_batch_size=BATCH)
    fit = trainer(tmp_path, callback, counting, max_epochs=3)
    fit.fit(Regression(), loader(batch_size=1))
    assert fit.num_training_batches == STEPS
    assert fit.global_step == counting.starts == counting.ends == callback.steps == 3 * STEPS


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 13, "max_epochs": None}, 13),
        ({"limit_train_batches": 4, "max_epochs": 3}, 12),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, 10),
        ({"fast_dev_run": True}, 1),
        ({"max_epochs": 2, "max_steps": 15}, 15),
        ({"max_epochs": 0}, 0),
        ({"limit_train_batches": 0}, 0),
    ],
)
def test_limits(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    callback = privacy()
    fit = trainer(tmp_path, callback, **options)
    fit.fit(Regression(), loader())
    assert fit.global_step == callback.steps == steps
    if steps:
        assert callback.plan is not None
        assert callback.plan.steps == steps


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_without_logging(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = privacy()
    if "barebones" in options:
        options = {
            **options,
            "enable_progress_bar": None,
            "num_sanity_val_steps": None,
            "logger": None,
            "enable_model_summary": None,
            "enable_checkpointing": None,
        }
    trainer(tmp_path, callback, **options).fit(Regression(), loader())
    assert callback.steps == callback.summary().steps == STEPS
    assert callback.summary().clipped_share is not None


def test_validation_interval(tmp_path: Path) -> None:
    class Validations(pl.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.at.append(trainer.global_step)

    seen = Validations()
    fit = trainer(tmp_path, privacy(), seen, max_epochs=2, val_check_interval=0.5)
    fit.fit(Regression(), loader(), loader())
    assert seen.at == [5, 10, 15, 20]


def test_early_stopping(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=1, min_delta=1e6)
    callback = privacy(test_seed=None)
    fit = trainer(tmp_path, callback, stopping, max_epochs=9)
    fit.fit(Regression(), loader(), loader())
    assert fit.global_step == callback.steps == 2 * STEPS
    summary = callback.summary()
    assert summary.planned_steps == 9 * STEPS
    assert summary.epsilon > summary.epsilon_at_stop > 0


class Scheduled(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=int(self.total)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_one_cycle_with_estimated_steps(tmp_path: Path) -> None:
    module = Scheduled()
    fit = trainer(tmp_path, privacy(expected_batch_size=BATCH), max_epochs=2)
    fit.fit(module, loader(batch_size=1))
    assert module.total == fit.global_step == 2 * STEPS
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 2 * STEPS


class Batches(Regression):
    def loss(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
        return F.mse_loss(self.net(x), y)

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch), "more": 1}


@dataclass
class Pair:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [dict, Pair])
def test_batches_of_any_shape(tmp_path: Path, kind: type) -> None:
    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        return kind(x=torch.stack([x for x, _ in rows]), y=torch.stack([y for _, y in rows]))

    module, ordinary = Batches(), Regression()
    settings = {"expected_batch_size": BATCH}
    trainer(tmp_path, privacy(**settings)).fit(
        module, DataLoader(data(), batch_size=2, collate_fn=collate)
    )
    trainer(tmp_path, privacy(**settings)).fit(ordinary, loader(batch_size=2))
    assert same(weights(module), weights(ordinary))


class Logging(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.seen: list[tuple[float, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_epoch=True)
        self.seen.append((float(loss.detach()), len(batch[0])))
        return loss


def test_epoch_means_weigh_micro_batches_by_their_real_rows(tmp_path: Path) -> None:
    module = Logging()
    callback = privacy(expected_batch_size=BATCH)
    fit = trainer(tmp_path, callback, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(module, loader(batch_size=3))
    draws = [sampler().draw(cursor) for cursor in range(STEPS)]
    parts = [part.drawn for draw in draws for part in micro_batches(draw, 3)]
    seen = module.seen[-len(parts) :]
    total = sum(loss * rows for (loss, _), rows in zip(seen, parts, strict=True))
    assert float(fit.callback_metrics["loss_epoch"]) == pytest.approx(total / sum(parts), rel=1e-5)
    assert "privacy/epsilon" in fit.callback_metrics
    assert "privacy/clipped_share" in fit.callback_metrics


def test_the_shown_loss_is_the_mean_over_the_draw(tmp_path: Path) -> None:
    class Outputs(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, _t: Any, _m: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    small, large = Outputs(), Outputs()
    for physical, seen in ((1, small), (64, large)):
        callback = privacy(expected_batch_size=BATCH, noise_multiplier=0.0)
        trainer(tmp_path, callback, seen).fit(Regression(), loader(batch_size=physical))
    draws = [len(sampler().draw(cursor)) for cursor in range(STEPS)]
    assert 0 not in draws
    assert small.losses == pytest.approx(large.losses, rel=1e-4)


class Hooks(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.gradients_seen: list[bool] = []
        self.released: list[bool] = []
        self.transfers = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers += 1
        return batch

    def on_after_backward(self) -> None:
        self.gradients_seen.append(any(p.grad is not None for p in self.parameters()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.released.append(all(p.grad is not None for p in self.parameters()))


def test_no_hook_sees_a_gradient_before_it_is_released(tmp_path: Path) -> None:
    module = Hooks()
    callback = privacy(expected_batch_size=BATCH, independence_check=False)
    trainer(tmp_path, callback).fit(module, loader(batch_size=1))
    assert module.gradients_seen
    assert not any(module.gradients_seen)
    assert module.released == [True] * STEPS
    assert module.transfers >= len(module.gradients_seen)


def test_everything_is_as_before_after_a_fit(tmp_path: Path) -> None:
    module = Regression()
    before = {name: type(p) for name, p in module.named_parameters()}
    keys = list(module.state_dict())
    callback = privacy()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints")
    fit = trainer(tmp_path, callback, checkpoint)
    fit.fit(module, loader(), loader())
    assert {name: type(p) for name, p in module.named_parameters()} == before
    assert list(module.state_dict()) == keys
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert list(saved["state_dict"]) == keys
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
    assert "log" not in vars(module)
    assert isinstance(fit.strategy, pl.strategies.SingleDeviceStrategy)
    assert type(fit.strategy) is PrivateSingleDeviceStrategy
    loss = module.loss(data()[:4])
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_validate_test_and_predict_after_fit(tmp_path: Path) -> None:
    class Whole(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])

    module, callback = Whole(), privacy()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit = trainer(tmp_path, callback, checkpoint)
    fit.fit(module, loader())
    steps = callback.steps
    assert len(fit.validate(module, loader(), verbose=False)) == 1
    assert len(fit.test(module, loader(), verbose=False, ckpt_path="best")) == 1
    assert len(fit.predict(module, loader())) == STEPS
    assert callback.steps == steps


def test_fit_twice_adds_up(tmp_path: Path) -> None:
    module, callback = Regression(), privacy(test_seed=None)
    fit = trainer(tmp_path, callback)
    fit.fit(module, loader())
    first = callback.epsilon()
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader())
    assert callback.steps == 2 * STEPS
    assert callback.epsilon() > first > 0
    again = trainer(tmp_path, callback)
    again.fit(module, loader())
    assert callback.steps == 3 * STEPS
    assert callback.plan is not None
    assert callback.plan.steps == 3 * STEPS


def test_reloaded_dataloaders(tmp_path: Path) -> None:
    class Reloading(Regression):
        made = 0

        def train_dataloader(self) -> DataLoader:
            self.made += 1
            return loader()

    module, once = Reloading(), Regression()
    fit = trainer(tmp_path, privacy(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    fit.fit(module)
    trainer(tmp_path, privacy(), max_epochs=3).fit(once, loader())
    assert module.made == 3
    assert same(weights(module), weights(once))


def test_a_skipped_epoch_hands_no_draw_out_again(tmp_path: Path) -> None:
    class Skipping(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 and self.current_epoch == 0 else None

    class Cursors(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append(trainer.train_dataloader.cursor_of_current)

    cursors = Cursors()
    trainer(tmp_path, privacy(), cursors, max_epochs=2).fit(Skipping(), loader())
    assert cursors.seen == list(range(5 + STEPS))


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_train_eagerly(tmp_path: Path, whole: bool) -> None:
    expected = Regression()
    # The names of a compiled part's parameters differ, and with them their noise.
    trainer(tmp_path, privacy(noise_multiplier=0.0)).fit(expected, loader())
    module: Any = torch.compile(Regression(), backend="eager") if whole else Compiled()
    with pytest.warns(UserWarning, match=r"torch\.compile is not used in private"):
        trainer(tmp_path, privacy(noise_multiplier=0.0)).fit(module, loader())
    plain = module._orig_mod if whole else module
    for value, other in zip(plain.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other)


def test_frozen_parts_stay(tmp_path: Path) -> None:
    module = Regression()
    module.net[0].requires_grad_(False)
    before = weights(module)
    trainer(tmp_path, privacy()).fit(module, loader())
    after = weights(module)
    assert torch.equal(before["net.0.weight"], after["net.0.weight"])
    assert not torch.equal(before["net.2.weight"], after["net.2.weight"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path: Path, precision: Any) -> None:
    callback = privacy()
    trainer(tmp_path, callback, precision=precision).fit(Regression(), loader())
    assert callback.plan is not None
    assert callback.plan.precision_slack == (1e-9 if precision == "64-true" else 2e-2)
    assert callback.steps == STEPS


def test_one_row_is_enough(tmp_path: Path) -> None:
    callback = privacy(sample_rate=0.5, expected_batch_size=1)
    trainer(tmp_path, callback, max_epochs=4).fit(Regression(), loader(rows=1))
    assert callback.steps == 8


def test_batch_norm_is_refused_even_when_the_check_is_off(tmp_path: Path) -> None:
    class Normed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    for check in (True, False):
        callback = privacy(independence_check=check)
        with pytest.raises(PrivacyError):
            trainer(tmp_path, callback).fit(Normed(), loader())
