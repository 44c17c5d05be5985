"""What the ranks do in the tests of failures and of what follows them."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils.data import DataLoader

from lightning_privacy.accounting import PrivacyLedger
from lightning_privacy.callbacks import newest_checkpoint
from lightning_privacy.distributed import world
from tests.callbacks.test_failures import At, Torn, kill
from tests.callbacks.training import Regression, data
from tests.distributed import jobs

REAL = {"test_seed": None, "noise_multiplier": 0.5}
STEPS = 10
# Writes of a first checkpoint: the module's and the optimizer's in one.
FIRST = 1


def train(directory: str, ranks: int, *callbacks: Any, **options: Any) -> Any:
    """Ten steps, with a checkpoint after each four."""
    saving = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    settings = {**REAL, **options.pop("settings", {})}
    options = {"max_steps": STEPS, "max_epochs": -1, **options}
    return jobs.fit(directory, ranks, settings, callbacks=(saving, *callbacks), **options)[2]


def train_to(directory: str, ranks: int, steps: int, precision: str = "64-true") -> None:
    """The first steps of a run."""
    dtype = torch.float64 if precision == "64-true" else torch.float32
    batches = DataLoader(data(jobs.ROWS, dtype), batch_size=4)
    train(directory, ranks, max_steps=steps, precision=precision, batches=batches)


def go_on(directory: str, ranks: int, strategy: str = "private_ddp") -> int:
    """Train to the end; how many steps are charged in all."""
    path = str(newest_checkpoint(Path(directory)))
    return int(train(directory, ranks, ckpt_path=path, strategy=strategy).steps)


def told(part: Callable[[], object]) -> str:
    try:
        part()
    except BaseException as error:  # noqa: BLE001 - this is what the tests look at
        return f"{type(error).__name__}: {error}"
    return ""


def struck(directory: str, ranks: list[int], hook: str, way: str) -> str:
    """Some ranks are struck in their seventh step, or in a write of a checkpoint."""
    world._PATIENCE, world._GRACE = timedelta(seconds=1), timedelta(seconds=2)
    here, options, callbacks = torch.distributed.get_rank() in ranks, {}, ()
    if way == "shards":
        options = {"strategy": "private_fsdp"}
        if here:
            killed_at_second_write()
    elif way == "write" and here:
        options = {"plugins": [Torn(kill)]}
    elif here:
        callbacks = (At(hook, 6, WAYS[way]),)
    return told(lambda: train(directory, 2, *callbacks, **options))


def fails_while_the_other_one_waits(directory: str) -> str:
    """Rank 1 fails in a callback; rank 0 waits at the barrier that Lightning has before a batch."""
    world._PATIENCE, world._GRACE = timedelta(seconds=1), timedelta(seconds=20)
    second = torch.distributed.get_rank() == 1
    callbacks = (At("on_train_batch_end", 6, _own_words),) if second else ()
    words = told(lambda: train(directory, 2, *callbacks))
    if second:
        os._exit(1)
    return words


def _own_words(_trainer: Any) -> None:
    raise LookupError("no such column\nand more")


def struck_with_ledger(directory: str, ranks: list[int]) -> str:
    """Some ranks are killed in their seventh step, of a run that has reserved ten."""
    world._PATIENCE, world._GRACE = timedelta(seconds=1), timedelta(seconds=2)
    here = torch.distributed.get_rank() in ranks
    callbacks = (At("on_before_optimizer_step", 6, kill),) if here else ()
    settings = {"ledger": book(directory)}
    return told(lambda: train(directory, 2, *callbacks, settings=settings))


def go_on_with_ledger(directory: str) -> int:
    """Train to the end; how many steps are charged in all."""
    path = str(newest_checkpoint(Path(directory)))
    return int(train(directory, 2, ckpt_path=path, settings={"ledger": book(directory)}).steps)


def book(directory: str) -> PrivacyLedger:
    """The ledger of the data set; all ranks have it open."""
    return PrivacyLedger(Path(directory) / "spent.sqlite", dataset="rows", budget=(99.0, 1e-5))


def killed_at_second_write() -> None:
    """This rank dies where it would write its shards of the second checkpoint."""
    ordinary, count = FileSystemWriter.write_data, [0]

    def write(self: Any, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] > FIRST:
            kill()
        return ordinary(self, *arguments)

    FileSystemWriter.write_data = write


def _full_disk(_trainer: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


WAYS: dict[str, Callable[[Any], object]] = {
    "kill": kill,
    "full": _full_disk,
    "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
}


def changed(directory: str, ranks: int, path: str, changes: list[dict[str, Any]]) -> list[str]:
    """What is said to resumes with another mechanism, data set or precision."""
    found = []
    for change in changes:
        settings = dict(change)
        options = {name: settings.pop(name) for name in ("precision", "rows") if name in settings}
        rows = options.pop("rows", jobs.ROWS)
        dtype = torch.float64 if options.get("precision", "64-true") == "64-true" else torch.float32
        batches = DataLoader(data(rows, dtype), batch_size=3)
        found.append(
            told(
                lambda s=settings, o=options, b=batches: train(
                    directory, ranks, settings=s, batches=b, ckpt_path=path, **o
                )
            )
        )
    return found


def poisoned(directory: str, ranks: int) -> dict[str, Any]:
    """Rows that are no numbers, on either rank."""
    rows = data(jobs.ROWS, torch.float64)
    for number, poison in enumerate((float("nan"), float("inf"), -1e300)):
        rows.tensors[0][number::9] = poison
    settings = {"independence_check": False, "clip_norm": 0.5}
    _, module, callback = jobs.fit(
        directory, ranks, settings, Regression(), DataLoader(rows, batch_size=3)
    )
    return {
        "weights": jobs.plain(module), "lost": callback.summary().nonfinite_units,
        "steps": callback.steps,
    }  # fmt: skip
