"""What a private fit refuses, before any training step, and in four sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchmetrics import MeanSquaredError

from lightning_privacy import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    PrivacyError,
    UnsupportedOperationError,
)
from lightning_privacy.callbacks import DifferentialPrivacy
from tests.callbacks.training import LIGHTNING_NOISE, Regression, data, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


def refused(
    directory: Path,
    *,
    module: pl.LightningModule | None = None,
    data: Any = None,
    callback: DifferentialPrivacy | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> PrivacyError:
    """Run a fit that must not take a step, and return its error."""
    module = Regression() if module is None else module
    before = [p.detach().clone() for p in module.parameters()]
    fit = trainer(directory, callback or privacy(), *callbacks, **options)
    with pytest.raises(PrivacyError) as caught:
        fit.fit(module, loader() if data is None else data)
    assert fit.global_step == 0
    for parameter, value in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert type(parameter) is nn.Parameter
    error = caught.value
    assert all((error.must, error.found, error.cost, error.remedy))
    return error


# ---------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("arguments", "must"),
    [
        ({}, "the budget or the noise is given"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": True}, "epsilon"),
        ({"epsilon": "8"}, "epsilon"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"epsilon": 1.0, "clip_norm": 0.0}, "clip_norm"),
        ({"epsilon": 1.0, "clip_norm": 1e-30}, "clip_norm"),
        ({"epsilon": 1.0, "clip_norm": float("inf")}, "clip_norm"),
        ({"epsilon": 1.0, "sample_rate": 1.5}, "sample_rate"),
        ({"epsilon": 1.0, "expected_batch_size": 0}, "expected_batch_size"),
        ({"epsilon": 1.0, "expected_batch_size": 2.5}, "expected_batch_size"),
        ({"epsilon": 1.0, "dataset_size": -3}, "dataset_size"),
        ({"epsilon": 1.0, "releases_per_draw": 0}, "releases_per_draw"),
        ({"epsilon": 1.0, "test_seed": -1}, "test_seed"),
        ({"epsilon": 1.0, "clipping": "flatt"}, "clipping"),
        ({"epsilon": 1.0, "accountant": "gdp"}, "accountant"),
        ({"epsilon": 1.0, "loss_reduction": "none"}, "loss_reduction"),
        ({"epsilon": 1.0, "unit": "household"}, "unit"),
        ({"epsilon": 1.0, "unit": "user", "tiers": {"gold": 8.0}}, "`tiers` is a TierPolicy"),
        ({"epsilon": 1.0, "ledger": "spent.sqlite"}, "`ledger` is a PrivacyLedger"),
        ({"epsilon": 1.0, "independent_buffers": "net.*"}, "`independent_buffers` is a list"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], must: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DifferentialPrivacy(**{"delta": 1e-5, **arguments})
    assert must in caught.value.must


def test_a_misspelt_unit_is_not_sent_to_the_weaker_promise() -> None:
    with pytest.raises(ConfigurationError) as caught:
        DifferentialPrivacy(epsilon=1.0, delta=1e-5, unit="users")
    assert 'use "user"' in caught.value.remedy


USERS: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "unit": "user"}


@pytest.mark.parametrize(
    ("arguments", "must"),
    [
        ({"group_size": 4}, "with unit='user' the rate or the expected batch is given"),
        ({"expected_batch_size": 4}, "`group_size` must be a whole number >= 1"),
        ({"expected_batch_size": 4, "group_size": 0}, "`group_size` must be"),
        (
            {"expected_batch_size": 4, "group_size": 1, "user_sampling": "both"},
            "`user_sampling` must be one of 'users', 'examples'",
        ),
        ({"unit": "example", "group_size": 4}, "go with unit='user'"),
        ({"unit": "example", "users": "who"}, "go with unit='user'"),
        ({"unit": "example", "user_sampling": "users"}, "go with unit='user'"),
    ],
)
def test_settings_for_users_belong_together(arguments: dict[str, Any], must: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DifferentialPrivacy(**{**USERS, **arguments})
    assert must in caught.value.must


# ---------------------------------------------------------------------- the trainer
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (
            {"callbacks": (GradientAccumulationScheduler({3: 4}),)},
            "accumulate_grad_batches=4",
        ),
        ({"overfit_batches": 2}, "overfit_batches=2"),
        ({"precision": "16-true"}, "16-true"),
        ({"callbacks": (LearningRateFinder(),)}, "LearningRateFinder"),
        ({"max_epochs": -1}, "neither max_steps nor max_epochs"),
        ({"strategy": "private", "devices": 2}, "devices=2"),
    ],
)
def test_settings_of_the_trainer(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    assert found in refused(tmp_path, **options).found


class OfItsOwnPrecision(Regression):
    """In bfloat16 whatever the trainer is set to: by its weights, or by autocast."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "autocast":
            self.net.to(getattr(torch, kind))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.kind == "autocast"):
            output = self.net(x.to(self.net[0].weight.dtype)[:, None].expand(-1, 8, -1)).mean(1)
        return F.mse_loss(output.float(), y)


