"""What comes home from processes that are gone when ``fit`` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from typing_extensions import override

from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch.strategies import Strategy

STARTS_PROCESSES = "_MultiProcessingLauncher"


class ReturningLauncher(_MultiProcessingLauncher):
    """Spawns or forks processes, and brings home what they have spent.

    Lightning brings weights and metrics home, and no callback. A privacy callback that stayed as it
    was would say that nothing was spent.
    """

    @override
    def launch(self, function: Callable, *args: Any, trainer: Any = None, **named: Any) -> Any:
        """Mark callbacks as away until what they know has come home."""
        for callback in _travellers(trainer):
            callback.home.leave()
        return super().launch(function, *args, trainer=trainer, **named)

    @override
    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        """In rank 0, at the end: what the main process gets."""
        states = [callback.home.luggage() for callback in _travellers(trainer)]
        return {**super().get_extra_results(trainer), "privacy": states}

    @override
    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        """In the main process: unpack it."""
        super().update_main_process_results(trainer, extra)
        for callback, state in zip(_travellers(trainer), extra["privacy"], strict=True):
            callback.home.come_home(state)


def configure_launcher(strategy: Any, ordinary: Callable[[], None]) -> None:
    """Choose the launcher of a strategy that was made private before its processes start.

    Args:
        strategy: The private strategy.
        ordinary: How its base class chooses.
    """
    ordinary()
    if type(strategy.launcher) is _MultiProcessingLauncher:
        start: Any = strategy.launcher._start_method
        strategy._launcher = ReturningLauncher(strategy, start_method=start)


def require_return(strategy: Strategy) -> None:
    """Refuse a strategy that was made private inside a process from which nothing comes home.

    Args:
        strategy: The trainer's strategy.

    Raises:
        UnsupportedOperationError: Lightning's own launcher has spawned or forked this process.
    """
    launcher: Any = strategy.launcher
    if type(launcher).__name__ == STARTS_PROCESSES:
        start = launcher._start_method
        raise UnsupportedOperationError(
            must="what was spent comes home to the process that called fit",
            found=f"a strategy that starts processes by {start!r}, chosen without its private name",
            cost="a callback that says ε = 0 after the fit",
            remedy=f'pass Trainer(strategy="private_ddp_{start}")',
        )


def _travellers(trainer: Any) -> list[Any]:
    callbacks = [] if trainer is None else trainer.callbacks
    return [callback for callback in callbacks if hasattr(callback, "home")]
