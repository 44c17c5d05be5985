"""`privatize`: the private counterpart of an ordinary Lightning strategy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.strategies.launching import configure_launcher
from lightning_privacy.strategies.replicas import replicate
from lightning_privacy.strategies.signalling import answer_signals, take_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_privacy.strategies.run import PrivateRun

SINGLE_DEVICE = "SingleDeviceStrategy"
DATA_PARALLEL = "DDPStrategy"
SHARDED = "ModelParallelStrategy"


@functools.cache
def privatize(base: type[Strategy]) -> type[Strategy]:  # noqa: C901 - one class, many methods
    """Return the private subclass of a strategy class, always the same one.

    Single inheritance keeps the layout of the instances, so the callback may switch the class of a
    strategy that the trainer already holds, and ``isinstance`` still says what it said. Without a
    `PrivateRun`, which only the callback attaches, the class behaves like ``base`` in validation,
    test and prediction, and refuses to fit.

    Args:
        base: `SingleDeviceStrategy`, `DDPStrategy` or `ModelParallelStrategy` of
            ``lightning.pytorch`` or ``pytorch_lightning``, or a subclass of one.

    Returns:
        ``Private<base>``; ``base`` itself if it is private already.

    Raises:
        UnsupportedOperationError: There is no private counterpart: gradients are added up inside
            the backward, or a library of its own runs backward and step.
    """
    if getattr(base, "is_private", False):
        return base
    _require_counterpart(base)

    class Private(base):  # type: ignore[misc, valid-type]
        is_private = True
        private_run: PrivateRun | None = None
        private_flaw: Exception | None = None

        def setup(self, trainer: Any) -> None:
            _require_callback_and_one_device(self, trainer)
            if trainer.state.fn == "fit":
                self.private_flaw = None
            super().setup(trainer)

        def process_dataloader(self, dataloader: object) -> object:
            dataloader = super().process_dataloader(dataloader)
            return _training_loader(self, dataloader)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            _routed(self, "hand_out", _nothing)(batch)

        def batch_to_device(self, *arguments: Any, **named: Any) -> Any:
            return _delivered(self, super().batch_to_device(*arguments, **named))

        def load_checkpoint(self, checkpoint_path: Any, *arguments: Any, **named: Any) -> Any:
            _require_file(self, checkpoint_path)
            return super().load_checkpoint(checkpoint_path, *arguments, **named)

        def on_train_start(self) -> None:
            super().on_train_start()
            take_signals(self)

        def on_validation_start(self) -> None:
            super().on_validation_start()
            take_signals(self)

        def on_validation_end(self) -> None:
            super().on_validation_end()
            answer_signals(self)

        def on_train_end(self) -> None:
            super().on_train_end()
            _verify_state(self, "at the end of the training")

        def lightning_module_state_dict(self) -> dict[str, Any]:
            _verify_state(self, "before a checkpoint")
            return super().lightning_module_state_dict()

        def training_step(self, *arguments: Any) -> Any:
            return _routed(self, "training_step", super().training_step)(*arguments)

        def backward(self, closure_loss: Tensor, *arguments: Any, **named: Any) -> Tensor:
            route = _routed(self, "backward", super().backward)
            return route(closure_loss, *arguments, **named)

        def optimizer_step(
            self, optimizer: Optimizer, closure: Callable[[], Any], *arguments: Any, **named: Any
        ) -> Any:
            route = _routed(self, "optimizer_step", super().optimizer_step)
            return route(optimizer, closure, *arguments, **named)

    if _is(base, DATA_PARALLEL):
        _replicate(Private, base)
    elif _is(base, SINGLE_DEVICE):
        _choose_device(Private, base)
    Private.__name__ = Private.__qualname__ = f"Private{base.__name__}"
    Private.__doc__ = f"`{base.__name__}` with private training; see `privatize`."
    return Private


def _require_file(strategy: Any, path: Any) -> None:
    if not is_sharded(strategy) and Path(path).is_dir():
        raise UnsupportedOperationError(
            must="a checkpoint for one device, or for replicas, is one file",
            found=f"the folder {path}, to which several devices have each written a shard",
            cost="weights that are not all there",
            remedy='go on with Trainer(strategy="private_fsdp"), on any number of devices; it '
            "writes files with PrivateFSDPStrategy(save_distributed_checkpoint=False)",
        )


def _replicate(private: Any, base: Any) -> None:
    private.configure_ddp = replicate
    private._configure_launcher = lambda self: configure_launcher(
        self, functools.partial(base._configure_launcher, self)
    )


def _choose_device(private: Any, base: Any) -> None:
    # Lightning fills this in for a strategy that was chosen by name: it looks for the name.
    private.parallel_devices = None
    private.root_device = property(
        lambda self: _chosen_device(base.root_device.fget(self), self.parallel_devices)
    )


def _chosen_device(own: torch.device, found: list[torch.device] | None) -> torch.device:
    return found[0] if found and own.type == "cpu" else own


def _training_loader(strategy: Any, dataloader: object) -> object:
    # Lightning asks for the loaders of validation, too.
    if strategy.private_run is None or not strategy.lightning_module.trainer.training:
        return dataloader
    return strategy.private_run.prepare_loader(dataloader)


def _delivered(strategy: Any, batch: Any) -> Any:
    if strategy.private_run is not None:
        strategy.private_run.batches.delivered(batch)
    return batch


def note_flaw(strategy: Any) -> None:
    """Remember, when a fit fails in the midst of a step, whether its module may still be saved.

    Checkpoints that are written on an exception come when the run is over, and nothing watches.

    Args:
        strategy: The trainer's strategy.
    """
    if getattr(strategy, "private_run", None) is not None:
        strategy.private_run.abort()
        try:
            _verify_state(strategy, "in the step that failed")
        except Exception as flaw:  # noqa: BLE001 - what cannot be verified is not saved either
            strategy.private_flaw = flaw


def _verify_state(strategy: Any, moment: str) -> None:
    if strategy.private_flaw is not None:
        raise strategy.private_flaw
    if strategy.private_run is not None:
        progress = strategy.lightning_module.trainer.fit_loop.epoch_progress.current
        # After the last epoch averaged weights may take the place of the trained ones.
        within_epoch = progress.started != progress.completed
        strategy.private_run.verify_state(moment, weights=within_epoch)


def _routed(strategy: Any, name: str, ordinary: Callable[..., Any]) -> Callable[..., Any]:
    """The private run's method in the place of the ordinary one, which it gets."""
    run = strategy.private_run
    return ordinary if run is None else functools.partial(getattr(run, name), ordinary)


