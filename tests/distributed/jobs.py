"""What the ranks do in these tests; each function runs in every rank, and alone in the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_privacy.accounting import PrivacyLedger
from lightning_privacy.callbacks import DifferentialPrivacy
from lightning_privacy.noise import GaussianNoise, GridNoise
from lightning_privacy.tiers import PublicTiers, TierPolicy
from tests.callbacks.training import BATCH, FEATURES, Regression, data, privacy, trainer, weights

ROWS = 40
# Users of very different sizes: one does not fit into a micro-batch.
USERS = [0] * 9 + [1] * 4 + [2] * 4 + list(range(3, 26))
Weights = dict[str, list]


def loader(rows: int = ROWS, batch_size: int = 3) -> DataLoader:
    return DataLoader(data(rows, torch.float64), batch_size=batch_size)


def plain(module: nn.Module) -> Weights:
    return {name: value.tolist() for name, value in weights(module).items()}


def strategy_for(rank_count: int) -> dict[str, Any]:
    if rank_count == 1:
        return {"strategy": "private", "devices": 1}
    return {"strategy": "private_ddp", "devices": rank_count}


def fit(
    directory: str,
    ranks: int = 2,
    settings: dict[str, Any] | None = None,
    module: pl.LightningModule | None = None,
    batches: DataLoader | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> tuple[pl.Trainer, pl.LightningModule, DifferentialPrivacy]:
    """One private fit in float64, without noise unless the settings have some."""
    silent = {"noise_multiplier": 0.0, "expected_batch_size": 2 * BATCH}
    callback = privacy(**{**silent, **(settings or {})})
    path, val = options.pop("ckpt_path", None), options.pop("val", None)
    options = {"precision": "64-true", **strategy_for(ranks), **options}
    made = trainer(Path(directory), callback, *callbacks, **options)
    module = Regression() if module is None else module
    if options["precision"] == "64-true":
        module.double()  # or a checkpoint would be read in float32
    made.fit(module, loader() if batches is None else batches, val, ckpt_path=path)
    return made, module, callback


def weights_after(directory: str, ranks: int, settings: dict) -> Weights:
    return plain(fit(directory, ranks, settings)[1])


def of_users(directory: str, ranks: int, settings: dict) -> Weights:
    settings = {
        "unit": "user", "group_size": 9, "users": USERS, "expected_batch_size": 6, **settings,
    }  # fmt: skip
    return weights_after(directory, ranks, settings)


def of_tiers(directory: str, ranks: int) -> Weights:
    """Tiers are calibrated, and so have noise, which is left out here."""
    policy = TierPolicy(
        segmentation=PublicTiers(lambda user: "strict" if user % 2 else "loose"),
        targets={"strict": 2.0, "loose": 8.0},
        shares={"strict": 0.5, "loose": 0.5},
        method="scale",
    )
    settings = {"epsilon": None, "noise_multiplier": None, "tiers": policy}
    ordinary = GaussianNoise.add_
    GaussianNoise.add_ = lambda self, tensor, *_: tensor
    try:
        return of_users(directory, ranks, settings)
    finally:
        GaussianNoise.add_ = ordinary


class Manual(Regression):
    """Two optimizers, stepped by hand on one draw."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


def by_hand(directory: str, ranks: int) -> Weights:
    return plain(fit(directory, ranks, module=Manual())[1])


