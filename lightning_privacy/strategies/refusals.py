"""What a private run refuses while it runs, and in which words."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer


def accumulation_refused(found: int) -> UnsupportedOperationError:
    """The refusal of Lightning's gradient accumulation, at set-up and while training.

    Args:
        found: What ``trainer.accumulate_grad_batches`` is.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="accumulate_grad_batches is 1 throughout a private fit",
        found=f"accumulate_grad_batches={found}",
        cost="several draws would share one noise, and losses be divided before clipping",
        remedy=(
            "set DifferentialPrivacy(expected_batch_size=...) to the logical batch; the "
            "DataLoader's batch_size is the physical one. Remove GradientAccumulationScheduler"
        ),
    )


def loaders_refused(found: str) -> UnsupportedOperationError:
    """The refusal of anything but one training loader.

    Args:
        found: What there is instead.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="a private fit reads one training dataloader, which gives Poisson draws",
        found=found,
        cost="batches that no accountant knows, or one unit in several draws of one step",
        remedy="return one torch DataLoader; torch.utils.data.ConcatDataset joins data sets",
    )


def require_own_loader(trainer: Any, loader: object) -> None:
    """Refuse a trainer that iterates anything but the private loader.

    Args:
        trainer: The trainer.
        loader: The private loader.

    Raises:
        UnsupportedOperationError: It iterates something else.
    """
    if trainer.train_dataloader is not loader:
        found = type(trainer.train_dataloader).__name__
        raise loaders_refused(f"Lightning iterates a {found} instead")


def draw_was_split(parts: int) -> GuaranteeError:
    """The refusal of manual optimization on a part of a draw.

    Args:
        parts: Number of micro-batches.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="manual optimization sees a whole draw as one batch",
        found=f"a draw of {parts} micro-batches",
        cost="optimizer steps between the micro-batches would each release a part",
        remedy="set automatic_optimization before the training starts",
    )


def not_started() -> GuaranteeError:
    """The refusal of a training step that comes before the checks.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="the private step exists before the first training step",
        found="a training step, backward or optimizer step before the checks had run",
        cost="gradients that are neither clipped nor noised",
        remedy="train through trainer.fit only",
    )


def refuse_strangers(module: nn.Module, held: Sequence[Tensor], covered: frozenset[int]) -> None:
    """Refuse parameters that became trainable too late.

    Args:
        module: The module that is trained.
        held: All its parameters and buffers, as they are now.
        covered: Identities of the parameters that the private step covers.

    Raises:
        GuaranteeError: There are others that train.
    """
    with torch._C.DisableTorchFunctionSubclass():
        strange = {id(t) for t in held if id(t) not in covered and t.requires_grad}
    # A buffer may be among them, which no optimizer gets.
    names = [n for n, p in module.named_parameters() if id(p) in strange] if strange else []
    if names:
        raise _uncovered(names)


def _uncovered(names: Sequence[str]) -> GuaranteeError:
    return GuaranteeError(
        must="every parameter that trains was trainable when the private fit started",
        found=f"became trainable after the fit had started: {', '.join(names)}",
        cost="gradients that nothing clips: 94 times clip_norm where it was measured",
        remedy="unfreeze before trainer.fit, or end the fit, unfreeze, and fit again",
    )


def second_backward() -> UnsupportedOperationError:
    """The refusal of another backward on sums that wait for their release.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="each manual_backward is followed by an optimizer step before the next one",
        found="a second manual_backward on sums that were not released yet",
        cost="each unit would be in the sum twice, with norm up to 2 clip_norm",
        remedy="add the losses and call manual_backward once, or step in between",
    )


def nothing_to_release(optimizer: Optimizer) -> UnsupportedOperationError:
    """The refusal of a step without a backward.

    Args:
        optimizer: The optimizer.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="each optimizer step follows a manual_backward on the same draw",
        found=f"{type(optimizer).__name__}.step without one",
        cost="a release of noise alone, charged like any other",
        remedy="call manual_backward, not loss.backward, and step in the same training_step",
    )


def closure_called_again(optimizer: Optimizer) -> UnsupportedOperationError:
    """The refusal of an optimizer that evaluates its closure twice.

    Args:
        optimizer: The optimizer.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="an optimizer evaluates its closure once per step",
        found=f"{type(optimizer).__name__} evaluates it again within one step",
        cost="each evaluation is a release of its own, and only one is accounted",
        remedy="use an optimizer of first order such as SGD or AdamW",
    )


def draw_stepped_again() -> UnsupportedOperationError:
    """The refusal of a second optimizer step on a draw that was released.

    Returns:
        The error, to be raised.
    """
    return UnsupportedOperationError(
        must="each draw is followed by one optimizer step",
        found="optimizer_step steps the optimizer again on a draw that was released already",
        cost="several releases about the same units would be charged as if their draws were "
        "independent, and the printed ε would be far too small",
        remedy="step once in LightningModule.optimizer_step; for several steps on a draw use "
        "manual optimization with releases_per_draw",
    )


def closure_never_called(optimizer: Optimizer) -> GuaranteeError:
    """The refusal of an optimizer that ignores its closure.

    Args:
        optimizer: The optimizer.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="an optimizer evaluates the closure that Lightning hands to its step",
        found=f"{type(optimizer).__name__}.step did not",
        cost="an update from gradients that no private step has released",
        remedy="let the optimizer's step call its closure before it updates",
    )


def warn_never_stepped() -> None:
    """Say that a draw was used up without a release."""
    warnings.warn(
        "A draw was never followed by an optimizer step: its clipped sum is dropped. Accumulation "
        "belongs to DifferentialPrivacy(expected_batch_size=...).",
        stacklevel=2,
    )
