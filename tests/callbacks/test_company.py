"""Couplings that a few rows do not show, and detours around the checks; each is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_privacy.audit.probe import HEAVY, ProbeModule, ProbeSettings, probe_rows
from lightning_privacy.callbacks._checks import RowChecks
from lightning_privacy.clipping import company
from lightning_privacy.clipping.checks import learn
from lightning_privacy.clipping.layout import Layouts
from lightning_privacy.errors import GuaranteeError
from tests.callbacks.training import LIGHTNING_NOISE, Regression, data, loader, privacy, trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]

WIDE = 24


class Rows(Regression):
    """A loss of each row, reduced in the way of a subclass."""

    def losses(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.reduced(self.losses(batch), batch)

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        return losses.mean()


class HardestOnly(Rows):
    """The eight hardest rows of a batch: all of them, as long as there are eight."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        return losses.topk(min(8, len(losses))).values.mean()


class CentredWhenLarge(Rows):
    def losses(self, batch: Any) -> Tensor:
        rows = batch[0] - batch[0].mean(0) if len(batch[0]) > 8 else batch[0]
        return super().losses((rows, batch[1]))


class Capacity(Rows):
    """An expert takes the first nine rows that are routed to it, and drops the others."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        routed = batch[0][:, 0] > -10
        return (losses * (routed & (routed.cumsum(0) <= 9))).mean()


class RareCounts(Rows):
    """Rows are weighted by how many in the batch share a class, of many."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        classes = (batch[0][:, 0] * 6).round().long() + 40
        return (losses / torch.bincount(classes)[classes]).mean()


@pytest.mark.parametrize("kind", [HardestOnly, CentredWhenLarge, Capacity, RareCounts])
def test_a_coupling_in_full_batches_only_is_refused(tmp_path: Path, kind: type[Rows]) -> None:
    callback = privacy()
    with pytest.raises(GuaranteeError, match=r"rows together differ|a row's gradient in a batch"):
        trainer(tmp_path, callback).fit(kind(), loader(batch_size=WIDE))
    assert not callback.steps


@pytest.mark.parametrize("kind", [HardestOnly, CentredWhenLarge, Capacity])
def test_rows_without_a_finite_gradient_hide_no_coupling_of_the_others(
    tmp_path: Path, kind: type[Rows]
) -> None:
    broken = data()
    broken.tensors[0][::4, 1] = torch.nan  # any 24 rows hold more than eight of the others
    for module in (Rows(), kind()):
        callback = privacy()
        fit = trainer(tmp_path, callback)
        rows = DataLoader(broken, batch_size=WIDE)
        if type(module) is Rows:
            fit.fit(module, rows)
            assert callback.steps == 2
            continue
        with pytest.raises(GuaranteeError, match="rows together differ"):
            fit.fit(module, rows)
        assert not callback.steps


class Standardised(Rows):
    """By the standard deviation over the batch, which a single row has not: it is NaN then."""

    since = 0

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        if self.global_step >= self.since:
            x = x - x.mean(0)
            x = x / (x.square().sum(0) / (len(x) - 1)).sqrt()
        return super().losses((x, y))


class StandardisedLater(Standardised):
    since = 2


