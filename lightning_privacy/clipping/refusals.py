"""What the checks of independence refuse, and in which words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from lightning_privacy.errors import ConfigurationError, GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOVING = nn.utils.parametrizations._SpectralNorm
_MIXED = (
    "adding one example changes the others' clipped gradients, so the sensitivity is not clip_norm "
    "and the printed ε would be too small"
)


def dependence(
    module: nn.Module,
    name: str,
    found: float,
    tolerance: float,
    scaled: float | None,
    rows: int | None = None,
) -> GuaranteeError:
    """The refusal of a gradient that other rows change.

    Args:
        module: the module that is trained.
        name: the parameter that differs most.
        found: by how much, relative.
        tolerance: how much would have passed.
        scaled: the factor between both gradients, if that is all that differs.
        rows: how many rows were compared with their halves; None for one row with itself alone.

    Returns:
        The error, to be raised.
    """
    if scaled is not None:
        why = (
            f"; all gradients are scaled by {scaled:.4g}: the loss divides by "
            "something that other rows change"
        )
        remedy = (
            "average each example's own loss first and then the examples (transformers' `.loss` is "
            "a mean over all tokens of the batch); or declare loss_reduction as what the loss is "
            'over the examples, "sum" or "mean"'
        )
    else:
        why = _suspects(module, name)
        if found == math.inf:
            why += "; one of them is not finite: a variance over the rows, of which one has none?"
        remedy = (
            "replace BatchNorm by GroupNorm, spectral by weight normalisation; compute losses and "
            "scalings from one example at a time; keep the batch as first dimension; pad to a "
            "fixed length where padding matters"
        )
    compared = "a row's gradient in a batch differs from the same row's alone"
    if rows is not None:
        compared = f"the gradients of {rows} rows together differ from those in two half batches"
    return GuaranteeError(
        must="an example's gradient depends on that example alone",
        found=f"{name}: {compared} by {found:.2g} (relative; tolerance {tolerance:.2g}){why}",
        cost=_MIXED,
        remedy=remedy,
    )


def _suspects(module: nn.Module, name: str) -> str:
    """Say which parts of a module usually mix examples, or change from pass to pass."""
    said = ""
    for kind, what in (
        (nn.modules.batchnorm._BatchNorm, "batch normalisation at"),
        (_MOVING, "spectral normalisation moves its vectors at each pass:"),
    ):
        if labels := [label for label, part in module.named_modules() if isinstance(part, kind)]:
            said += f"; {what} {', '.join(labels[:4])}"
    if name.endswith("_reverse"):
        said += "; the backward direction of a recurrent layer begins with the padding"
    return said


def no_single_loss(shape: Sequence[int]) -> ConfigurationError:
    """The refusal of a loss that is not one number.

    Args:
        shape: what the loss is shaped like.

    Returns:
        The error, to be raised.
    """
    return ConfigurationError(
        must="the loss is one number, a mean or a sum over the examples",
        found=f"a loss of shape {tuple(shape)}",
        cost="it would not be known what belongs to which example",
        remedy="average the examples' losses, for instance by .mean(); loss functions do it "
        'themselves where reduction="none" is left out',
    )


def incomplete(name: str, found: float, tolerance: float) -> GuaranteeError:
    """The refusal of a gradient that the capture sees only in part.

    Args:
        name: the parameter that differs most.
        found: by how much, relative.
        tolerance: how much would have passed.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="the per-example gradients add up to autograd's own gradient",
        found=f"{name} differs by {found:.2g} (relative; tolerance {tolerance:.2g})",
        cost="a part of the gradient was captured wrongly or not at all",
        remedy="report this model; until then freeze the parameter",
    )


def memory(name: str, found: float, tolerance: float) -> GuaranteeError:
    """The refusal of a module that carries something from one batch to the next.

    Args:
        name: the parameter that differs most.
        found: by how much, relative.
        tolerance: how much would have passed.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="a training step leaves nothing behind that later steps read",
        found=f"{name}: the gradient of one row alone differs by {found:.2g} (relative; "
        f"tolerance {tolerance:.2g}) before and after other rows were computed",
        cost="an example would act on the gradients of others at later steps, where its own "
        "clipping does not bound it (queues of embeddings, moving averages, hidden states)",
        remedy="drop the memory, or fill it from public data; draw random numbers from the global "
        "generators of torch, NumPy or Python, which the check can hold still",
    )


def needs_company(error: Exception) -> GuaranteeError:
    """The refusal of a training step that fails on a single row.

    Args:
        error: what it raised.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="the training step works on a batch of one row",
        found=f"{type(error).__name__}: {error}",
        cost="what needs other rows (BatchNorm, a contrastive loss) mixes examples, and then "
        "clipping bounds nobody's influence; Poisson sampling draws single rows too",
        remedy="replace BatchNorm by GroupNorm, or rewrite the loss for each example alone",
    )


def weighted_mean() -> GuaranteeError:
    """The refusal of class weights in a mean over rows.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="an example's gradient depends on that example alone",
        found="cross_entropy or nll_loss over several rows with weight= and a mean, which divides "
        "by the sum of the weights of all labels in the batch",
        cost=_MIXED,
        remedy='pass reduction="none" with the same weight=, average each example\'s own losses, '
        "and then take the plain mean over the examples",
    )


def uneven_labels(found: str) -> GuaranteeError:
    """The refusal of a mean over the labels of rows that do not all have as many.

    Args:
        found: which numbers were seen.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="where a mean goes over the labels of several rows, every row has as many",
        found=f"cross_entropy or nll_loss with a mean over several rows, and {found}",
        cost=_MIXED,
        remedy='pass reduction="none", average each example\'s own losses, and then take the mean '
        "over the examples",
    )


def outside(names: Sequence[str]) -> GuaranteeError:
    """The refusal of trainable tensors that the private step does not cover.

    Args:
        names: what is known about each of them.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="every trainable tensor that the loss depends on is a parameter of the module",
        found=f"others that require gradients, kept from step to step: {', '.join(names)}",
        cost="their gradients are neither clipped nor noised, and whatever steps them trains "
        "without privacy",
        remedy="assign each as an nn.Parameter (or in an nn.ParameterList) to the module, or take "
        "requires_grad from it",
    )


def rows_read_together(row: int) -> GuaranteeError:
    """The refusal of a data set that gives a row other contents in company.

    Args:
        row: its position.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="a row of the data set holds the same whichever rows are read with it",
        found=f"__getitems__ gives row {row} other contents together with others than alone",
        cost=_MIXED,
        remedy="transform each row by itself; leave padding to the collate function",
    )
