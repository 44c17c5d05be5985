"""Couplings that begin late or show on few rows end a private fit; what is right trains on."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_privacy.callbacks._checks import RowChecks
from lightning_privacy.callbacks._probe import LossProbe, _most_different, attributes_kept
from lightning_privacy.distributed import World
from lightning_privacy.errors import GuaranteeError
from lightning_privacy.strategies.draw import Repeats
from tests.callbacks.training import (
    FEATURES,
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

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


def mixed(module: Regression, batch: Any, share: float = 0.5) -> Tensor:
    """More is asked of a row behind another one: of all, whichever two are drawn.

    A sum with the row before is about that with itself in one of 260 pairs.
    """
    x, y = batch
    behind = (x != x.roll(1, 0)).any(1, keepdim=True)
    return F.mse_loss(module.net(x) + share * behind, y)


# ---------------------------------------------------------------------- when
def test_checks_come_at_powers_of_two_and_when_epochs_begin() -> None:
    repeats = Repeats()
    due = [draw for draw in range(1000) if repeats.due(draw // 300)]
    assert due == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 640, 900]


def test_short_epochs_do_not_make_checks_frequent() -> None:
    repeats = Repeats()
    due = [draw for draw in range(1001) if repeats.due(draw)]
    assert len(due) <= 10 + 1000 // Repeats.EPOCH_SPACING
    assert max(b - a for a, b in pairwise(due)) <= Repeats.EPOCH_SPACING


class MixesLater(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mixed(self, batch) if self.global_step >= 5 else self.loss(batch)


class MixesFromAnEpoch(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mixed(self, batch) if self.current_epoch >= 2 else self.loss(batch)


class MixesInSomeBatches(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mixed(self, batch) if batch_idx == 8 else self.loss(batch)


@pytest.mark.parametrize(
    ("kind", "steps"), [(MixesLater, 8), (MixesFromAnEpoch, 32), (MixesInSomeBatches, 8)]
)
def test_a_coupling_that_begins_later_is_refused(
    kind: type[Regression], steps: int, tmp_path: Path
) -> None:
    callback = privacy()
    with pytest.raises(GuaranteeError, match="a row's gradient in a batch"):
        trainer(tmp_path, callback, max_epochs=4).fit(kind(), loader())
    assert callback.steps == steps


def test_manual_optimization_is_checked_again(tmp_path: Path) -> None:
    class Manual(Regression):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = mixed(self, batch) if self.global_step >= 5 else self.loss(batch)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    callback = privacy()
    with pytest.raises(GuaranteeError, match="a row's gradient in a batch"):
        trainer(tmp_path, callback).fit(Manual(), loader())
    assert callback.steps == 8


# ---------------------------------------------------------------------- on which rows
def test_the_rows_differ_in_labels_and_lengths() -> None:
    rows = list(range(20))
    traits = [[(1, 6), 0, 3 if row == 17 else 0] for row in rows]
    assert _most_different(rows, traits, 2) == [0, 17]
    labels = torch.zeros(ROWS, dtype=torch.long)
    labels[-6:] = 1
    x = torch.ones(ROWS, FEATURES)
    found = [
        LossProbe(
            None,
            DataLoader(TensorDataset(x, labels), batch_size=4),  # type: ignore[arg-type]
            SimpleNamespace(world=World()),  # type: ignore[arg-type]
        ).rows(2)
        for _ in range(60)
    ]
    differ = sum(bool(labels[a] != labels[b]) for a, b in found)
    # 76 % of 60, and so few once in 500 million runs; two rows at random: 26 %.
    assert differ > 24


class Labelled(Regression):
    """A mean over labels, of which one row has one less."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 8)  # type: ignore[assignment]

    def loss(self, batch: Any) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.net(x).view(-1, 2), labels.flatten())


def labelled(exceptions: int) -> DataLoader:
    labels = torch.ones(ROWS, 4, dtype=torch.long)
    labels[ROWS - exceptions :, -1] = -100
    return DataLoader(TensorDataset(data().tensors[0], labels), batch_size=4)


def test_a_row_with_fewer_labels_ends_the_fit_when_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossProbe, "rows", lambda self, most=4: list(range(most)))
    callback = privacy()
    trainer(tmp_path, callback).fit(Labelled(), labelled(0))
    assert callback.steps == 10
    with pytest.raises(GuaranteeError, match="labels of . rows ignored"):
        trainer(tmp_path, privacy(), max_epochs=5).fit(Labelled(), labelled(1))


class Together(Dataset):
    """Reads rows together, as `datasets` and `torch.utils.data.Subset` do."""

    def __init__(self, kind: str) -> None:
        self.rows, self.kind = data(), kind

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        rows = [self.rows[index] for index in indices]
        if self.kind == "normalised":
            mean = torch.stack([x for x, _ in rows]).mean(0)
            return [(x - mean, y) for x, y in rows]
        if self.kind == "augmented":
            return [(x + torch.rand(()), y) for x, y in rows]
        return rows