class CannotDoWithImprobableDraws(StandardisedLater):
    def losses(self, batch: Any) -> Tensor:
        if not 0.1 < torch.rand(()) < 0.9 and self.global_step:
            raise RuntimeError("no room for all that fell out")
        return super().losses(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().training_step(batch, batch_idx)


class Decorrelated(Rows):
    """Covariances of activations, divided by one less than the rows."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        hidden = self.net[0](batch[0])
        centred = hidden - hidden.mean(0)
        return losses.mean() + (centred.T @ centred / (len(hidden) - 1)).square().sum()


@pytest.mark.parametrize(
    "kind", [Standardised, StandardisedLater, CannotDoWithImprobableDraws, Decorrelated]
)
def test_a_gradient_that_is_finite_in_company_only_is_refused(
    tmp_path: Path, kind: type[Rows]
) -> None:
    callback = privacy()
    with pytest.raises(GuaranteeError, match="a variance over the rows"):
        trainer(tmp_path, callback).fit(kind(), loader())
    assert callback.steps == getattr(kind, "since", 0)


def test_full_batches_of_independent_rows_pass(tmp_path: Path) -> None:
    for clipping in ("flat", "automatic"):
        callback = privacy(clipping=clipping)
        trainer(tmp_path, callback, max_epochs=3).fit(Rows(), loader(batch_size=WIDE))
        assert callback.steps == 6


class LaterInFullBatches(HardestOnly):
    """Independent at the start."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        return super().reduced(losses, batch) if self.global_step > 2 else losses.mean()


def test_full_batches_are_compared_again(tmp_path: Path) -> None:
    callback = privacy()
    with pytest.raises(GuaranteeError, match="24 rows together differ"):
        trainer(tmp_path, callback, max_epochs=20).fit(
            LaterInFullBatches(), loader(batch_size=WIDE)
        )
    assert 2 < callback.steps <= 4


class LaterInThreesAndMore(Rows):
    """Two rows never show it, and it is not there when eight are compared before the first step."""

    def reduced(self, losses: Tensor, batch: Any) -> Tensor:
        mixed = self.global_step and len(losses) > 2
        return (losses * losses.detach().mean() if mixed else losses).mean()


def test_batches_of_a_few_rows_are_compared_again_as_a_whole(tmp_path: Path) -> None:
    callback = privacy()
    with pytest.raises(GuaranteeError, match="8 rows together differ"):
        trainer(tmp_path, callback, max_epochs=20).fit(LaterInThreesAndMore(), loader(batch_size=8))
    assert callback.steps == 4


def far_apart() -> DataLoader:
    """Rows of which each has a residual a quarter longer than the one before.

    Where two are drawn that are about equal, what a batch does to both may not show.
    """
    x = loader().dataset.tensors[0]
    return DataLoader(TensorDataset(x, 10 * 1.25 ** torch.arange(len(x))[:, None]), batch_size=4)


class ScalesInBackward(Regression):
    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        (loss * loss.detach()).backward(*arguments, **named)


class HalvesInBackward(Regression):
    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        (0.5 * loss).backward(*arguments, **named)


class GetsABackward(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backward = functools.partial(ScalesInBackward.backward, self)


@pytest.mark.parametrize("kind", [ScalesInBackward, GetsABackward])
def test_the_checks_go_through_the_modules_own_backward(
    tmp_path: Path, kind: type[Regression]
) -> None:
    with pytest.raises(GuaranteeError, match="scaled by"):
        trainer(tmp_path, privacy()).fit(kind(), far_apart())
    callback = privacy()
    trainer(tmp_path, callback).fit(HalvesInBackward(), loader())
    assert callback.steps == 10


class Normalises(Regression):
    """Divides the gradient of an activation by its norm over the batch."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.hidden = self.net[0](x).tanh()
        return F.mse_loss(self.net[2](self.hidden), y)

    def on_before_backward(self, loss: Tensor) -> None:
        self.hidden.register_hook(lambda gradient: gradient / gradient.norm())


class Normaliser(pl.Callback):
    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        Normalises.on_before_backward(module, loss)


class Unaware(Normalises):
    def on_before_backward(self, loss: Tensor) -> None:
        pass


def test_the_checks_go_through_the_hooks_before_a_backward(tmp_path: Path) -> None:
    for module, callbacks in ((Normalises(), ()), (Unaware(), (Normaliser(),))):
        with pytest.raises(GuaranteeError, match="that example alone"):
            trainer(tmp_path, privacy(), *callbacks).fit(module, far_apart())
    trainer(tmp_path, privacy()).fit(Unaware(), far_apart())


class MixesInPlace(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        batch[0].add_(batch[0].flip(0))


class MixesAnew(Regression):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0] = batch[0] + batch[0].flip(0)


@dataclasses.dataclass
class Pairs:
    """A batch of a class of its own."""

    x: Tensor
    y: Tensor

    def to(self, device: Any, **_: Any) -> Pairs:
        return Pairs(self.x.to(device), self.y.to(device))


class OfPairs(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch.x), batch.y)


class MixesPairs(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        batch.x.add_(batch.x.flip(0))


def paired(rows: list[Any]) -> Pairs:
    return Pairs(*default_collate(rows))


def paired_but_the_last(rows: list[Any]) -> Pairs:
    return paired(rows[:3])


def test_a_batch_of_a_class_of_its_own_is_looked_into(tmp_path: Path) -> None:
    trainer(tmp_path, privacy()).fit(OfPairs(), loader(collate_fn=paired))
    with pytest.raises(GuaranteeError, match="changed in between"):
        trainer(tmp_path, privacy(), MixesPairs()).fit(OfPairs(), loader(collate_fn=paired))
    settings = {"independence_check": False, "sample_rate": 1.0, "expected_batch_size": 40}
    with pytest.raises(GuaranteeError, match="3 rows made of 4"):
        trainer(tmp_path, privacy(**settings)).fit(
            OfPairs(), loader(collate_fn=paired_but_the_last)
        )


class Prepares(Regression):
    """What belongs to each row alone may be changed, before the batch is on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].mul_(2)
        return batch


def test_a_batch_that_a_hook_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuaranteeError, match="changed in between"):
        trainer(tmp_path, privacy(), MixesInPlace()).fit(Regression(), loader())
    with pytest.raises(GuaranteeError, match="changed in between"):
        trainer(tmp_path, privacy()).fit(MixesAnew(), loader())
    callback = privacy()
    trainer(tmp_path, callback).fit(Prepares(), loader(), loader())
    assert callback.steps == 10


