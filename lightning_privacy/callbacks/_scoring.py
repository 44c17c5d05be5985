"""The loss of single examples under a model in training, in evaluation mode and without a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_privacy.audit.attacks.texts import adapters_off, evaluating
from lightning_privacy.callbacks._probe import _quiet, attributes_kept
from lightning_privacy.clipping.randomness import preserved_state
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.strategies.draw import loss_in
from lightning_privacy.strategies.sharding import Root

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    LossFunction = Callable[[Any, Any], Tensor]


class ExampleLosses:
    """Computes each example's own loss.

    By the module's method ``losses(batch)``, which gives ``[B]``; of a module without one, by its
    ``training_step`` on batches of one.

    Args:
        trainer: The trainer of the fit.
        collate: Makes a batch of examples, as the training loader does.
        batch_size: Most examples of one forward.
        losses: In the place of the method: gets module and batch, returns ``[B]``.

    Raises:
        UnsupportedOperationError: The module has no such method, and optimizes by itself, so that
            its training step cannot be asked either.
    """

    def __init__(
        self,
        trainer: Any,
        collate: Callable[[Sequence[Any]], Any],
        batch_size: int,
        losses: LossFunction | None = None,
    ) -> None:
        self._trainer, self._collate = trainer, collate
        module = trainer.lightning_module
        own = getattr(type(module), "losses", None)
        self._losses = losses if losses is not None else own
        self._size = batch_size if self._losses is not None else 1
        if self._losses is None and not module.automatic_optimization:
            raise UnsupportedOperationError(
                must="the loss of a single example can be computed",
                found="manual optimization, and no method `losses(batch)` on the module",
                cost="no attack: a training step would train",
                remedy="give the module a method losses(batch) -> Tensor [B], or pass losses=",
            )

    def __call__(self, dataset: Any, rows: Sequence[int]) -> Tensor:
        """Compute losses.

        Args:
            dataset: A map-style data set.
            rows: Which of its examples.

        Returns:
            ``[N]`` float64 losses on the CPU.

        Raises:
            ConfigurationError: They are not one number for each example.
        """
        trainer, module = self._trainer, self._trainer.lightning_module
        found = []
        with attributes_kept(module), preserved_state(module), _quiet(module), evaluating(module):
            for start in range(0, len(rows), self._size):
                chosen = rows[start : start + self._size]
                batch = self._transferred(self._collate([dataset[row] for row in chosen]))
                with trainer.strategy.precision_plugin.forward_context():
                    found.append(_checked(self._of(module, batch), len(chosen)))
        return torch.cat(found)

    def before(self, dataset: Any, rows: Sequence[int]) -> Tensor | None:
        """The same of the model before fine-tuning, where it can still be had.

        Args:
            dataset: As for the call.
            rows: As for the call.

        Returns:
            The losses with adapters switched off; of a module without adapters, those of now, if
            nothing was trained yet; else None.
        """
        with adapters_off(self._trainer.lightning_module) as found:
            if found or self._trainer.global_step == 0:
                return self(dataset, rows)
        return None

    def _of(self, module: Any, batch: Any) -> Tensor | None:
        # Parts that are sharded are gathered for a step that their root knows of.
        root = Root.of(module)
        return self._step(module, batch) if root is None else root.around(self._step, module, batch)

    def _step(self, module: Any, batch: Any) -> Tensor | None:
        if self._losses is not None:
            return self._losses(module, batch)
        arguments = (0,) if is_param_in_hook_signature(module.training_step, "batch_idx") else ()
        loss = loss_in(module.training_step(batch, *arguments))
        return None if loss is None else loss.reshape(1)

    def _transferred(self, batch: Any) -> Any:
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = strategy.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)


def _checked(losses: Tensor | None, count: int) -> Tensor:
    if losses is None or losses.shape != (count,):
        raise ConfigurationError(
            must=f"there is one loss for each of {count} examples, in one dimension",
            found="None" if losses is None else f"a tensor of shape {tuple(losses.shape)}",
            cost="scores of a batch, which say nothing of a single example",
            remedy="return a Tensor [B] of each example's own loss",
        )
    return losses.detach().double().cpu()
