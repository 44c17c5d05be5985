"""What the ranks do in the tests of callbacks that measure and report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_privacy.accounting import PrivacyLedger
from lightning_privacy.callbacks import Canaries, LeakageMonitor, PrivacyReport
from lightning_privacy.metrics import MembershipAUROC
from lightning_privacy.models import CausalLanguageModel, PrivacyPreserveNet, SmallDecoder
from lightning_privacy.noise import GaussianNoise
from tests.callbacks.test_canaries import Wide, rows
from tests.callbacks.training import BATCH, ROWS, Regression, data, trainer
from tests.distributed import jobs

NOISY = {"noise_multiplier": 1.0, "test_seed": None}
# Enough for one run of five steps (ε = 3.9), not for two (ε >= 5.0).
BUDGET = 4.5
WORDS = 40
# The coins leave fewer than two in, or out, once in 10**10; of 20 once in 25,000. And so many prove
# at most ε = 2.6, so that no fit with `NOISY` is refuted by chance.
CANARIES = 40


class Watch(pl.Callback):
    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.rows = len(trainer.train_dataloader.dataset)


def found_by(canaries: Canaries) -> dict[str, Any]:
    """What all ranks should agree on."""
    assert canaries.result is not None
    return {
        "member": canaries._member.tolist(),
        "figures": canaries.result.figures.as_dict(),
        "epsilon": canaries.result.epsilon,
        "claimed": canaries.result.claimed,
        "refuted": canaries.result.refuted,
    }


def evaluated(directory: str, task: str, ranks: int = 2) -> dict[str, float]:
    """What a model of the recipes logs of a validation, of which each rank sees a half."""
    torch.manual_seed(0)
    words = torch.randint(1, WORDS, (8, 6))
    labels = words if task == "causal_lm" else words[:, 0] % 2
    batches = [
        {"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)
    ]
    module: pl.LightningModule = CausalLanguageModel(
        vocab_size=WORDS, max_length=8, hidden_size=16, num_layers=1, num_heads=2
    )
    if task == "classification":
        decoder = SmallDecoder(
            vocab_size=WORDS, hidden_size=16, num_layers=1, num_heads=2, num_key_value_heads=1
        )
        module = PrivacyPreserveNet(modalities=["text"], decoder=decoder, num_labels=2)
        for row in batches:
            row["attention_mask"] = torch.ones(6, dtype=torch.long)
    made = trainer(Path(directory), **jobs.strategy_for(ranks))
    loader = DataLoader(batches, batch_size=2)  # type: ignore[arg-type]
    return dict(made.validate(module, loader, verbose=False)[0])


def row_canaries(directory: str, ranks: int = 2, options: dict | None = None) -> dict[str, Any]:
    canaries, watch = Canaries(rows=rows(CANARIES)), Watch()
    # The callback may stand before the private one, or behind it.
    _, module, callback = jobs.fit(
        directory, ranks, NOISY, Regression(), jobs.loader(), (canaries, watch), max_steps=4,
        max_epochs=-1, **(options or {}),
    )  # fmt: skip
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
    return {
        **found_by(canaries), "rows": watch.rows, "rate": callback.plan.sample_rate,
        "weights": {} if sharded else jobs.plain(module),
    }  # fmt: skip


class Pulled(Regression):
    """A gradient along one coordinate, from steep rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        self.released: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) * batch[1]).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.released.append(float(self.net.weight.grad[0, 0]))


def drawn_canaries(directory: str, steps: int) -> dict[str, Any]:
    """How many canaries each step released, in clip norms."""
    steep = [(torch.tensor([50.0, 0, 0]), torch.ones(1)) for _ in range(20)]
    silent = DataLoader(TensorDataset(torch.zeros(ROWS, 3), torch.zeros(ROWS, 1)), batch_size=BATCH)
    canaries, module = Canaries(rows=steep), Pulled()
    settings = {
        "noise_multiplier": 1e-4, "test_seed": None, "sample_rate": 0.5, "clip_norm": 2.0,
        "expected_batch_size": 10, "independence_check": False,
    }  # fmt: skip
    jobs.fit(
        directory, 2, settings, module, silent, (canaries,), max_steps=steps, max_epochs=-1,
        precision="32-true",
    )  # fmt: skip
    return {
        "drawn": [value * 10 / 2.0 for value in module.released],
        "included": int(canaries._member.sum()),
    }