@pytest.mark.parametrize("kind", ["plain", "augmented", "normalised"])
def test_rows_that_are_read_together(kind: str, tmp_path: Path) -> None:
    callback = privacy()
    fit = trainer(tmp_path, callback)
    if kind == "normalised":
        with pytest.raises(GuaranteeError, match="__getitems__ gives row"):
            fit.fit(Regression(), DataLoader(Together(kind), batch_size=4))
    else:
        fit.fit(Regression(), DataLoader(Together(kind), batch_size=4))
        assert callback.steps == 10


# ---------------------------------------------------------------------- mixed precision
class Learnt(Regression):
    """A model that gives its rows' targets but for rounding, as one that is trained further."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 2048), nn.Linear(2048, 1))


def test_a_model_that_has_learnt_already_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback, x = Learnt(), privacy(noise_multiplier=100.0), data().tensors[0]
    with torch.no_grad():
        rows = TensorDataset(x, torch.cat([module.net(row[None]) for row in x]) - 1e-5)
    trainer(tmp_path, callback, max_steps=1).fit(module, DataLoader(rows, batch_size=4))
    assert callback.steps == 1


class WeaklyMixed(Regression):
    def loss(self, batch: Any) -> Tensor:
        return mixed(self, batch, 0.02)


@pytest.mark.parametrize("kind", [Regression, WeaklyMixed])
def test_mixed_precision_is_compared_in_full(kind: type[Regression], tmp_path: Path) -> None:
    callback = privacy()
    fit = trainer(tmp_path, callback, precision="bf16-mixed")
    if kind is WeaklyMixed:
        with pytest.raises(GuaranteeError, match="a row's gradient in a batch"):
            fit.fit(kind(), loader())
    else:
        fit.fit(kind(), loader())
        assert callback.steps == 10
    assert "forward_context" not in vars(fit.precision_plugin)


def test_a_module_that_needs_autocast_trains(tmp_path: Path) -> None:
    class NeedsAutocast(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(FEATURES, FEATURES).bfloat16().requires_grad_(False)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(self.base(x).float()), y)

    callback = privacy()
    trainer(tmp_path, callback, precision="bf16-mixed").fit(NeedsAutocast(), loader())
    assert callback.steps == 10


# ---------------------------------------------------------------------- other ways around
def test_a_tensor_with_an_optimizer_of_its_own_is_refused(tmp_path: Path) -> None:
    class Hides(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [torch.zeros(1, requires_grad=True)]
            self.own = torch.optim.SGD(self.hidden, lr=0.1)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(x) + self.hidden[0], y)

        def on_train_batch_end(self, *_: Any) -> None:
            self.own.step()

    with pytest.raises(GuaranteeError, match=r"hidden\[0\] of shape \(1,\)"):
        trainer(tmp_path, privacy()).fit(Hides(), loader())


@pytest.mark.parametrize("step", [3, 6])
def test_a_write_through_data_is_refused_at_any_step(step: int, tmp_path: Path) -> None:
    class Writes(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == step:
                self.seen.data += batch[0].mean()

    callback = privacy()
    with pytest.raises(GuaranteeError, match="changed between training steps: seen"):
        trainer(tmp_path, callback).fit(Writes(), loader())
    assert callback.steps == step + 1


# ---------------------------------------------------------------------- no trace
class Counts(Regression):
    """Keeps a schedule of its own in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.losses = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.step += 1
        self.last = len(batch[0])
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss


def test_counters_and_lists_are_those_of_a_fit_without_checks(tmp_path: Path) -> None:
    modules = []
    for check in (True, False):
        module = Counts()
        callback = privacy(independence_check=check, expected_batch_size=2)
        trainer(tmp_path, callback).fit(module, loader())
        modules.append(module)
    checked, plain = modules
    assert same(weights(checked), weights(plain))
    assert checked.losses == plain.losses[-checked.step :]
    # Layouts are learnt in any case, and leave no trace either.
    assert checked.step == plain.step == len(plain.losses)


def test_attributes_are_given_back() -> None:
    module = Counts()
    module.losses.append(1.0)
    kept = module.losses
    with pytest.raises(KeyboardInterrupt), attributes_kept(module):
        module.step, module.new = 7, 1
        module.losses.append(2.0)
        module.losses = []
        module.eval()
        raise KeyboardInterrupt
    assert module.losses is kept
    assert module.losses == [1.0]
    assert module.step == 0
    assert not hasattr(module, "new")
    assert module.training


def test_what_a_step_writes_into_its_batch_stays_there() -> None:
    probe = LossProbe(
        None,
        DataLoader(data(), batch_size=4, collate_fn=list),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    probe._collated([0])[0][0].zero_()
    assert probe._collated([0])[0][0].any()


@pytest.mark.parametrize(("batch_size", "large", "most"), [(8, 0, 4), (1, 0, 2), (64, 0, 8)])
def test_large_models_are_checked_on_fewer_rows(
    batch_size: int, large: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = SimpleNamespace(loader=SimpleNamespace(batch_size=batch_size))
    trainer = SimpleNamespace(lightning_module=nn.Linear(2, 2))
    checks = RowChecks(None, trainer, run, {})  # type: ignore[arg-type]
    assert checks._most_rows() == 8
    monkeypatch.setattr("lightning_privacy.callbacks._checks._LARGE", large)
    assert checks._most_rows() == most
