"""The checks before the first step call user code, and leave no trace of it."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchmetrics import MeanSquaredError

from lightning_privacy.callbacks._probe import LossProbe, _quiet
from lightning_privacy.distributed import World
from lightning_privacy.errors import ConfigurationError
from tests.callbacks.training import (
    LIGHTNING_NOISE,
    ROWS,
    Regression,
    data,
    loader,
    privacy,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


class Measured(Regression):
    """Logs, keeps a metric, and draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.drop = nn.Dropout(0.3)
        self.draws: list[float] = []
        self.logged: list[str] = []
        self.updates: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(self.drop(x))
        self.error.update(out.detach(), y)
        loss = (out - y).square().mean()
        self.log_dict({"loss": loss}, on_step=True, on_epoch=True)
        self.calls.append(len(x))
        self.updates.append(self.error.update_count)
        return loss

    def on_train_start(self) -> None:
        self.state = torch.get_rng_state()


def test_metrics_logs_and_random_state_are_those_of_a_fit_without_checks(tmp_path: Path) -> None:
    modules = []
    for check in (True, False):
        torch.manual_seed(1)
        module = Measured()
        callback = privacy(independence_check=check)
        fit = trainer(tmp_path, callback)
        fit.fit(module, loader())
        assert "loss_epoch" in fit.callback_metrics
        modules.append(module)
    assert same(*(weights(module) for module in modules))
    counts = [module.updates[-10:] for module in modules]
    assert counts[0] == counts[1] == sorted(set(counts[0]))


def test_a_metric_in_use_gets_its_state_back() -> None:
    module = Measured()
    module.error.update(torch.ones(2), torch.zeros(2))
    with _quiet(module):
        module.log("anything", 1.0)
        module.net.requires_grad_(False)
        module.error.update(torch.full((5,), 9.0), torch.zeros(5))
    assert float(module.error.sum_squared_error) == 2
    assert "log" not in vars(module)
    assert all(p.requires_grad for p in module.parameters())


class Augmented(Dataset):
    """A random augmentation from a generator that no check can hold still."""

    def __init__(self) -> None:
        self.rows, self.random = data(), random.Random(3)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index]
        return x + self.random.random(), y


def test_random_augmentation_passes_the_check(tmp_path: Path) -> None:
    callback = privacy()
    trainer(tmp_path, callback).fit(Regression(), DataLoader(Augmented(), batch_size=4))
    assert callback.steps == 10


@pytest.mark.parametrize(("batch_size", "count"), [(1, 2), (3, 3), (16, 8)])
def test_the_rows_of_the_check_fit_into_memory(batch_size: int, count: int) -> None:
    run = SimpleNamespace(world=World())
    rows = LossProbe(None, loader(batch_size=batch_size), run).rows()  # type: ignore[arg-type]
    assert len(rows) == len(set(rows)) == count
    assert all(0 <= row < ROWS for row in rows)


@pytest.mark.parametrize("lockstep", [True, False])
def test_ranks_whose_passes_communicate_compare_the_same_rows(lockstep: bool) -> None:
    # What is found in these rows decides how many passes follow.
    world = SimpleNamespace(lockstep=lockstep, from_first=lambda rows: ["rank 0's", len(rows)])
    draws = SimpleNamespace(
        dataset=data(), batch_size=4, collate_fn=default_collate,
        current=[SimpleNamespace(indices=range(3))],
    )  # fmt: skip
    probe = LossProbe(None, draws, SimpleNamespace(world=world))  # type: ignore[arg-type]
    for rows, count in ((probe.rows(2), 2), (probe.company(), 4)):
        assert (rows == ["rank 0's", count]) is lockstep
        assert len(rows) == (2 if lockstep else count)


def test_without_the_check_one_by_one_training_calls_nothing_before(tmp_path: Path) -> None:
    module = Regression()
    callback = privacy(independence_check=False)
    trainer(tmp_path, callback, max_steps=1).fit(module, loader(batch_size=1))
    assert set(module.calls) == {1}


def test_an_own_log_method_survives(tmp_path: Path) -> None:
    module = Measured()
    own = lambda *_a, **_n: None  # noqa: E731
    module.log = own  # type: ignore[method-assign]
    trainer(tmp_path, privacy()).fit(module, loader())
    assert module.log is own


@pytest.mark.parametrize(
    "make", [lambda: WeightAveraging(), lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)]
)
def test_weight_averaging(tmp_path: Path, make: Any) -> None:
    callback = privacy()
    trainer(tmp_path, callback, make(), max_epochs=3).fit(Regression(), loader())
    assert callback.steps == 30


def test_step_hooks_prepare_what_the_training_step_needs(tmp_path: Path) -> None:
    class Prepared(Regression):
        def on_train_epoch_start(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.factor = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.factor * self.loss(batch)
            self.losses.append(float(loss.detach()))
            return loss

    callback = privacy()
    trainer(tmp_path, callback).fit(Prepared(), loader())
    assert callback.steps == 10


def test_the_validation_sanity_check_is_left_alone(tmp_path: Path) -> None:
    class Sanity(pl.Callback):
        seen = 0

        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen += trainer.sanity_checking

    sanity, callback = Sanity(), privacy()
    fit = trainer(tmp_path, callback, sanity, num_sanity_val_steps=2, limit_val_batches=3)
    fit.fit(Regression(), loader(), loader())
    assert sanity.seen == 2
    assert callback.steps == 10


def test_a_row_that_cannot_be_read_is_refused_in_its_own_words(tmp_path: Path) -> None:
    broken = ConfigurationError(must="files", found="3.wav", cost="none", remedy="mend the file")

    def collated(rows: list[Any]) -> Any:
        if len(rows) == 1:  # as the check reads them
            raise broken
        return default_collate(rows)

    unreadable = DataLoader(data(), batch_size=4, collate_fn=collated)
    with pytest.raises(ConfigurationError) as caught:
        trainer(tmp_path, privacy()).fit(Regression(), unreadable)
    assert caught.value is broken