class Frames(Regression):
    """Sequences of four frames, laid end to end in every layer."""

    def loss(self, batch: Any) -> Tensor:
        frames, y = batch
        each = self.net(frames.flatten(0, 1)).view(len(y), -1)
        return (each.mean(1) - y).square().mean()


def readable(rows: list[Any]) -> Any:
    """Drops what could not be read, as many collate functions do."""
    return default_collate([row for row in rows if row[0].isfinite().all()])


def test_a_collate_function_that_drops_rows_is_refused(tmp_path: Path) -> None:
    """Three sequences in the place of four are cut into four: a unit would be in two of them."""
    frames = torch.randn(400, 4, 3, generator=torch.Generator().manual_seed(1))
    broken = frames.clone()
    broken[::100] = torch.nan
    settings = {"sample_rate": 1.0, "expected_batch_size": 400}
    for given in (frames, broken):
        rows = TensorDataset(given, given.sum((1, 2)))
        batches = DataLoader(rows, batch_size=4, collate_fn=readable)
        fit = trainer(tmp_path, privacy(**settings))
        if given is frames:
            fit.fit(Frames(), batches)
            continue
        with pytest.raises(GuaranteeError):
            fit.fit(Frames(), batches)


class Reloaded(pl.LightningDataModule):
    """From the third epoch on there are rows that cannot be read."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches, self.times = batches, 0

    def train_dataloader(self) -> Any:
        self.times += 1
        return self.batches(broken=self.times > 2)


class Listed(Frames):
    """A batch is a list of rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss([torch.stack(part) for part in zip(*batch, strict=True)])


