"""One private fit: what the strategy's methods do, and in which order a draw goes through them.

A draw is one Lightning batch. In automatic optimization it goes, one physical micro-batch after
the other, through ``begin``, the user's ``training_step``, backward and ``end``; then the optimizer
step releases the sum once. In manual optimization it is one micro-batch, and each optimizer step
that the user makes on it is a release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.clipping.guards import StateGuard
from lightning_privacy.clipping.label_means import LabelWatch
from lightning_privacy.strategies.draw import Draw, Repeats, RowMean, loss_in
from lightning_privacy.strategies.refusals import (
    accumulation_refused,
    closure_called_again,
    closure_never_called,
    draw_stepped_again,
    draw_was_split,
    loaders_refused,
    not_started,
    nothing_to_release,
    uncovered,
    warn_never_stepped,
)

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer

    from lightning_privacy.clipping.statistics import StepStatistics
    from lightning_privacy.sampling import MicroBatch, PrivateLoader
    from lightning_privacy.step import PrivateStep

StepFunction = Callable[..., Any]


class LossReached(BaseException):
    """Ends a probe of a manually optimized module at its first backward."""


class PrivateRun:
    """Drives one private fit on behalf of a strategy.

    The callback makes it, because the callback knows the plan, the ledger and the checks; the
    strategy calls it, because only the strategy sees every batch, backward and optimizer step.

    Args:
        strategy: The private strategy that calls this run.
        prepare_loader: Turns the training loader into one of Poisson draws.
        start: Called once, with everything set up and before the first training step: runs the
            checks and returns the private step.
        charge: Called before a release, with the number of releases made on the same draw before:
            writes it into ledger and journal and returns the number that keys its noise. Raises if
            the budget is spent.
        record: Called with the statistics of each draw's first release.
        drawn: Called when a draw is handed out, with the position of the next one.
        independent_buffers: Names or patterns of buffers declared to be independent of the data.

    Attributes:
        recheck: Repeats the check of independence, between two draws; gets what a training step
            gets besides its batch. None: nothing is checked again.
        labels: Watches means over labels; the checks tell it whether there are any.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        prepare_loader: Callable[[object], PrivateLoader],
        start: Callable[[], PrivateStep],
        charge: Callable[[int], int],
        record: Callable[[StepStatistics], None],
        drawn: Callable[[int], None],
        independent_buffers: Sequence[str] = (),
    ) -> None:
        self.strategy = strategy
        self.loader: PrivateLoader | None = None
        self.step: PrivateStep | None = None
        self._covered: frozenset[int] = frozenset()
        self._guard = StateGuard(self.module, independent_buffers)
        self._prepare_loader, self._start, self._drawn = prepare_loader, start, drawn
        self._charge, self._record = charge, record
        self._draw = Draw()
        self._probing = False
        self._probed: Tensor | None = None
        self._watched = False
        self._released = 0
        self._repeats = Repeats()
        self.recheck: Callable[..., None] | None = None
        self.labels = LabelWatch()

    # ------------------------------------------------------------------ loader and draws
    def prepare_loader(self, dataloader: object) -> PrivateLoader:
        """Replace the training loader by one of Poisson draws.

        Args:
            dataloader: What the module, the data module or ``fit`` gave to Lightning.

        Returns:
            The loader that Lightning iterates; its length is the private steps of an epoch.

        Raises:
            UnsupportedOperationError: It is the second training loader.
        """
        reloads = self.trainer.reload_dataloaders_every_n_epochs
        if self.loader is not None and self.step is None and not reloads:
            raise loaders_refused("train_dataloader gives several")
        self.loader = self._prepare_loader(dataloader)
        return self.loader

    def hand_out(self, ordinary: Callable[[], None]) -> None:
        """Note that Lightning holds a draw's first batch: that draw is never handed out again.

        Args:
            ordinary: What an ordinary strategy does.
        """
        ordinary()
        self._require_own_loader()
        if self.step is None:
            self.step = self._start()
            self._covered = frozenset(map(id, self.step.parameters.values()))
        self._drawn(self._loader().cursor_of_current + 1)

    # ------------------------------------------------------------------ the strategy's methods
    def training_step(self, ordinary: StepFunction, batch: Any, *arguments: Any) -> Any:
        """Run the user's training step on every micro-batch of the current draw.

        Args:
            ordinary: The ordinary strategy's ``training_step``.
            batch: The draw's first micro-batch, on the device.
            *arguments: What Lightning passes on to the module, such as ``batch_idx``.

        Returns:
            What the module returned for the last micro-batch, with the loss averaged over the
            draw's rows in value; its graph is the last micro-batch's. Never None in automatic
            optimization: a loss of None becomes a zero, so that the noise is still released.
        """
        if self._probing:
            return ordinary(batch, *arguments)
        with self._restoring(), torch.compiler.set_stance("force_eager"):
            self._require_unchanged()
            self._open_draw(*arguments)
            if self.module.automatic_optimization:
                return self._automatic(ordinary, batch, *arguments)
            return self._manual(ordinary, batch, *arguments)

    def backward(self, ordinary: StepFunction, loss: Tensor, *arguments: Any, **named: Any) -> Any:
        """Run one backward, then clip and add what it delivered.

        Args:
            ordinary: The ordinary strategy's ``backward``.
            loss: The loss of one micro-batch.
            *arguments: What Lightning passes on to ``loss.backward``.
            **named: The same.

        Returns:
            What the ordinary strategy returns.
        """
        if self._probing:
            self._probed = loss
            raise LossReached
        step = self._step()
        with self._restoring(), torch.compiler.set_stance("force_eager"):
            self._draw.before_backward(step)
            step.arm()
            result = ordinary(loss, *arguments, **named)
            step.end()
            self._draw.after_backward()
            return result

    def optimizer_step(
        self,
        ordinary: StepFunction,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        *arguments: Any,
        **named: Any,
    ) -> Any:
        """Step the optimizer on a released gradient.

        Noise is added as soon as the closure returns, before any hook that sees gradients.

        Args:
            ordinary: The ordinary strategy's ``optimizer_step``.
            optimizer: The optimizer that steps.
            closure: Computes the loss and its gradients, or does nothing.
            *arguments: Passed on.
            **named: Passed on.

        Returns:
            What the ordinary strategy returns.

        Raises:
            UnsupportedOperationError: The optimizer evaluates its closure more than once.
            GuaranteeError: The optimizer never evaluates its closure.
        """
        if self._probing:
            return closure()
        calls = 0

        def private_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise closure_called_again(optimizer)
            result = closure()
            self._release(optimizer)
            return result

        with self._restoring():
            result = ordinary(optimizer, private_closure, *arguments, **named)
            if not calls:
                raise closure_never_called(optimizer)
            self._watch_state()
            if not self.module.automatic_optimization:
                self._step().begin(self._draw.weights, self._draw.units)
            return result

    def probe(self, batch: Any, *arguments: Any) -> Tensor | None:
        """Compute the loss of one batch outside any private step, for the checks.

        Args:
            batch: A batch on the device.
            *arguments: What Lightning would pass on to the module.

        Returns:
            The loss; in manual optimization the first that reaches a backward. None if none does.
        """
        self._probing, self._probed = True, None
        try:
            with torch.compiler.set_stance("force_eager"):
                return loss_in(self.strategy.training_step(batch, *arguments))
        except LossReached:
            return self._probed
        finally:
            self._probing = False

    def abort(self) -> None:
        """Give every parameter its own class back and drop what was captured. Safe at any time."""
        if self.step is not None:
            self.step.abort()

    def close(self) -> None:
        """End the run: `abort`, and leave no hook on any parameter."""
        if self.step is not None:
            self.step.close()

    # ------------------------------------------------------------------ one draw
    def _automatic(self, ordinary: StepFunction, batch: Any, *arguments: Any) -> Any:
        step, micro_batches = self._step(), self._loader().current
        output, losses = None, RowMean()
        for position, micro in enumerate(micro_batches):
            if position:
                batch = self._next_batch()
            self._weigh_logs(batch, micro)
            step.begin(micro.weights, micro.units)
            with self.labels.watching(len(micro.weights)):
                output = ordinary(batch, *arguments)
            loss = loss_in(output)
            losses.add(loss, micro.drawn)
            if loss is not None and position < len(micro_batches) - 1:
                self.strategy.backward(loss, None)
        if output is None:
            return torch.zeros((), device=self.strategy.root_device, requires_grad=True)
        return losses.shown_by(output) if len(micro_batches) > 1 else output

    def _manual(self, ordinary: StepFunction, batch: Any, *arguments: Any) -> Any:
        micro_batches = self._loader().current
        if len(micro_batches) != 1:
            raise draw_was_split(len(micro_batches))
        self._draw.weights, self._draw.units = micro_batches[0].weights, micro_batches[0].units
        self._weigh_logs(batch, micro_batches[0])
        self._step().begin(self._draw.weights, self._draw.units)
        with self.labels.watching(len(self._draw.weights)):
            output = ordinary(batch, *arguments)
        if self._draw.unreleased:
            warn_never_stepped()
        self._step().abort()
        return output

    def _open_draw(self, *arguments: Any) -> None:
        step = self._step()
        if step.pending and not self._draw.releases:
            warn_never_stepped()
        step.discard()
        cursor = self._loader().cursor_of_current
        if self._draw.releases and self._draw.cursor == cursor:
            raise draw_stepped_again()
        if self._watched:
            self._guard.verify("between training steps")
        due = self.recheck is not None and self._repeats.due(self.trainer.current_epoch)
        if due and self.recheck is not None:
            self.recheck(*arguments)
        self.labels.forget()
        self._draw = Draw(cursor=cursor, manual=not self.module.automatic_optimization)
        if due or not self._watched:
            self._watch_state()

    def _release(self, optimizer: Optimizer) -> None:
        step, draw = self._step(), self._draw
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        step.abort_micro_batch()
        if not step.pending:
            raise nothing_to_release(optimizer)
        self._guard.verify("during a training step")
        self.labels.verify()
        number = self._charge(draw.releases)
        every = self.trainer.log_every_n_steps
        logged = bool(every) and (number + 1) % every == 0
        statistics = step.release(number, held, signal=logged)
        if not draw.releases:
            self._record(statistics)
        draw.after_release()
        self._released += 1

    def forget_state(self) -> None:
        """Take the present state as given: validation may swap averaged weights in and out."""
        if self._watched:
            self._watch_state()

    def _watch_state(self) -> None:
        # Contents too at steps 1, 2, 4, 8, …: only they show a write through `.data`.
        self._guard.snapshot(values=self._released & (self._released - 1) == 0)
        self._watched = True

    def _next_batch(self) -> Any:
        # The only private name of Lightning's used here, with `_results` below: the hooks around a
        # transfer have to run for each micro-batch exactly as Lightning runs them for a batch.
        strategy = self.strategy
        batch = strategy.precision_plugin.convert_input(self._loader().next_micro())
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    def _weigh_logs(self, batch: Any, micro: MicroBatch) -> None:
        # What `self.log(on_epoch=True)` averages with: the real rows of this micro-batch.
        results = self.trainer._results
        if results is not None:
            results.batch, results.batch_size = batch, micro.drawn

    # ------------------------------------------------------------------ guards
    @contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _require_own_loader(self) -> None:
        if self.trainer.train_dataloader is not self.loader:
            found = type(self.trainer.train_dataloader).__name__
            raise loaders_refused(f"Lightning iterates a {found} instead")

    def _require_unchanged(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise accumulation_refused(self.trainer.accumulate_grad_batches)
        parts = (part for _, part in self._guard.modules)
        if any(map(self._is_stranger, (p for part in parts for p in part._parameters.values()))):
            named = self.module.named_parameters()
            raise uncovered([name for name, p in named if self._is_stranger(p)])

    def _is_stranger(self, parameter: Tensor | None) -> bool:
        return (
            parameter is not None and id(parameter) not in self._covered and parameter.requires_grad
        )

    def _step(self) -> PrivateStep:
        if self.step is None:
            raise not_started()
        return self.step

    def _loader(self) -> PrivateLoader:
        assert self.loader is not None
        return self.loader

    @property
    def trainer(self) -> Any:
        """The trainer of the current fit."""
        return self.module.trainer

    @property
    def module(self) -> Any:
        """The module that is trained."""
        return self.strategy.lightning_module
