"""Private counterparts of strategy classes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    StrategyRegistry,
)

from lightning_privacy import ConfigurationError, UnsupportedOperationError
from lightning_privacy.strategies import PrivateSingleDeviceStrategy, privatize
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


class Own(SingleDeviceStrategy):
    """A user's own strategy, with state and a method of its own."""

    steps = 0

    def training_step(self, *arguments: Any) -> Any:
        self.steps += 1
        return super().training_step(*arguments)


def test_the_counterpart_is_always_the_same_class() -> None:
    assert privatize(SingleDeviceStrategy) is PrivateSingleDeviceStrategy
    assert privatize(PrivateSingleDeviceStrategy) is PrivateSingleDeviceStrategy
    assert privatize(Own) is privatize(Own)
    assert privatize(Own).__name__ == "PrivateOwn"


def test_the_class_of_an_instance_can_be_switched() -> None:
    strategy: Any = Own()
    strategy.__class__ = privatize(Own)
    assert isinstance(strategy, Own)
    assert strategy.root_device == torch.device("cpu")


def test_a_class_is_pickled_by_its_place() -> None:
    assert pickle.loads(pickle.dumps(PrivateSingleDeviceStrategy)) is PrivateSingleDeviceStrategy


@pytest.mark.parametrize(
    "base",
    [FSDPStrategy, DeepSpeedStrategy, SingleDeviceXLAStrategy],
)
def test_strategies_without_a_counterpart(base: type) -> None:
    with pytest.raises(UnsupportedOperationError, match=base.__name__):
        privatize(base)


def test_the_name_is_registered() -> None:
    assert "private" in StrategyRegistry.available_strategies()
    fit = Trainer(strategy="private", accelerator="cpu", logger=False, enable_checkpointing=False)
    assert type(fit.strategy) is PrivateSingleDeviceStrategy
    assert fit.strategy.root_device == torch.device("cpu")


def test_a_strategy_by_name_gets_the_device_that_lightning_found() -> None:
    strategy: Any = PrivateSingleDeviceStrategy()
    strategy.parallel_devices = [torch.device("cuda", 1)]
    assert strategy.root_device == torch.device("cuda", 1)
    explicit: Any = PrivateSingleDeviceStrategy(torch.device("cuda", 0))
    explicit.parallel_devices = [torch.device("cuda", 1)]
    assert explicit.root_device == torch.device("cuda", 0)


def test_refuses_to_fit_without_a_run(tmp_path: Path) -> None:
    fit = trainer(tmp_path, strategy="private")
    with pytest.raises(ConfigurationError, match="PrivateSingleDeviceStrategy trains together"):
        fit.fit(Regression(), loader())


def test_evaluates_without_a_run(tmp_path: Path) -> None:
    fit = trainer(tmp_path, strategy="private")
    ordinary = trainer(tmp_path)
    results = [t.validate(Regression(), loader(), verbose=False) for t in (fit, ordinary)]
    assert results[0] == results[1]


def test_a_users_own_strategy_trains_privately(tmp_path: Path) -> None:
    strategy = Own()
    callback = privacy(independence_check=False, expected_batch_size=4)
    trainer(tmp_path, callback, strategy=strategy, accelerator="auto").fit(
        Regression(), loader(batch_size=40)
    )
    assert isinstance(strategy, Own)
    assert callback.steps == 10
    assert strategy.steps >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_other_lightning_package(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Regression().net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = privacy()
    fit = other.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    fit.fit(Module(), loader())
    assert callback.steps == fit.global_step == 10