class Still(pl.LightningModule):
    """A module without gradient: what its parameters become is noise."""

    def __init__(self, width: int = 120) -> None:
        super().__init__()
        self.large = nn.Linear(width, width)
        self.small = nn.Linear(FEATURES, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * self.large(self.small(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def noise(directory: str, ranks: int, steps: int, settings: dict) -> dict[str, Any]:
    """The noise of the world in units of sigma C; and this rank's share before the sum."""
    shares: list[Tensor] = []
    ordinary = torch.distributed.all_reduce

    def spy(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        shares.append(tensor.clone())
        return ordinary(tensor, *arguments, **named)

    torch.distributed.all_reduce = spy
    sigma, expected = 0.7, 8
    loud = {"noise_multiplier": sigma, "expected_batch_size": expected, "test_seed": None}
    settings = {**loud, **settings}
    try:
        _, module, callback = fit(
            directory,
            ranks,
            settings,
            Still(),
            max_steps=steps,
            max_epochs=-1,
            precision="32-true",
            batches=DataLoader(data(ROWS), batch_size=3),
        )
    finally:
        torch.distributed.all_reduce = ordinary
    unit = sigma * callback.plan.clip_norm / expected
    total = torch.cat([p.detach().flatten() for p in module.parameters()])
    parts = [share.flatten() for share in shares if share.numel() > 16]
    return {
        "world": (total / unit).tolist(),
        "share": (torch.cat(parts) / unit).tolist() if parts else [],
        "on_grid": on_grid(parts, unit, callback) if settings.get("secure_rounding") else None,
        "epsilon": callback.epsilon(),
        "secret": callback._secret.hex(),
        "noise_secret": callback._noise_secret.hex(),
    }


def on_grid(parts: list[Tensor], unit: float, callback: DifferentialPrivacy) -> bool:
    """Whether what a rank sends lies on the grid of all ranks."""
    sigma, size = callback.plan.noise_multiplier, sum(map(len, parts))
    grid = GridNoise(GaussianNoise(bytes(32)), noise_multiplier=sigma, dimension=size, parts=2)
    step = grid.step(unit / 2**0.5)
    return all(torch.equal((part / step).round() * step, part) for part in parts)


class WrongOnOneRank(Regression):
    """Fails on one rank only, at one step, in one of several ways."""

    def __init__(self, rank: int, step: int, way: str) -> None:
        super().__init__()
        self.rank, self.step, self.way = rank, step, way

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        here = self.global_rank == self.rank and self.global_step == self.step
        if here and self.way == "error":
            raise OSError("no such record")
        loss = super().training_step(batch, batch_idx)
        if here and self.way == "leak":
            torch.autograd.grad(loss, self.net[0].weight)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == self.rank and self.global_step == self.step and self.way == "hook":
            raise OSError("no such hook")


def error_of(directory: str, rank: int, step: int, way: str) -> tuple[str, str, int]:
    module = WrongOnOneRank(rank, step, way)
    try:
        fit(directory, 2, {"independence_check": False}, module)
    except Exception as error:  # noqa: BLE001 - this is what the test looks at
        return type(error).__name__, str(error), module.global_step
    return "", "", module.global_step


def data_of_two_lengths(directory: str, rank: int = 1) -> str:
    rows = ROWS - 1 if torch.distributed.get_rank() == rank else ROWS
    try:
        fit(directory, batches=loader(rows))
    except Exception as error:  # noqa: BLE001
        return str(error)
    return ""


class Gathering(Regression):
    """Compares each rank's rows with those of the others, as a contrastive loss does."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean = self.all_gather(self.net(batch[0]).mean()).mean()
        return super().training_step(batch, batch_idx) + mean


class Different(Regression):
    """Changes a frozen parameter on one rank, after the replicas were made equal."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(3), requires_grad=False)

    def on_train_start(self) -> None:
        self.base.data.add_(self.global_rank)


class Frozen(Regression):
    """Trains other parameters on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].bias.requires_grad_(torch.distributed.get_rank() == 0)


def refusal(directory: str, kind: str) -> str:
    module = {"gathering": Gathering, "different": Different, "frozen": Frozen}[kind]()
    try:
        fit(directory, module=module)
    except Exception as error:  # noqa: BLE001
        return str(error)
    return ""


class Weighed(Regression):
    """Starts from other weights on each rank, and logs over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for parameter in self.parameters():
            parameter.data.add_(rank)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


def logged(directory: str, ranks: int) -> dict[str, Any]:
    made, module, callback = fit(
        directory, ranks, {"noise_multiplier": 1e-3}, Weighed(), log_every_n_steps=1,
        batches=loader(batch_size=64), max_epochs=1,
    )  # fmt: skip
    metrics = {name: float(value) for name, value in made.callback_metrics.items()}
    summary = callback.summary()
    wrapped = type(made.model).__name__
    return {
        **metrics, "share": summary.clipped_share, "steps": summary.steps, "model": wrapped,
        "weights": plain(module),
    }  # fmt: skip


def resumed(directory: str, ranks: int, path: str | None, settings: dict, steps: int) -> dict:
    saving = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    _, module, callback = fit(
        directory, ranks, settings, callbacks=(saving,), max_steps=steps, max_epochs=-1,
        ckpt_path=path,
    )  # fmt: skip
    return {
        "weights": plain(module), "steps": callback.steps, "epsilon": callback.epsilon(),
        "journals": sorted(p.name for p in Path(directory).glob("*.jsonl")),
        "run": callback._state.run, "cursor": callback._state.cursor,
        "journal": callback._state.journal is not None,
    }  # fmt: skip


def small_draws(directory: str, ranks: int) -> dict[str, Any]:
    """Draws of half a unit on average: most ranks have none, many draws are empty."""
    module = Regression()
    fit(directory, ranks, {"expected_batch_size": 1, "clipping": "per_layer"}, module)
    return {"weights": plain(module), "calls": len(module.calls)}


def with_ledger(directory: str) -> dict[str, Any]:
    """Two epochs with validation, a ledger and a journal."""
    book = PrivacyLedger(Path(directory) / "ledger.db", dataset="rows", budget=(50.0, 1e-5))
    reserved, ordinary = [], book.reserve

    def reserve(*arguments: Any, **named: Any) -> Any:
        reserved.append(1)
        return ordinary(*arguments, **named)

    book.reserve = reserve
    settings = {"noise_multiplier": 1.0, "test_seed": None, "ledger": book}
    made, module, callback = fit(
        directory, 2, settings, max_epochs=2, val=loader(), callbacks=(ModelCheckpoint(directory),)
    )
    return {
        "entries": [(entry.run, sum(r.count for r in entry.releases)) for entry in book.entries()],
        "steps": callback.steps,
        "run": callback._state.run,
        "reserved": len(reserved),
        "loss": float(made.callback_metrics["val_loss"]),
        "shown": callback.summary().validation_loss,
        "weights": plain(module),
    }


def other_default(directory: str, path: str) -> str:
    """A resume where the logical batch follows from the number of processes."""
    try:
        fit(directory, 2, {"expected_batch_size": None}, max_steps=6, max_epochs=-1, ckpt_path=path)
    except Exception as error:  # noqa: BLE001 - this is what the test looks at
        return str(error)
    return ""


def apart(directory: str) -> bool:
    """Processes that know of each other, and train models of their own."""
    _, _, callback = fit(directory, 1, {"test_seed": torch.distributed.get_rank()})
    return callback._world.alone and callback.steps > 0
