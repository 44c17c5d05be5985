"""Members against held-out rows while a model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import ConfigurationError, UnsupportedOperationError
from lightning_privacy.callbacks import LeakageMonitor
from tests.callbacks.training import LIGHTNING_NOISE, Regression, privacy, same, trainer, weights

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]


def noise(seed: int, rows: int = 24) -> TensorDataset:
    """Rows whose labels follow from nothing: they can only be memorised."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(*(torch.randn(rows, n, generator=generator) for n in (3, 1)))


class Memorizes(Regression):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1)
            )

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fitted(directory: Path, monitor: LeakageMonitor, *callbacks: Any, **options: Any) -> Any:
    made = trainer(directory, *callbacks, monitor, **options)
    loaders = DataLoader(noise(1), batch_size=8), DataLoader(noise(2), batch_size=8)
    made.fit(options.pop("module", None) or Memorizes(), *loaders)
    return made


def test_a_model_that_memorizes_is_seen(tmp_path: Path) -> None:
    monitor = LeakageMonitor(rows=24, every_n_epochs=60)
    made = fitted(tmp_path, monitor, max_epochs=120)
    assert [epoch for epoch, _ in monitor.history] == [60, 120]
    by_attack = {figures.attack: figures for figures in monitor.history[-1][1]}
    assert by_attack.keys() == {"loss", "ratio"}
    assert by_attack["loss"].auroc > 0.75
    assert by_attack["ratio"].auroc > 0.75
    logged = made.callback_metrics
    assert float(logged["not_covered_by_epsilon/loss_auroc"]) == pytest.approx(
        by_attack["loss"].auroc
    )
    assert all(name.startswith("not_covered_by_epsilon/") for name in logged if "auroc" in name)
    assert [found.name for found in monitor.findings()] == [
        "membership by loss, epoch 120",
        "membership by ratio, epoch 120",
    ]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for monitors in ([], [LeakageMonitor(rows=8)]):
        module = Memorizes()
        made = trainer(tmp_path, privacy(), *monitors, max_epochs=3)
        loaders = DataLoader(noise(1), batch_size=4), DataLoader(noise(2), batch_size=4)
        made.fit(module, *loaders)
        ends.append((weights(module), module.calls, module.training))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_each_example_has_its_own_loss(tmp_path: Path) -> None:
    class Own(Memorizes):
        def losses(self, batch: Any) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            x, y = batch
            return (self.net(x) - y).square().mean(1)

    histories = []
    for module in (Memorizes(), Own()):
        monitor = LeakageMonitor(rows=12)
        made = trainer(tmp_path, privacy(), monitor, max_epochs=2)
        loaders = DataLoader(noise(1), batch_size=4), DataLoader(noise(2), batch_size=4)
        made.fit(module, *loaders)
        histories.append(monitor.history)
    (first, second) = histories
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert [f.as_dict() for f in one] == [pytest.approx(f.as_dict()) for f in other]


def test_a_loss_of_the_batch_is_refused(tmp_path: Path) -> None:
    monitor = LeakageMonitor(rows=8, losses=lambda module, batch: module.loss(batch))
    with pytest.raises(ConfigurationError, match="one loss for each of 8 examples"):
        fitted(tmp_path, monitor)


def test_without_held_out_rows_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="held_out"):
        trainer(tmp_path, LeakageMonitor(rows=8)).fit(Memorizes(), DataLoader(noise(1)))
    monitor = LeakageMonitor(rows=8, held_out=noise(2))
    trainer(tmp_path, monitor).fit(Memorizes(), DataLoader(noise(1)))
    assert len(monitor.history) == 1


def test_manual_optimization_needs_losses(tmp_path: Path) -> None:
    module = Memorizes()
    module.automatic_optimization = False
    with pytest.raises(UnsupportedOperationError, match="losses"):
        trainer(tmp_path, LeakageMonitor(held_out=noise(2))).fit(module, DataLoader(noise(1)))


def test_after_a_resume_only_the_loss_is_left(tmp_path: Path) -> None:
    made = fitted(tmp_path, LeakageMonitor(rows=8), max_epochs=1)
    made.save_checkpoint(tmp_path / "one.ckpt")
    monitor = LeakageMonitor(rows=8)
    again = trainer(tmp_path, monitor, max_epochs=2)
    loaders = DataLoader(noise(1), batch_size=8), DataLoader(noise(2), batch_size=8)
    with pytest.warns(UserWarning, match="by the loss alone"):
        again.fit(Memorizes(), *loaders, ckpt_path=tmp_path / "one.ckpt")
    assert [figures.attack for figures in monitor.history[-1][1]] == ["loss"]
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert not any("Leakage" in name for name in state["callbacks"])