def test_weights_of_low_precision_are_accounted_as_such(tmp_path: Path) -> None:
    """Their gradients may exceed the clip norm by 0.7 %, where 0.01 % was accounted."""
    callback = privacy()
    trainer(tmp_path, callback).fit(OfItsOwnPrecision("bfloat16"), loader())
    assert callback.plan is not None
    assert callback.plan.precision_slack == 2e-2


@pytest.mark.parametrize(
    ("kind", "found"), [("autocast", "gradients in torch.bfloat16"), ("float16", "torch.float16")]
)
def test_a_precision_that_is_not_accounted(tmp_path: Path, kind: str, found: str) -> None:
    callback = privacy()
    with pytest.raises(PrivacyError) as caught:
        trainer(tmp_path, callback).fit(OfItsOwnPrecision(kind), loader())
    assert found in caught.value.found
    assert callback.steps == 0


def test_a_gradient_scaler(tmp_path: Path) -> None:
    class Scaled(MixedPrecision):
        def __init__(self) -> None:
            super().__init__("bf16-mixed", "cpu")
            self.precision = "16-mixed"
            self.scaler = torch.amp.GradScaler("cpu")

    error = refused(tmp_path, plugins=[Scaled()])
    assert "skips steps" in error.found


def test_accumulation_that_starts_later(tmp_path: Path) -> None:
    class Later(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.accumulate_grad_batches = 1 + (trainer.global_step >= 2)

    fit = trainer(tmp_path, privacy(), Later())
    with pytest.raises(UnsupportedOperationError, match="accumulate_grad_batches=2"):
        fit.fit(Regression(), loader())
    assert fit.global_step == 2


def test_two_callbacks(tmp_path: Path) -> None:
    class Second(Regression):
        def configure_callbacks(self) -> Any:
            class Other(DifferentialPrivacy):
                pass

            # Lightning drops a callback that a subclass replaces, but not its subclass.
            return [Other(delta=1e-5, noise_multiplier=1.0), privacy()]

    assert "2 of them" in refused(tmp_path, module=Second()).found


def test_gradient_clipping_after_the_noise_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="acts on the gradient after noise"):
        trainer(tmp_path, privacy(), gradient_clip_val=0.1).fit(Regression(), loader())


@pytest.mark.parametrize("name", ["min_steps", "min_epochs"])
def test_a_minimum_beyond_the_budget(tmp_path: Path, name: str) -> None:
    callback = privacy(epsilon=2.0, noise_multiplier=2.0)
    least = {"min_steps": 1000} if name == "min_steps" else {"min_epochs": 100}
    fit = trainer(tmp_path, callback, max_epochs=200, **least)
    with pytest.raises(BudgetExceededError, match="fit the budget"):
        fit.fit(Regression(), loader())


# ---------------------------------------------------------------------- data
class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: DataLoader(Stream(), batch_size=2), "IterableDataset"),
        (lambda: DataLoader(data(), batch_size=None), "batch_size=None"),
        (
            lambda: DataLoader(data(), sampler=WeightedRandomSampler([1.0] * 40, 40), batch_size=2),
            "WeightedRandomSampler",
        ),
        (
            lambda: DataLoader(
                data(),
                batch_sampler=type("Own", (BatchSampler,), {})(
                    SequentialSampler(data()), 2, drop_last=False
                ),
            ),
            "batch sampler Own",
        ),
        (lambda: [data()[0]], "a Tensor"),
        (lambda: [loader(), loader()], "several"),
        (lambda: {"a": loader(), "b": loader()}, "several"),
        (lambda: CombinedLoader([loader()], "min_size"), "instead"),
    ],
)
def test_loaders(tmp_path: Path, make: Callable[[], Any], found: str) -> None:
    assert found in refused(tmp_path, data=make()).found


