"""Where one draw stands, the loss it shows, and before which draws the checks are repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_privacy.strategies.refusals import second_backward

if TYPE_CHECKING:
    from lightning_privacy.clipping.layout import Layouts
    from lightning_privacy.distributed import World
    from lightning_privacy.sampling import MicroBatch, PrivateLoader, UnitRows
    from lightning_privacy.step import PrivateStep


class Draw:
    """Where one draw stands between backward passes and releases.

    Args:
        cursor: Its number.
        manual: Whether the module steps by itself.
        arguments: What its training step gets besides the batch.
    """

    __slots__ = ("arguments", "cursor", "manual", "releases", "units", "unreleased", "weights")

    def __init__(
        self, *, cursor: int = -1, manual: bool = False, arguments: tuple[Any, ...] = ()
    ) -> None:
        self.cursor, self.manual, self.arguments = cursor, manual, arguments
        self.releases = 0
        self.unreleased = False
        self.weights: Sequence[float] = ()
        self.units: UnitRows | None = None

    def before_backward(self, step: PrivateStep, module: LightningModule, more: object) -> bool:
        """Refuse, or make room for, another backward on the same draw; and arm the step for it.

        Args:
            step: The private step, whose running sums may have to go.
            module: Whose backward it is.
            more: What it is given besides the optimizer; a second one would not have that.

        Returns:
            Whether the backward has to keep its graph.

        Raises:
            UnsupportedOperationError: The sums of the backward before were not released yet.
        """
        if self.manual and self.unreleased:
            raise second_backward()
        if self.manual and self.releases:
            # Otherwise what the first loss left for other optimizers would be in the sum as well.
            step.discard()
        # A backward of the module's own may not know how to keep one.
        own = getattr(module.backward, "__func__", None)
        return step.arm(twice=not more and own is LightningModule.backward)

    def after_backward(self) -> None:
        """Note that there are sums to be released."""
        self.unreleased = self.manual

    def needs_check(self, layouts: Layouts, world: World) -> bool:
        """Whether the draw is to be checked before its release, and not only from time to time.

        A layer that is used for the first time, or in another way, may hold the rows elsewhere than
        by convention.

        Args:
            layouts: Of the private step: what was learnt of each use.
            world: The ranks, which check together where passes of the module communicate.

        Returns:
            Whether a use was not seen before. In manual optimization nothing can be repeated now.
        """
        unseen = bool(layouts.unseen) and not self.manual
        return any(world.gathered(unseen)) if world.lockstep else unseen

    def after_release(self) -> None:
        """Note that a gradient was released."""
        self.releases += 1
        self.unreleased = False


class Repeats:
    """When to check again: before draws 1, 2, 4, 8, … (from 0), and when an epoch begins.

    Where epochs are short, not every one of them: so that all checks together stay below one
    percent of the training, a check for an epoch comes at the earliest this many draws after the
    last check.
    """

    EPOCH_SPACING = 128

    def __init__(self) -> None:
        self._draws = self._last = 0
        self._epoch: int | None = None

    def due(self, epoch: int) -> bool:
        """Ask once before each draw.

        Args:
            epoch: The number of the current epoch.

        Returns:
            Whether to check before this draw; never before the first, which all checks precede.
        """
        number, self._draws = self._draws, self._draws + 1
        if self._epoch is None:
            self._epoch = epoch
        begun = epoch != self._epoch and number - self._last >= self.EPOCH_SPACING
        due = number > 0 and (begun or number & (number - 1) == 0)
        if due:
            self._last, self._epoch = number, epoch
        return due


class RowMean:
    """The mean loss over the real rows of a draw, without waiting for the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, loss: Tensor | None, rows: int) -> None:
        """Add the mean loss of a micro-batch.

        Args:
            loss: The loss; None, or what is not a plain tensor, is left out.
            rows: How many rows it is the mean of.
        """
        if loss is None or not rows or type(loss) is not Tensor:
            return
        value = loss.detach() * rows
        self.total = value if self.total is None else self.total + value
        self.rows += rows

    def shown_by(self, output: Any) -> Any:
        """Put the mean in the place of the last loss: same graph, another value.

        Args:
            output: What the module returned for the last micro-batch.

        Returns:
            The same, with that loss.
        """
        loss = loss_in(output)
        if self.total is None or type(loss) is not Tensor:
            return output
        shown = loss + (self.total / self.rows - loss.detach())
        return {**output, "loss": shown} if isinstance(output, Mapping) else shown


def next_batch(strategy: Any, loader: PrivateLoader) -> Any:
    """Fetch the next micro-batch of a draw, as Lightning fetches a batch.

    Args:
        strategy: The trainer's strategy.
        loader: The loader of the draw.

    Returns:
        The batch, on the device.
    """
    # The only private name of Lightning's used here, with `_results` below: the hooks around a
    # transfer have to run for each micro-batch exactly as Lightning runs them for a batch.
    batch = strategy.precision_plugin.convert_input(loader.next_micro())
    batch = strategy.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return strategy.batch_to_device(batch, dataloader_idx=0)


def weigh(trainer: Any, batch: Any, micro: MicroBatch) -> None:
    """Say what ``self.log(on_epoch=True)`` averages with: the real rows of this micro-batch.

    Args:
        trainer: The trainer.
        batch: The micro-batch, on the device.
        micro: Its rows.
    """
    results = trainer._results
    if results is not None:
        results.batch, results.batch_size = batch, micro.drawn


def loss_in(output: Any) -> Any:
    """Find the loss in what a training step returned.

    Args:
        output: A loss, a mapping with a loss, or None.

    Returns:
        The loss, or None.
    """
    return output.get("loss") if isinstance(output, Mapping) else output