def _require_callback_and_one_device(strategy: Any, trainer: Any) -> None:
    if trainer.state.fn != "fit":
        return
    name = type(strategy).__name__
    if strategy.private_run is None:
        raise ConfigurationError(
            must=f"{name} trains together with the DifferentialPrivacy callback",
            found="no DifferentialPrivacy in the trainer's callbacks",
            cost="training without any privacy, and exit code 0",
            remedy=(
                "add it to Trainer(callbacks=[...]); on a command line, `--trainer.callbacks+=` "
                "before `--config` silently drops the callbacks that the file names"
            ),
        )
    devices = strategy.parallel_devices or []
    if len(devices) > 1 and _is(type(strategy), SINGLE_DEVICE):
        raise UnsupportedOperationError(
            must=f"{name} trains on one device",
            found=f"devices={len(devices)}",
            cost="one process would run, on one device, at a batch size that nobody asked for",
            remedy='pass Trainer(devices=1), or strategy="private_ddp"',
        )


def _nothing(_batch: Any) -> None:
    """What an ordinary strategy does when a batch is handed out."""


def is_sharded(strategy: Strategy) -> bool:
    """Whether a strategy keeps parameters sharded.

    Args:
        strategy: Any strategy.

    Returns:
        True for Lightning's `ModelParallelStrategy` and subclasses, private or not.
    """
    return _is(type(strategy), SHARDED)


def _is(strategy: type, name: str) -> bool:
    return any(ancestor.__name__ == name for ancestor in strategy.__mro__)


def _require_counterpart(base: type[Strategy]) -> None:
    foreign = any(_is(base, name) for name in ("SingleDeviceXLAStrategy", "DeepSpeedStrategy"))
    if any(_is(base, name) for name in (SINGLE_DEVICE, DATA_PARALLEL, SHARDED)) and not foreign:
        return
    raise UnsupportedOperationError(
        must="the trainer's strategy has a private counterpart",
        found=f"{base.__name__}, which has none",
        cost="unclipped gradients would be added up across processes before anything is clipped",
        remedy='train on one device (strategy="private"), on several (strategy="private_ddp"), or '
        'with sharded parameters (strategy="private_fsdp")',
    )