def test_a_batch_larger_than_the_data_set(tmp_path: Path) -> None:
    assert "41" in refused(tmp_path, callback=privacy(expected_batch_size=41)).found


# ---------------------------------------------------------------------- the module
class Streaming(Regression):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


class Lbfgs(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Foreign(Regression):
    def configure_optimizers(self) -> Any:
        self.hidden = [nn.Linear(2, 2)]
        return torch.optim.SGD([*self.parameters(), *self.hidden[0].parameters()], lr=0.1)


class Frozen(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class PersistentMetric(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.error.persistent(mode=True)


class OneForEachRow(Regression):
    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square()


class TokenMean(Regression):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().sum() / (x[:, 0] > 1).sum().clamp(min=1)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Streaming, "dataloader_iter"),
        (Lbfgs, "LBFGS"),
        (Foreign, "holds 2 others"),
        (Frozen, "none"),
        (PersistentMetric, "error.sum_squared_error"),
        (TokenMean, "net."),
        (OneForEachRow, "a loss of shape ("),
    ],
)
def test_modules(tmp_path: Path, module: type[Regression], found: str) -> None:
    assert found in refused(tmp_path, module=module()).found


def test_a_declared_metric_passes(tmp_path: Path) -> None:
    callback = privacy(independent_buffers=["error.*"])
    trainer(tmp_path, callback).fit(PersistentMetric(), loader())
    assert callback.steps == 10


