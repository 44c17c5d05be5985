"""Many private steps of a tiny model: memory, open files and time per step must not grow.

    python tests/benchmarks/soak.py --steps 20000 --output docs/benchmarks/soak.csv

An ordinary fit on the CPU: Poisson draws cut into micro-batches, noise, journal, logging every 50
steps, a validation every 500 and a checkpoint every 2,000. Every 100 steps it notes the resident
set, open files, threads, live Python objects and the processor time of a step, which other programs
do not lengthen as they do the time on the wall. The first half warms caches and allocators up; a
verdict is about the second. The notes go into an array that was made before.
"""

from __future__ import annotations

import argparse
import array
import csv
import gc
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import DifferentialPrivacy

ROWS, FEATURES, EVERY = 256, 8, 100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the process held after a number of private steps."""

    step: float
    rss_kib: float
    files: float
    threads: float
    objects: float
    milliseconds: float


_COLUMNS = tuple(field.name for field in fields(Sample))


class Watch(L.Callback):
    """Takes a sample every 100 steps."""

    def __init__(self, steps: int) -> None:
        self._numbers = array.array("d", bytes(8 * len(_COLUMNS) * (steps // EVERY)))
        self._count = 0
        self._since = time.process_time()

    @property
    def samples(self) -> list[Sample]:
        width = len(_COLUMNS)
        rows = [self._numbers[i * width : (i + 1) * width] for i in range(self._count)]
        return [Sample(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % EVERY:
            return
        spent = (time.process_time() - self._since) * 1000 / EVERY
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = (
            trainer.global_step,
            pages * os.sysconf("SC_PAGE_SIZE") / 1024,
            len(list(Path("/proc/self/fd").iterdir())),
            len(list(Path("/proc/self/task").iterdir())),
            len(gc.get_objects()),
            round(spent, 3),
        )
        for offset, number in enumerate(row):
            self._numbers[self._count * len(row) + offset] = number
        self._count += 1
        self._since = time.process_time()


class Tiny(L.LightningModule):
    """A perceptron that knows nothing of privacy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def soak(steps: int, directory: Path) -> list[Sample]:
    """Train, and return the samples.

    Args:
        steps: Private steps.
        directory: For logs, checkpoints and journal.

    Returns:
        One sample for every 100 steps.
    """
    x = torch.randn(ROWS, FEATURES)
    rows = TensorDataset(x, x.sum(1, keepdim=True))
    watch = Watch(steps)
    privacy = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-5, expected_batch_size=8, print_table=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=500,
        check_val_every_n_epoch=None,
        logger=CSVLogger(directory),
        default_root_dir=directory,
        callbacks=[privacy, watch, ModelCheckpoint(directory, every_n_train_steps=2000)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=64))
    assert privacy.steps == trainer.global_step == steps
    return watch.samples


def slope(samples: list[Sample], name: str) -> tuple[float, float]:
    """Growth by 1,000 steps of a column in the second half, and the error of that.

    Blocks of ten samples are averaged first, because neighbours are not independent.

    Args:
        samples: All samples.
        name: The column.

    Returns:
        The slope by least squares, and its standard error.
    """
    late = samples[len(samples) // 2 :]
    size = max(1, len(late) // 10)
    blocks = [late[i : i + size] for i in range(0, len(late) - size + 1, size)]
    x = [statistics.mean(s.step / 1000 for s in block) for block in blocks]
    y = [statistics.mean(getattr(s, name) for s in block) for block in blocks]
    middle, height = statistics.mean(x), statistics.mean(y)
    spread = sum((value - middle) ** 2 for value in x)
    growth = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread
    rest = [b - height - growth * (a - middle) for a, b in zip(x, y, strict=True)]
    return growth, (sum(r * r for r in rest) / (len(x) - 2) / spread) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        samples = soak(arguments.steps, Path(directory))
    if arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(samples[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.9g}" for k, v in asdict(s).items()} for s in samples)
    for name in ("rss_kib", "files", "threads", "objects", "milliseconds"):
        growth, error = slope(samples, name)
        values = [getattr(s, name) for s in samples[len(samples) // 2 :]]
        print(
            f"{name}: {growth:+.3f} ± {error:.3f} by 1,000 steps; "
            f"{min(values):g} to {max(values):g}, mean {statistics.mean(values):.2f}"
        )


if __name__ == "__main__":
    main()