def gradient_canaries(directory: str, sigma: float, steps: int, silent: bool) -> dict[str, Any]:
    """An audit, and how far each release went along each direction."""
    canaries, ordinary = Canaries(kind="gradient", count=100), GaussianNoise.add_
    if silent:
        GaussianNoise.add_ = lambda self, tensor, *_: tensor
    settings = {"noise_multiplier": sigma, "sample_rate": 0.5, "independence_check": False}
    warned: list[Any] = []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            jobs.fit(
                directory, 2, {**NOISY, **settings}, Wide(),
                callbacks=(canaries,), max_steps=steps, max_epochs=-1, precision="32-true",
                batches=DataLoader(data(), batch_size=BATCH),
            )  # fmt: skip
    finally:
        GaussianNoise.add_ = ordinary
    return {
        **found_by(canaries),
        "seen": torch.stack(canaries._gradients._seen).tolist(),
        "warned": sum("the claim is wrong" in str(each.message) for each in warned),
    }


class Words(pl.LightningModule):
    """The next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        scores = self.head(self.table(batch["input_ids"][:, :-1])).transpose(1, 2)
        each = F.cross_entropy(scores, batch["labels"][:, 1:], reduction="none", ignore_index=-100)
        return each.sum(1) / each.shape[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Sentences(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(30, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


def text_canaries(directory: str, ranks: int, kind: str) -> dict[str, Any]:
    new = range(30, WORDS)
    canaries = Canaries(kind=kind, count=CANARIES, tokens=30, new_tokens=new, length=6)
    jobs.fit(
        directory, ranks, NOISY, Words(), DataLoader(Sentences(), batch_size=4), (canaries,),
        max_steps=4, max_epochs=-1, precision="32-true",
    )  # fmt: skip
    texts = [row["input_ids"].tolist() for row in canaries._rows]
    return {**found_by(canaries), "texts": texts}


class Judges(Regression):
    """Logs a torchmetrics class over all ranks, as validation does."""

    def __init__(self) -> None:
        super().__init__()
        self.auroc = MembershipAUROC()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.auroc.update(batch[0][:, 0], batch[1][:, 0] > 1)
        self.log("auroc", self.auroc, on_epoch=True)


def measured(directory: str, ranks: int, settings: dict, **options: Any) -> dict[str, Any]:
    """Two epochs with monitor and report, and with noise a ledger; what each rank knows then."""
    folder = Path(directory)
    if settings["noise_multiplier"]:
        book = PrivacyLedger(folder / "ledger.db", dataset="rows", budget=(50.0, 1e-5))
        settings = {**settings, "ledger": book}
    monitor = LeakageMonitor(rows=12)
    report = PrivacyReport(directory=str(folder / "report"))
    module = Judges()
    made, _, callback = jobs.fit(
        directory, ranks, settings, module, val=jobs.loader(36, 3),
        callbacks=(monitor, report), max_epochs=2, log_every_n_steps=2, **options,
    )  # fmt: skip
    written = report.page is not None
    record = json.loads(report.page.with_suffix(".json").read_text()) if written else None
    return {
        "history": [[figures.as_dict() for figures in found] for _, found in monitor.history],
        "logged": float(made.callback_metrics["not_covered_by_epsilon/ratio_auroc"]),
        "auroc": float(made.callback_metrics["auroc"]),
        "page": None if report.page is None else report.page.name,
        "record": record,
        "epsilon": callback.epsilon(),
    }


def failing(directory: str, rank: int) -> dict[str, Any]:
    """One rank fails at step 3, before which nothing is checked, with a ledger and a report."""
    folder = Path(directory)
    book = PrivacyLedger(folder / "ledger.db", dataset="rows", budget=(50.0, 1e-5))
    report = PrivacyReport(directory=str(folder / "report"))
    module = jobs.WrongOnOneRank(rank, 3, "error")
    error = ""
    try:
        jobs.fit(directory, 2, {**NOISY, "ledger": book}, module, callbacks=(report,))
    except Exception as found:  # noqa: BLE001 - this is what the test looks at
        error = type(found).__name__
    return {"error": error, "page": report.page is not None}


def over_budget(directory: str) -> dict[str, Any]:
    """A first run fits into the budget, a second one does not."""
    book = PrivacyLedger(Path(directory) / "ledger.db", dataset="rows", budget=(BUDGET, 1e-5))
    steps, errors = [], []
    for _ in range(2):
        module = Regression()
        try:
            jobs.fit(directory, 2, {**NOISY, "ledger": book}, module)
        except Exception as found:  # noqa: BLE001 - this is what the test looks at
            errors.append(type(found).__name__)
        steps.append(module.global_step)
    return {"steps": steps, "errors": errors}


def spent(directory: Path) -> list[int]:
    """The steps that each run of the ledger has charged."""
    book = PrivacyLedger(directory / "ledger.db", dataset="rows", budget=None)
    return [sum(release.count for release in entry.releases) for entry in book.entries()]