def test_parameters_in_no_optimizer_warn(tmp_path: Path) -> None:
    class Half(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    callback = privacy()
    with pytest.warns(UserWarning, match="2 trainable parameters are in no optimizer"):
        trainer(tmp_path, callback).fit(Half(), loader())
    assert callback.steps == 10


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


class Never(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step()


@pytest.mark.parametrize(
    ("optimizer", "found"), [(Twice, "evaluates it again"), (Never, "step did not")]
)
def test_closures(tmp_path: Path, optimizer: type[torch.optim.SGD], found: str) -> None:
    class Odd(Regression):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=0.1)

    assert found in refused(tmp_path, module=Odd()).found


def test_steps_that_are_left_out_warn(tmp_path: Path) -> None:
    class EverySecond(Regression):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    callback = privacy()
    with pytest.warns(UserWarning, match="never followed by an optimizer step"):
        trainer(tmp_path, callback).fit(EverySecond(), loader())
    assert callback.steps == 5


# ---------------------------------------------------------------------- while training
def test_a_parameter_that_is_unfrozen_later(tmp_path: Path) -> None:
    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer)

    class Filtered(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    fit = trainer(tmp_path, privacy(), Unfreezing(), max_epochs=2)
    with pytest.raises(GuaranteeError, match=r"became trainable .* net\.0\.weight, net\.0\.bias"):
        fit.fit(Filtered(), loader())
    assert fit.global_step == 10


def test_a_layer_that_is_replaced_later(tmp_path: Path) -> None:
    class Replacing(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.net[0] = torch.nn.Linear(3, 5)

    fit = trainer(tmp_path, privacy(), max_epochs=1)
    with pytest.raises(GuaranteeError, match=r"became trainable .* net\.0\.weight, net\.0\.bias"):
        fit.fit(Replacing(), loader())
    assert fit.global_step == 3


def test_a_parameter_that_is_added_later(tmp_path: Path) -> None:
    class Growing(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.extra = nn.Linear(1, 1)

    fit = trainer(tmp_path, privacy())
    with pytest.raises(GuaranteeError, match=r"extra\.weight"):
        fit.fit(Growing(), loader())
    assert fit.global_step == 3


def test_a_parameter_that_an_optimizer_gets_later(tmp_path: Path) -> None:
    class Adding(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.optimizers[0].add_param_group({"params": nn.Parameter(torch.ones(2))})

    fit = trainer(tmp_path, privacy(), Adding())
    with pytest.raises(GuaranteeError, match="holds only parameters that the private step covers"):
        fit.fit(Regression(), loader())
    assert fit.global_step == 3


@pytest.mark.parametrize("declared", [True, False])
def test_buffers_that_a_forward_writes(tmp_path: Path, declared: bool) -> None:
    class Averaging(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.average.lerp_(batch[0].mean(0), 0.1)
            return super().training_step(batch, batch_idx)

    callback = privacy(independent_buffers=["average"] if declared else [])
    fit = trainer(tmp_path, callback)
    if declared:
        fit.fit(Averaging(), loader())
        return
    with pytest.raises(GuaranteeError, match="average"):
        fit.fit(Averaging(), loader())
    assert callback.steps == 0


@pytest.mark.parametrize("declared", [False, True])
def test_averages_of_the_weights_that_a_module_keeps(tmp_path: Path, declared: bool) -> None:
    class Averaging(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.ema = AveragedModel(self.net).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            self.ema.update_parameters(self.net)

    fit = trainer(tmp_path, privacy(independent_buffers=["ema.*"] if declared else []))
    if declared:
        fit.fit(Averaging(), loader())
        return
    with pytest.raises(GuaranteeError, match=r"ema\.n_averaged") as caught:
        fit.fit(Averaging(), loader())
    assert "EMAWeightAveraging" in caught.value.remedy
    assert '"ema.*"' in caught.value.remedy


def test_parameters_without_a_shape(tmp_path: Path) -> None:
    module = Regression()
    module.net[0] = nn.LazyLinear(module.net[0].out_features)
    fit = trainer(tmp_path, privacy())
    with pytest.raises(ConfigurationError, match=r"lazy parameters: net\.0\.weight, net\.0\.bias"):
        fit.fit(module, loader())


def test_parameters_that_a_forward_writes(tmp_path: Path) -> None:
    class Writing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[2].bias.data.copy_(batch[1].mean(0))
            return super().training_step(batch, batch_idx)

    with pytest.raises(GuaranteeError, match=r"net\.2\.bias"):
        trainer(tmp_path, privacy(independence_check=False)).fit(Writing(), loader())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_step_without_a_loss_still_releases_noise(tmp_path: Path, share: float) -> None:
    class Sometimes(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx < 10 * share:
                return None
            return super().training_step(batch, batch_idx)

    module, callback = Sometimes(), privacy()
    before = module.net[0].weight.detach().clone()
    fit = trainer(tmp_path, callback)
    fit.fit(module, loader())
    assert callback.steps == fit.global_step == 10
    assert not torch.equal(module.net[0].weight, before)


def test_an_empty_draw_still_releases_noise(tmp_path: Path) -> None:
    callback = privacy(sample_rate=0.01, expected_batch_size=1)
    module = Regression()
    seen: list[Tensor] = []

    class Seen(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append(module.net[0].weight.grad.clone())

    fit = trainer(tmp_path, callback, Seen(), max_steps=30, max_epochs=None)
    fit.fit(module, loader())
    assert callback.steps == 30
    assert all(float(gradient.norm()) > 0 for gradient in seen)


# ---------------------------------------------------------------------- without the callback
def test_a_private_strategy_without_the_callback(tmp_path: Path) -> None:
    fit = trainer(tmp_path, strategy="private")
    with pytest.raises(ConfigurationError, match="no DifferentialPrivacy"):
        fit.fit(Regression(), loader())
    fit.validate(Regression(), loader(), verbose=False)


def test_a_folder_of_shards_where_a_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "step=3.ckpt"
    folder.mkdir()
    made = trainer(tmp_path, privacy())
    with pytest.raises(UnsupportedOperationError, match='strategy="private_fsdp"'):
        made.fit(Regression(), loader(), ckpt_path=folder)


def test_a_callback_that_was_taken_away(tmp_path: Path) -> None:
    callback = privacy()
    fit = trainer(tmp_path, callback)
    fit.fit(Regression(), loader())
    fit.callbacks.remove(callback)
    with pytest.raises(ConfigurationError, match="no DifferentialPrivacy"):
        fit.fit(Regression(), loader())


def test_a_strategy_given_as_an_object(tmp_path: Path) -> None:
    callback = privacy()
    fit = trainer(tmp_path, callback, strategy=SingleDeviceStrategy("cpu"), accelerator="auto")
    fit.fit(Regression(), loader())
    assert callback.steps == 10


def test_a_share_of_an_epoch_that_leaves_no_step(tmp_path: Path) -> None:
    error = refused(tmp_path, limit_train_batches=0.05)
    assert "limit_train_batches=0.05 of 10 private steps" in error.found