@pytest.mark.parametrize("kind", [Frames, Listed])
def test_rows_dropped_by_a_loader_of_a_later_epoch_are_refused(
    tmp_path: Path, kind: type[Frames]
) -> None:
    frames = torch.randn(400, 4, 3, generator=torch.Generator().manual_seed(1))

    def batches(*, broken: bool) -> DataLoader:
        given = frames.clone()
        given[:: 100 if broken else 1000, 0, 0] = torch.nan if broken else 0.0
        rows = TensorDataset(given, given.sum((1, 2)))
        listed = lambda rows: [row for row in rows if row[0].isfinite().all()]  # noqa: E731
        collate = readable if kind is Frames else listed
        return DataLoader(rows, batch_size=4, collate_fn=collate)

    callback = privacy(sample_rate=1.0, expected_batch_size=400)
    fit = trainer(tmp_path, callback, max_epochs=9, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(GuaranteeError, match="3 rows made of 4"):
        fit.fit(kind(), datamodule=Reloaded(batches))
    assert callback.steps == 2


class Begins(Regression):
    """Uses a layer from the fourth step on only: between two checks."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)
        self.register_buffer("table", torch.randn(8, 3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.global_step >= 3:
            x = self.more(x)
        # Far from its target, or a row that fits by chance has no gradient to be compared.
        return F.mse_loss(self.net(x), y + 20)

    def more(self, x: Tensor) -> Tensor:
        return self.extra(x).tanh()


class BeginsWithAllRows(Begins):
    """What all rows share goes through the layer, and looks like two rows of four positions."""

    def more(self, x: Tensor) -> Tensor:
        return (x @ self.extra(self.table).T)[:, :3]


class BeginsWithTime(Begins):
    """Positions first, and laid end to end: no two neighbours are of one row."""

    def more(self, x: Tensor) -> Tensor:
        return self.extra(torch.cat([x, 2 * x])).tanh().view(2, -1, 3).sum(0)


class BeginsForFew(BeginsWithAllRows):
    """Only with a row of which there is one in a thousand."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if bool((x[:, 0] > 50).any()):
            x = self.more(x)
        return F.mse_loss(self.net(x), y)


def test_a_layer_that_few_rows_use_is_checked_with_these(tmp_path: Path) -> None:
    x = torch.randn(1000, 3)
    x[600, 0] = 100.0
    rows = TensorDataset(x, x.sum(1, keepdim=True))
    callback = privacy(sample_rate=1.0, expected_batch_size=1000, dataset_size=1000)
    fit = trainer(tmp_path, callback, max_epochs=2)
    with pytest.raises(GuaranteeError, match="that example alone|in two half batches"):
        fit.fit(BeginsForFew(), DataLoader(rows, batch_size=8))
    assert callback.steps == 0


@pytest.mark.parametrize("kind", [BeginsWithAllRows, BeginsWithTime])
def test_a_layer_that_is_first_used_between_two_checks_is_checked(
    tmp_path: Path, kind: type[Begins]
) -> None:
    """A unit added up to 1.7 times the clip norm until the next check."""
    callback = privacy(sample_rate=1.0, expected_batch_size=12, dataset_size=12)
    fit = trainer(tmp_path, callback, max_epochs=4)
    with pytest.raises(GuaranteeError, match="that example alone"):
        fit.fit(kind(), loader(12, batch_size=2))
    assert callback.steps == 3


def test_such_a_layer_passes_if_it_keeps_rows_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    again = RowChecks.again

    def noted(self: RowChecks, *arguments: Any) -> None:
        checks.append(self._trainer.global_step)
        again(self, *arguments)

    monkeypatch.setattr(RowChecks, "again", noted)
    trainer(tmp_path, privacy(), max_steps=8).fit(Begins(), loader())
    # 1, 2, 4, …, and before the fourth release.
    assert checks == [1, 2, 3, 4]


class Keeps(Regression):
    """Keeps raw data, and writes them where a checkpoint would hold them."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.seen = torch.zeros(3)
        setattr(self, hook, self.write)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = batch[0].mean(0)
        return super().training_step(batch, batch_idx)

    def write(self) -> None:
        self.centre.copy_(self.seen)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "on_validation_epoch_end"])
def test_a_buffer_that_a_checkpoint_would_hold_is_refused(tmp_path: Path, hook: str) -> None:
    with pytest.raises(GuaranteeError, match="centre"):
        trainer(tmp_path, privacy()).fit(Keeps(hook), loader(), loader())
    declared = privacy(independent_buffers=("centre",))
    trainer(tmp_path, declared).fit(Keeps(hook), loader(), loader())
    assert declared.steps == 10


class ClosedForm(Regression):
    def on_train_epoch_end(self) -> None:
        self.net[0].weight.data[0] = torch.randn(3)


def test_weights_written_before_a_checkpoint_are_refused(tmp_path: Path) -> None:
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path)
    with pytest.raises(GuaranteeError, match="before a checkpoint"):
        trainer(tmp_path, privacy(), checkpoints).fit(ClosedForm(), loader())
    assert not list(tmp_path.glob("*.ckpt"))


class Centres(Regression):
    """Means of the training data, written into a frozen parameter while validation runs."""

    def __init__(self, hook: str, name: str) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.seen, self.name = torch.zeros(3), name
        setattr(self, hook, self.write)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = batch[0].mean(0)
        return super().training_step(batch, batch_idx)

    def write(self) -> None:
        self.get_parameter(self.name).data[..., :3] = self.seen


@pytest.mark.parametrize("name", ["centre", "net.0.weight"])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("every", [{}, {"val_check_interval": 3}])
def test_weights_written_while_validation_runs_are_refused(
    tmp_path: Path, hook: str, name: str, every: dict[str, Any]
) -> None:
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path)
    fit = trainer(tmp_path, privacy(), checkpoints, **every)
    with pytest.raises(GuaranteeError, match=f"during validation: {name}"):
        fit.fit(Centres(hook, name), loader(), loader())
    assert not list(tmp_path.glob("*.ckpt"))


class CentresBeforeAStep(Centres):
    """Between the release and the update, where only the optimizer's parameters may change."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.write()


def test_others_than_the_optimizer_s_parameters_do_not_change_in_its_step(tmp_path: Path) -> None:
    with pytest.raises(GuaranteeError, match="during an optimizer step: centre"):
        trainer(tmp_path, privacy()).fit(CentresBeforeAStep("write_not", "centre"), loader())
    declared = privacy(independent_buffers=("centre",))
    trainer(tmp_path, declared).fit(CentresBeforeAStep("write_not", "centre"), loader())
    assert declared.steps == 10


class Counts(nn.Module):
    """Its counts are in the state dictionary, and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.sums.append(float(rows.detach().sum()))
        return rows

    def get_extra_state(self) -> Any:
        return list(self.sums)

    def set_extra_state(self, state: Any) -> None:
        self.sums = state


def test_extra_state_that_changes_is_refused(tmp_path: Path) -> None:
    module = Regression()
    module.net.insert(0, Counts())
    with pytest.raises(GuaranteeError, match="extra_state"):
        trainer(tmp_path, privacy()).fit(module, loader())


def test_averaged_weights_may_be_saved(tmp_path: Path) -> None:
    averaged = pl.callbacks.WeightAveraging()
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    callback = privacy(journal=False)
    fit = trainer(tmp_path, averaged, callback, checkpoints, max_epochs=2)
    fit.fit(Regression(), loader(), loader())
    assert callback.steps == 20


def test_a_loss_that_has_no_gradient_has_no_company() -> None:
    layer = nn.Linear(3, 1)
    check = company.CompanyCheck(
        module=layer,
        parameters=dict(layer.named_parameters()),
        loss_of=lambda rows: F.mse_loss(torch.zeros(len(rows)), torch.ones(len(rows))),
        layouts=Layouts(),
    )
    check.run(list(range(10)))


def test_rows_that_cancel_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of equal rows with different signs is rounding, beside other rows too."""
    settings = ProbeSettings(steps=1, noise_multiplier=1.0, members=16, heavy=8)
    module, rows = ProbeModule(settings), probe_rows(settings)
    parameters = dict(module.named_parameters())

    def loss_of(chosen: Sequence[int]) -> Tensor:
        return module.training_step(default_collate([rows[row] for row in chosen]), 0)

    heavy = [row for row, kind in enumerate(rows.tensors[0]) if kind == HEAVY]
    light = [row for row, kind in enumerate(rows.tensors[0]) if kind != HEAVY]
    check = company.CompanyCheck(
        module=module,
        parameters=parameters,
        loss_of=loss_of,
        layouts=learn(module, parameters, loss_of, heavy[0]),
        negligible=1e-3 * settings.clip_norm,
    )
    for signs in ((1.0, -1.0, 1.0, -1.0), (1.0, 1.0, -1.0, -1.0), (1.0, -1.0, -1.0, 1.0)):
        for chosen in (heavy[:4], [*heavy[:2], *light[:2]], [*heavy[:3], light[0]]):
            own = functools.partial(next, itertools.cycle(signs))
            monkeypatch.setattr(company.secrets, "choice", lambda _both, own=own: own())
            check.run(chosen)


def test_rows_of_which_each_is_just_finite_hide_no_coupling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their squared norms are finite in float32, and the sum of these is not."""
    monkeypatch.setattr(company.secrets, "choice", lambda _both: 1.0)
    layer = nn.Linear(1, 1, bias=False)

    def loss_of(rows: Sequence[int]) -> Tensor:
        x = torch.full((len(rows), 1), 1.5e19)
        return (layer(x) * (1 + len(rows) / 100)).sum()

    check = company.CompanyCheck(
        module=layer,
        parameters=dict(layer.named_parameters()),
        loss_of=loss_of,
        layouts=Layouts(),
        loss_reduction="sum",
    )
    with pytest.raises(GuaranteeError, match="8 rows together differ"):
        check.run(list(range(8)))
