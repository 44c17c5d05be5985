"""Random configurations of a private fit: sensible ones, with a wrong or odd value now and then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

WRONG = st.sampled_from([0, -1, -0.5, float("nan"), float("inf"), True, "8", 2**70, 1e300, 1e-300])


@dataclass
class Configuration:
    """What a user might write.

    Attributes:
        privacy: Arguments of the callback.
        trainer: Arguments of the trainer.
        rows: Length of the data set.
        loader: Arguments of the loader.
        module: What `Small` is made of.
    """

    privacy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    rows: int = 30
    loader: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


def rarely(draw: st.DrawFn, one_in: int = 20) -> bool:
    return draw(st.integers(1, one_in)) == one_in


@st.composite
def budgets(draw: st.DrawFn, *, calibrated: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"delta": draw(st.sampled_from([1e-3, 1e-5, 1e-6, 1e-10]))}
    kind = draw(st.sampled_from(["noise", "both", "budget"] if calibrated else ["noise"]))
    if kind != "budget":
        settings["noise_multiplier"] = draw(st.sampled_from([0.3, 0.7, 1.0, 2.5, 30.0]))
    if kind != "noise":
        settings["epsilon"] = draw(st.sampled_from([0.5, 3.0, 8.0]))
    settings["clip_norm"] = draw(st.sampled_from([1e-3, 0.5, 1.0, 50.0]))
    settings["accountant"] = draw(st.sampled_from(["pld", "pld", "rdp"]))
    if rarely(draw):
        name = draw(st.sampled_from(["delta", "noise_multiplier", "epsilon", "clip_norm"]))
        settings[name] = draw(WRONG)
    return settings


@st.composite
def samplings(draw: st.DrawFn, rows: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if draw(st.booleans()):
        settings["expected_batch_size"] = draw(st.sampled_from([1, 2, 4, 7, rows, rows + 5]))
    if draw(st.booleans()):
        settings["dataset_size"] = draw(st.sampled_from([rows, rows + 3, 100, 1]))
    if draw(st.integers(1, 4)) == 1:
        settings["sample_rate"] = draw(st.sampled_from([0.01, 0.1, 0.37, 1.0, 1.5]))
    if rarely(draw):
        name = draw(st.sampled_from(["expected_batch_size", "dataset_size", "sample_rate"]))
        settings[name] = draw(WRONG)
    return settings


@st.composite
def choices(draw: st.DrawFn, rows: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"print_table": False}
    if draw(st.booleans()):
        kinds = ["flat", "per_layer", "automatic"]
        settings["clipping"] = draw(st.sampled_from([*kinds, *kinds, "none"]))
    settings["loss_reduction"] = draw(st.sampled_from(["mean", "mean", "sum"]))
    if draw(st.integers(1, 3)) == 1:
        settings["unit"] = draw(st.sampled_from([*["user"] * 5, "example", "household"]))
        settings["users"] = [row // draw(st.integers(1, 4)) for row in range(rows)]
        settings["group_size"] = draw(st.sampled_from([1, 2, 5, None]))
        settings["user_sampling"] = draw(st.sampled_from([None, "users", "examples"]))
        if rarely(draw, 5):
            settings["user_update"] = "local_steps"
            settings["local_learning_rate"] = draw(st.sampled_from([None, 0.1, -1.0]))
    if rarely(draw, 8):
        settings["test_seed"] = draw(st.sampled_from([0, 7, 2**80, -1, 1.5]))
    if rarely(draw, 8):
        settings["releases_per_draw"] = draw(st.sampled_from([1, 2, 0]))
    if rarely(draw, 8):
        settings["journal"] = False
    return settings


@st.composite
def trainers(draw: st.DrawFn) -> dict[str, Any]:
    options: dict[str, Any] = {
        "precision": draw(st.sampled_from(["32-true", "32-true", "64-true", "bf16-mixed"]))
    }
    if draw(st.booleans()):
        options["max_steps"] = draw(st.sampled_from([1, 2, 3]))
    else:
        options["max_epochs"] = 1
        options["limit_train_batches"] = draw(st.sampled_from([1, 3, 0.05, 0.1]))
    odd: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "overfit_batches": 1,
        "precision": "16-mixed",
        "min_steps": 2,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "detect_anomaly": True,
        "reload_dataloaders_every_n_epochs": 1,
    }
    if rarely(draw, 6):
        name = draw(st.sampled_from(sorted(odd)))
        options[name] = odd[name]
    return options


MIXING = {"batch norm", "mean of the batch"}


@st.composite
def configurations(draw: st.DrawFn, *, calibrated: bool = False) -> Configuration:
    rows = draw(st.sampled_from([1, 2, 5, 12, 30, 40, 64, 64]))
    loader: dict[str, Any] = {"batch_size": draw(st.sampled_from([1, 2, 4, 16, 100]))}
    if draw(st.integers(1, 4)) == 1:
        loader[draw(st.sampled_from(["shuffle", "drop_last"]))] = True
    # What is always refused is drawn less often, or few configurations would train.
    parts = [name for name in sorted(Small.PARTS) for _ in range(1 if name in MIXING else 2)]
    optimizers = [name for name in sorted(Small.OPTIMIZERS) for _ in range(1 + (name != "lbfgs"))]
    module = {
        "parts": draw(st.lists(st.sampled_from(parts), min_size=0, max_size=3)),
        "optimizer": draw(st.sampled_from(optimizers)),
        "manual": draw(st.integers(1, 6)) == 1,
        "frozen": draw(st.integers(1, 6)) == 1,
        "tied": draw(st.integers(1, 6)) == 1,
    }
    privacy = {
        **draw(budgets(calibrated=calibrated)),
        **draw(samplings(rows)),
        **draw(choices(rows)),
    }
    return Configuration(privacy, draw(trainers()), rows, loader, module)


class Small(pl.LightningModule):
    """A few layers of width 4 on single examples, whose loss keeps or breaks the contract."""

    PARTS: ClassVar[dict[str, Any]] = {
        "linear": lambda: nn.Linear(4, 4),
        "layer norm": lambda: nn.LayerNorm(4),
        "group norm": lambda: nn.Sequential(
            nn.Unflatten(1, (4, 1)), nn.GroupNorm(2, 4), nn.Flatten()
        ),
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 2, padding="same"), nn.Flatten()
        ),
        "dropout": lambda: nn.Dropout(0.5),
        "attention": lambda: _Attention(),
        "scale": lambda: _Scale(),
        "batch norm": lambda: nn.BatchNorm1d(4),
        "mean of the batch": lambda: _Centred(),
    }
    OPTIMIZERS: ClassVar[dict[str, Any]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "lbfgs": lambda p: torch.optim.LBFGS(p),
    }

    def __init__(
        self,
        parts: list[str],
        optimizer: str,
        manual: bool,
        frozen: bool,
        tied: bool,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        made = [self.PARTS[name]() for name in parts]
        self.first, self.body, self.last = nn.Linear(4, 4), nn.Sequential(*made), nn.Linear(4, 1)
        if tied:
            made.append(self.first)
            self.body = nn.Sequential(*made)
        if frozen:
            self.first.requires_grad_(False)
        self.optimizer, self.reduction = optimizer, reduction

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.to(self.last.weight.dtype)
        output = self.last(self.body(self.first(x).tanh())).squeeze(1)
        loss = F.mse_loss(output, y.to(output.dtype), reduction=self.reduction)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return self.OPTIMIZERS[self.optimizer](self.parameters())


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 2))
        return (x + self.attention(x, x, x)[0]).flatten(1)


class _Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def loader_of(configuration: Configuration) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(configuration.rows, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1)), **configuration.loader)
