"""Tiny modules, data and trainers for tests of private fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy.callbacks import DifferentialPrivacy
from lightning_privacy.noise import secret_from_seed
from lightning_privacy.sampling import PoissonSampler

if TYPE_CHECKING:
    from pathlib import Path

# What Lightning says of any small training; nothing of it is about privacy.
LIGHTNING_NOISE = [
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.*",
    # A resume in these tests need not save checkpoints itself.
    "ignore:Be aware that when using `ckpt_path`",
]

ROWS, FEATURES, BATCH = 40, 3, 4
SEED = 11


def data(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=dtype)
    return TensorDataset(x, x.sum(1, keepdim=True) + 1)


def loader(rows: int = ROWS, **options: Any) -> DataLoader:
    return DataLoader(data(rows), batch_size=options.pop("batch_size", BATCH), **options)


def network(seed: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))


class Regression(pl.LightningModule):
    """An ordinary module that knows nothing of privacy."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.net = network()
        self.lr = lr
        self.calls: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(len(batch[0]))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def privacy(**settings: Any) -> DifferentialPrivacy:
    """A callback in deterministic test mode, with noise, unless told otherwise."""
    settings.setdefault("delta", 1e-5)
    if "epsilon" not in settings:
        settings.setdefault("noise_multiplier", 0.7)
    settings.setdefault("test_seed", SEED)
    settings.setdefault("print_table", False)
    return DifferentialPrivacy(**settings)


def trainer(directory: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "default_root_dir": directory,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def sampler(rows: int = ROWS, expected: float = BATCH, seed: int = SEED) -> PoissonSampler:
    """The draws of a callback in deterministic test mode."""
    return PoissonSampler(size=rows, sample_rate=expected / rows, secret=secret_from_seed(seed))


def reference(
    steps: int, *, clip_norm: float = 1.0, lr: float = 0.1, expected: float = BATCH
) -> dict[str, Tensor]:
    """Weights after noiseless private steps with plain SGD, one example at a time."""
    module, draws, rows = Regression(), sampler(expected=expected), data()
    for cursor in range(steps):
        total = [torch.zeros_like(p) for p in module.parameters()]
        for index in np.asarray(draws.draw(cursor)).tolist():
            example = [part[None] for part in rows[index]]
            gradients = torch.autograd.grad(module.loss(example), list(module.parameters()))
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            factor = min(1.0, clip_norm / float(norm))
            total = [part + factor * g for part, g in zip(total, gradients, strict=True)]
        with torch.no_grad():
            for parameter, part in zip(module.parameters(), total, strict=True):
                parameter.sub_(lr * part / expected)
    return weights(module)
