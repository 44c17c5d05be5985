"""What hooks keep of earlier batches in plain attributes, and a loss that reads it."""

from __future__ import annotations

import operator
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.errors import GuaranteeError
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


class Keeps(Regression):
    """Keeps something of each batch in a hook; a subclass says what, and what the loss reads."""

    def __init__(self, **start: Any) -> None:
        super().__init__()
        vars(self).update(start)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keep(batch)

    def factor(self) -> Any:
        return 1.0

    def keep(self, batch: Any) -> None:
        raise NotImplementedError


class KeepsTensor(Keeps):
    def factor(self) -> Any:
        return self.scale

    def keep(self, batch: Any) -> None:
        self.scale = batch[0].abs().mean()


class KeepsQueue(Keeps):
    def factor(self) -> Any:
        return 1 + torch.stack(self.queue).sum()

    def keep(self, batch: Any) -> None:
        self.queue.append(batch[0].abs().mean())


class KeepsArray(Keeps):
    def factor(self) -> Any:
        return float(self.scale[0])

    def keep(self, batch: Any) -> None:
        self.scale[0] = batch[0].abs().mean().item()


class BeforeTheStep(KeepsTensor):
    """Of the present batch, past the check of its rows."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.scale = batch[0].abs().mean()

    def keep(self, batch: Any) -> None:
        pass


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepsTensor(scale=torch.tensor(1.0)),
        lambda: KeepsQueue(queue=[torch.tensor(1.0)]),
        lambda: KeepsArray(scale=np.ones(1)),
        lambda: BeforeTheStep(scale=torch.tensor(1.0)),
    ],
    ids=["tensor", "queue", "array", "before the step"],
)
def test_a_loss_that_reads_what_a_hook_kept_is_refused(
    tmp_path: Path, make: Any, batch_size: int
) -> None:
    callback = privacy(expected_batch_size=4)
    with pytest.raises(GuaranteeError, match="as before the first step"):
        trainer(tmp_path, callback).fit(make(), loader(batch_size=batch_size))
    assert callback.steps <= 2


class FromTheSecondStep(KeepsTensor):
    """Read only where a hook has made it: there is no value from before the first step."""

    def factor(self) -> Any:
        return self.scale if self.global_step else 1.0


class OrOne(KeepsTensor):
    def factor(self) -> Any:
        return 1.0 if self.scale is None else self.scale


class Divides(KeepsTensor):
    def factor(self) -> Any:
        return 1 / self.scale if self.global_step else 1.0


class KeepsTable(Keeps):
    def factor(self) -> Any:
        return self.table["mean"]["of all"] if self.table["mean"] else 1.0

    def keep(self, batch: Any) -> None:
        self.table["mean"]["of all"] = batch[0].abs().mean()


class KeepsMetric(Keeps):
    """The running mean of a metric, which checks give back."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def factor(self) -> Any:
        return 1 + self.mean.compute() if self.global_step else 1.0

    def keep(self, batch: Any) -> None:
        self.mean.update(batch[0].abs().mean())


class EmptyAtFirst(KeepsQueue):
    def factor(self) -> Any:
        return 1 + torch.stack([*self.queue]).sum() if self.global_step else 1.0


@pytest.mark.parametrize(
    "make",
    [
        FromTheSecondStep,
        lambda: OrOne(scale=None),
        lambda: FromTheSecondStep(scale=None),
        lambda: Divides(scale=torch.zeros(())),
        lambda: EmptyAtFirst(queue=[]),
        lambda: EmptyAtFirst(queue=deque(maxlen=4)),
        lambda: KeepsTable(table=defaultdict(dict)),
        lambda: KeepsTable(table=OrderedDict(mean={"of all": torch.tensor(1.0)})),
        KeepsMetric,
    ],
    ids=[
        "made later", "None", "None and not asked", "zero", "empty", "empty deque", "defaultdict",
        "nested", "metric",
    ],
)  # fmt: skip
def test_it_does_not_matter_what_was_there_before_the_first_step(tmp_path: Path, make: Any) -> None:
    callback = privacy(expected_batch_size=4)
    with pytest.raises(GuaranteeError, match="as before the first step"):
        trainer(tmp_path, callback).fit(make(), loader())
    assert callback.steps <= 2


class MadeOnce(Keeps):
    """A table that no data entered, made when it is first needed."""

    def __init__(self, *, flag: bool) -> None:
        super().__init__()
        self.flag, self.made, self.table = flag, False, None

    def factor(self) -> Any:
        if not self.made if self.flag else self.table is None:
            self.table, self.made = torch.full((), 0.5), True
        return self.table

    def keep(self, batch: Any) -> None:
        pass


