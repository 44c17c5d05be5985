"""One private fit: what the strategy's methods do, and in which order a draw goes through them.

A draw is one Lightning batch. In automatic optimization it goes, one physical micro-batch after
the other, through ``begin``, the user's ``training_step``, backward and ``end``; then the optimizer
step releases the sum once. In manual optimization it is one micro-batch, and each optimizer step
that the user makes on it is a release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_privacy.clipping.guards import StateGuard
from lightning_privacy.clipping.label_means import LabelWatch
from lightning_privacy.distributed import World
from lightning_privacy.step import PrivateStep
from lightning_privacy.strategies import refusals
from lightning_privacy.strategies.batch_watch import BatchWatch
from lightning_privacy.strategies.draw import Draw, Repeats, RowMean, loss_in, next_batch, weigh
from lightning_privacy.strategies.replicas import require_same
from lightning_privacy.strategies.validation import validation_may_follow

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from torch import nn
    from torch.optim import Optimizer

    from lightning_privacy.clipping.statistics import StepStatistics
    from lightning_privacy.sampling import PrivateLoader

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
        start: Runs the checks and returns the private step; called once, before the first step.
        charge: Called before a release, with the number of earlier ones on the same draw: charges
            it, on disk first, and returns the number that keys its noise, or raises.
        record: Called with the statistics of each draw's first release.
        drawn: Called when a draw is handed out, with the position of the next one.
        independent_buffers: Names or patterns of buffers declared independent of the data.
        world: The ranks of the fit.

    Attributes:
        recheck: Repeats the check of independence, where no micro-batch is under way; gets what a
            training step gets besides its batch. None: nothing is checked again.
        labels: Watches means over labels; the checks tell it whether there are any.
        records: Adds records that have no row to a draw, before its release.
        batches: Watches batches between their transfer and the training step.
        resources: What lasts as long as the run.
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that a fit does in its own way
        self,
        strategy: Strategy,
        *,
        prepare_loader: Callable[[object], PrivateLoader],
        start: Callable[[], PrivateStep],
        charge: Callable[[int], int],
        record: Callable[[StepStatistics], None],
        drawn: Callable[[int], None],
        independent_buffers: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        self.strategy = strategy
        self.world = world or World()
        self.loader: PrivateLoader | None = None
        self.step: PrivateStep | None = None
        self._covered: frozenset[int] = frozenset()
        self._guard = StateGuard(self.module, independent_buffers)
        self._prepare_loader, self._start, self._drawn = prepare_loader, start, drawn
        self._charge, self._record = charge, record
        self._draw, self._probing, self._repeats = Draw(), False, Repeats()
        self._probed: Tensor | None = None
        self._watched, self._released = False, 0
        self.recheck: Callable[..., None] | None = None
        self.labels, self.batches = LabelWatch(), BatchWatch()
        self.records: Callable[[PrivateStep], None] | None = None
        self.resources = ExitStack()

    step_class: Callable[..., PrivateStep] = PrivateStep

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, as operations see them."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

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
            raise refusals.loaders_refused("train_dataloader gives several")
        fresh = self.world.together(lambda: self._prepare_loader(dataloader))
        self.loader = fresh.after(self.loader)
        return self.loader

    def hand_out(self, ordinary: Callable[[Any], None], batch: Any) -> None:
        """Note that Lightning holds a draw's first batch: that draw is never handed out again.

        Args:
            ordinary: What an ordinary strategy does.
            batch: The batch.
        """
        ordinary(batch)
        self.batches.verify(batch)
        refusals.require_own_loader(self.trainer, self.loader)
        if self.step is None:
            self.step = self.world.together(self._start)
            self._covered = frozenset(map(id, self.step.held.values()))
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
            self._open_draw(*arguments)
            run = self._automatic if self.module.automatic_optimization else self._manual
            return run(ordinary, batch, *arguments)

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
            if twice := self._draw.before_backward(step, self.module, arguments[1:] or named):
                named |= {"retain_graph": True}
            result = ordinary(loss, *arguments, **named)
            step.end(loss if twice else None)
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
                raise refusals.closure_called_again(optimizer)
            result = closure()
            self._release(optimizer)
            return result

        with self._restoring():
            result = ordinary(optimizer, private_closure, *arguments, **named)
            if not calls:
                raise refusals.closure_never_called(optimizer)
            self._guard.verify_others(self._step().held.values(), "during an optimizer step")
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
        self.resources.close()
        if self.step is not None:
            self.step.close()

    # ------------------------------------------------------------------ one draw
    def _automatic(self, ordinary: StepFunction, batch: Any, *arguments: Any) -> Any:
        step, micro_batches = self._step(), self._loader().current
        output, losses = None, RowMean()
        for position, micro in enumerate(micro_batches):
            if position:
                batch = next_batch(self.strategy, self._loader())
            weigh(self.trainer, batch, micro)
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
            raise refusals.draw_was_split(len(micro_batches))
        self._draw.weights, self._draw.units = micro_batches[0].weights, micro_batches[0].units
        weigh(self.trainer, batch, micro_batches[0])
        self._step().begin(self._draw.weights, self._draw.units)
        with self.labels.watching(len(self._draw.weights)):
            output = ordinary(batch, *arguments)
        if self._draw.unreleased:
            refusals.warn_never_stepped()
        self._step().abort()
        return output

    def _open_draw(self, *arguments: Any) -> None:
        due = self.recheck is not None and self._repeats.due(self.trainer.current_epoch)
        self._require_unchanged(anew=due)
        step, cursor = self._step(), self._loader().cursor_of_current
        if step.pending and not self._draw.releases:
            refusals.warn_never_stepped()
        step.discard()
        if self._draw.releases and self._draw.cursor == cursor:
            raise refusals.draw_stepped_again()
        if due and self.recheck is not None:
            self.recheck(*arguments)
        self.labels.forget()
        manual = not self.module.automatic_optimization
        self._draw = Draw(cursor=cursor, manual=manual, arguments=arguments)
        if due or not self._watched:
            self._watch_state()

    def _release(self, optimizer: Optimizer) -> None:
        step, draw = self._step(), self._draw
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        step.abort_micro_batch()
        if not step.pending:
            raise refusals.nothing_to_release(optimizer)
        if self.records is not None:
            self.records(step)
        self._verify_state("during a training step")
        self.labels.verify()
        if self.recheck is not None and draw.needs_check(step.layouts, self.world):
            self.recheck(*draw.arguments)
        number = self._charge(draw.releases)
        self.world.meet(draw.cursor, number)
        logged = bool(every := self.trainer.log_every_n_steps) and (number + 1) % every == 0
        statistics = step.release(number, held, signal=logged)
        if not draw.releases:
            self._record(statistics)
        draw.after_release()
        self._released += 1

    def forget_state(self) -> None:
        """After a validation, which may swap averaged weights in and out, and leaves the old."""
        if self._watched:
            self._guard.verify_saved("during validation", parameters=True)
            self._watch_state()

    def verify_state(self, moment: str, *, weights: bool) -> None:
        """Refuse what was written into buffers, and weights if asked, since the last step."""
        if self._watched:
            self._guard.verify_saved(moment)
            if weights:
                self._verify_state(moment)

    def _verify_state(self, moment: str) -> None:
        self._guard.verify(moment)

    def _watch_state(self, replicas: World | None = None) -> None:
        # Contents too at steps 1, 2, 4, 8, …: only they show a write through `.data`.
        due = not self._released & (self._released - 1) or validation_may_follow(self.trainer)
        self._guard.snapshot(values=due)
        require_same(replicas or self.world, self._guard.values)
        self._watched = True

    # ------------------------------------------------------------------ guards
    @contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abort()
            self.world.fail(error)
            raise

    def _require_unchanged(self, *, anew: bool) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise refusals.accumulation_refused(self.trainer.accumulate_grad_batches)
        held = self._guard.held(anew=anew)  # for both guards, with nothing between them
        refusals.refuse_strangers(self.module, held, self._covered)
        if self._watched:
            self._guard.verify("between training steps", held)

    def _step(self) -> PrivateStep:
        if self.step is None:
            raise refusals.not_started()
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
