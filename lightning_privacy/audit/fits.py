"""Short fits of the probe through the shipped path, in one process or several."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_privacy.audit.probe import ProbeModule, ProbeSettings, Recording, probe_rows

if TYPE_CHECKING:
    from collections.abc import Iterator


class Audited(Protocol):
    """What is audited: makes the callback that makes a fit private, such as `DifferentialPrivacy`.

    The callback must have ``plan``, ``steps`` and ``epsilon()``.
    """

    def __call__(self, **settings: Any) -> Any:
        """Make the callback from the settings of `DifferentialPrivacy`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Where the fits run: arguments of `Trainer`."""

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"


@dataclass(kw_only=True, slots=True)
class Probe:
    """Fits the probe with what is audited.

    Args:
        audited: Makes the callback.
        where: The devices.
        directory: For checkpoints and journals, readable by every rank; a temporary one by default.
    """

    audited: Audited
    where: Devices = field(default_factory=Devices)
    directory: Path | None = None
    _temporary: Any = field(default=None, init=False)

    def __enter__(self) -> Self:
        """Make the directory."""
        if self.directory is None:
            self._temporary = tempfile.TemporaryDirectory()
            self.directory = Path(self._temporary.name)
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the temporary directory."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def fit(self, settings: ProbeSettings, *, resume_after: int | None = None) -> Recording:
        """One fit, or two with a checkpoint between them.

        Args:
            settings: What to fit.
            resume_after: Stop and save after so many steps, and go on with everything new.

        Returns:
            What was released in all, and what the last callback said, on rank 0; what the other
            ranks saw is in ``others``. The same on every rank.
        """
        assert self.directory is not None
        with isolate_rng(), _same_environment(), _quiet():
            pl.seed_everything(settings.seed, verbose=False)
            module = ProbeModule(settings)
            home = _Home(self.directory)
            before: list[Tensor] | None = None
            if resume_after is not None:
                home = _Home(self.directory, checkpoint="probe.ckpt")
                self._run(module, settings, resume_after, home)
                before = [seen["releases"] for seen in home.seen()]
                resume, home = home.directory / "probe.ckpt", _Home(self.directory)
                module = ProbeModule(settings)
                self._run(module, settings, settings.steps, home, resume)
            else:
                self._run(module, settings, settings.steps, home)
        ranks = []
        for rank, seen in enumerate(home.seen()):
            if before is not None:
                seen["releases"] = torch.cat([before[rank], seen["releases"]])
            ranks.append(Recording(columns=module.columns(), settings=settings, **seen))
        ranks[0].others = tuple(ranks[1:])
        return ranks[0]

    def _run(
        self,
        module: ProbeModule,
        settings: ProbeSettings,
        steps: int,
        home: _Home,
        resume: Path | None = None,
    ) -> None:
        callback = self.audited(
            noise_multiplier=settings.noise_multiplier,
            delta=1e-5,
            clip_norm=settings.clip_norm,
            expected_batch_size=settings.expected_batch_size,
            dataset_size=settings.size,
            clipping=settings.clipping,
            print_table=False,
            **settings.unit,
        )
        home.callback = callback
        trainer = pl.Trainer(
            accelerator=self.where.accelerator,
            devices=self.where.devices,
            strategy=self.where.strategy,
            max_steps=steps,
            callbacks=[callback, home],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.directory,
        )
        rows = DataLoader(probe_rows(settings), batch_size=settings.physical_batch_size)
        trainer.fit(module, rows, ckpt_path=resume)


class _Home(pl.Callback):
    """Brings home what every rank saw, from processes that may have ended when ``fit`` returns."""

    def __init__(self, directory: Path, checkpoint: str | None = None) -> None:
        self.directory, self._checkpoint = directory, checkpoint
        self.callback: Any = None
        self._seen: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on a directory: scripts that run side by side have made one each."""
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a checkpoint if one is asked for, and collect."""
        if self._checkpoint is not None:
            trainer.save_checkpoint(self.directory / self._checkpoint)
        assert isinstance(pl_module, ProbeModule)
        plan = self.callback.plan
        self._seen = _gathered(
            {
                "releases": torch.stack(pl_module.seen),
                "steps": self.callback.steps,
                "epsilon": self.callback.epsilon(),
                "sample_rate": plan.sample_rate,
                "expected_batch_size": plan.expected_batch_size,
            },
            trainer.world_size,
        )
        if trainer.is_global_zero:
            torch.save(self._seen, self.directory / "seen.pt")

    def seen(self) -> list[dict[str, Any]]:
        """What each rank saw; read from the disk where this process has not taken part."""
        if not self._seen:
            self._seen = torch.load(self.directory / "seen.pt", weights_only=True)
            (self.directory / "seen.pt").unlink()
        return self._seen


def _gathered(own: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    if ranks == 1:
        return [own]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, own)
    return found


@contextmanager
def _same_environment() -> Iterator[None]:
    """Leave nothing for processes that are started later: a seed, or who they are."""
    before = dict(os.environ)
    try:
        yield
    finally:
        # Processes that go on together keep what they know of each other.
        kept = () if not dist.is_initialized() else (*_RANKS,)
        for name in set(os.environ) - set(before) - set(kept):
            del os.environ[name]
        os.environ.update({n: v for n, v in before.items() if n not in kept})


_RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of any short training."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