@pytest.mark.parametrize("flag", [False, True])
def test_a_table_that_is_made_when_it_is_first_needed_passes(tmp_path: Path, flag: bool) -> None:
    callback = privacy()
    trainer(tmp_path, callback).fit(MadeOnce(flag=flag), loader())
    assert callback.steps == 10


def test_metrics_that_no_loss_reads_pass(tmp_path: Path) -> None:
    class Logs(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.all = torchmetrics.MeanMetric(), torchmetrics.CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.all.update(loss)
            self.log("mean", self.mean)
            return loss

    callback, module = privacy(), Logs()
    fit = trainer(tmp_path, callback)
    fit.fit(module, loader())
    assert callback.steps == 10
    assert len(module.all.value) == len(module.calls)
    assert "mean" in fit.callback_metrics


def test_a_callback_that_keeps_it_on_the_module_is_found(tmp_path: Path) -> None:
    class Writes(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            module.scale = batch[0].abs().mean()

    class Reads(KeepsTensor):
        def keep(self, batch: Any) -> None:
            pass

    with pytest.raises(GuaranteeError, match="with scale as before"):
        trainer(tmp_path, privacy(), Writes()).fit(Reads(scale=torch.tensor(1.0)), loader())


class Recurrent(Regression):
    """Torch keeps the parameters of a recurrent layer a second time, in a list."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"cells": kind(1, 4, batch_first=True), "out": nn.Linear(4, 1)})

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        states, _ = self.net["cells"](x.unsqueeze(2))
        return F.mse_loss(self.net["out"](states[:, -1]), y)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_trains_through_every_repeated_check(tmp_path: Path, kind: Any) -> None:
    callback = privacy(expected_batch_size=4)
    module = Recurrent(kind)
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.steps == 10
    cells = module.net["cells"]
    assert all(map(operator.is_, cells._flat_weights, cells.parameters()))


def test_a_list_of_the_modules_own_parameters_is_no_memory_of_batches(tmp_path: Path) -> None:
    class Lists(KeepsQueue):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.01 * self.all[0].square().sum()

        def factor(self) -> Any:
            return 1.0

        def keep(self, batch: Any) -> None:
            pass

    module = Lists()
    module.all = list(module.parameters())
    trainer(tmp_path, privacy(expected_batch_size=4), max_steps=6).fit(module, loader())


def test_beside_the_modules_own_parameters_a_kept_statistic_is_found(tmp_path: Path) -> None:
    class Beside(KeepsQueue):
        def factor(self) -> Any:
            return 1 + self.queue[-1]

    module = Beside(queue=[torch.tensor(1.0)])
    module.queue.insert(0, next(module.parameters()))
    with pytest.raises(GuaranteeError, match="with queue as before the first step"):
        trainer(tmp_path, privacy(expected_batch_size=4)).fit(module, loader())


class KeepsNumber(Keeps):
    def factor(self) -> Any:
        return self.scale

    def keep(self, batch: Any) -> None:
        self.scale = 0.9 * self.scale + 0.1 * batch[0].abs().mean().item()


def test_a_number_may_be_a_schedule_and_is_warned_of_once(tmp_path: Path) -> None:
    callback = privacy()
    with pytest.warns(UserWarning, match="Gradients depend on scale") as caught:
        trainer(tmp_path, callback).fit(KeepsNumber(scale=1.0), loader())
    assert len([w for w in caught if "Gradients depend" in str(w.message)]) == 1
    assert callback.steps == 10


def test_what_is_declared_is_left_alone(tmp_path: Path) -> None:
    for module in (KeepsNumber(scale=1.0), KeepsTensor(scale=torch.tensor(1.0))):
        callback = privacy(independent_buffers=("scale",))
        trainer(tmp_path, callback).fit(module, loader())
        assert callback.steps == 10


class ReadsNothing(Keeps):
    """Records losses, counts steps, and leaves the gradient alone."""

    def keep(self, batch: Any) -> None:
        self.record.append(batch[0].mean())
        self.last = batch[0].clone()
        self.count += 1


def test_records_that_no_loss_reads_pass_and_stay(tmp_path: Path) -> None:
    module, callback = ReadsNothing(record=[torch.zeros(())], count=0), privacy()
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.steps == module.count == 10
    assert len(module.record) == 11


class MadeByAHook(Keeps):
    """The attribute is not there before the first hook has run."""

    def on_train_start(self) -> None:
        self.buffer = [torch.zeros(())]

    def factor(self) -> Any:
        return 1 + 0 * self.buffer[-1]

    def keep(self, batch: Any) -> None:
        self.buffer = [*self.buffer, batch[0].mean()]


def test_an_attribute_of_a_hook_without_influence_passes(tmp_path: Path) -> None:
    callback = privacy()
    trainer(tmp_path, callback).fit(MadeByAHook(), loader())
    assert callback.steps == 10
