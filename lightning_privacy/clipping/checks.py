"""Does each example's gradient depend on that example alone? Measured, before the first step.

Clipping bounds one unit's influence only if the gradient charged to a unit is its own: the loss
must be a mean over examples of a function of each. Batch norm, a token mean over the batch,
contrastive losses and scaling by a padded length all break that, whatever their class is called. So
a few rows are trained together and alone, and the gradients are compared, for every parameter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.leaves import require_covered
from lightning_privacy.clipping.probe import learn_layouts, without_reentrant_checkpointing
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.randomness import preserved_state, steady, without_randomness
from lightning_privacy.clipping.refusals import dependence, incomplete, memory, needs_company
from lightning_privacy.clipping.row_gradients import (
    LossOf,
    captured,
    difference,
    finite,
    row_of,
    scaled_by,
    sum_of,
    tolerance_of,
)
from lightning_privacy.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from lightning_privacy.clipping.contributions import Contribution
    from lightning_privacy.clipping.layout import Layouts

# Rounding differs from run to run by this much more than permuting the rows shows.
_NOISE_FACTOR = 20.0
_MOST_NOISE = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndependenceReport:
    """What `check_independence` measured.

    Attributes:
        worst: largest relative difference between a row's gradient in the batch and alone.
        parameter: where it was found.
        tolerance: the largest difference that would have passed.
        rows: number of rows compared.
    """

    worst: float
    parameter: str
    tolerance: float
    rows: int


def check_independence(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_of: LossOf,
    rows: Sequence[int],
    *,
    layouts: Layouts,
    loss_reduction: str = "mean",
) -> IndependenceReport:
    """Compare per-example gradients in a batch with those of each row alone.

    Also checks completeness, that the rows' gradients add up to autograd's own, and that the module
    carries nothing from one batch to the next: a row alone gives the same before and after others;
    and that all trainable tensors that the loss depends on are ``parameters``.
    Random operations are constants meanwhile; buffers, gradients and random states are restored.

    Args:
        module: in training mode, as the training will use it.
        parameters: the covered parameters by name.
        loss_of: the training loss of a batch of the given data set rows.
        rows: a few different rows of the data set, at least two.
        layouts: from `learn_layouts`.
        loss_reduction: ``"mean"`` or ``"sum"`` over rows.

    Returns:
        What was measured.

    Raises:
        GuaranteeError: some row's gradient differs by more than the tolerance; names the parameter.
            Or a trainable tensor is not covered.
    """
    scale = float(len(rows)) if loss_reduction == "mean" else 1.0
    loss_of = steady(loss_of)
    still = without_randomness()
    with preserved_state(module), still, full_precision(), torch.enable_grad():
        together = captured(parameters, loss_of, rows, layouts)
        low = still.low_precision
        base = tolerance_of(parameters, low)
        if together is None:
            return IndependenceReport(worst=0.0, parameter="", tolerance=base, rows=0)
        first = _alone(parameters, loss_of, rows[0])
        with without_reentrant_checkpointing():
            require_covered(module, parameters.values(), [loss_of(rows[:1]), loss_of(rows[:1])])
        turned = captured(parameters, loss_of, [*rows[1:], rows[0]], layouts) or {}
        noise = _noise_of_place(module, parameters, together, turned, len(rows), base, low)
        tolerance = max(base, min(_NOISE_FACTOR * noise, _MOST_NOISE * base))
        worst, where = 0.0, ""
        for i, index in enumerate(rows):
            own = row_of(together, i, parameters, scale)
            alone = _alone(parameters, loss_of, index)
            if not finite(alone) and not finite(own):
                continue  # such a row contributes zero to any sum
            if i == 0 and finite(alone):
                _require_no_memory(first, alone, tolerance, low)
            found, name = difference(own, alone, low_precision=low)
            if not found <= tolerance:
                raise dependence(module, name, found, tolerance, scaled_by(own, alone))
            if found >= worst:
                worst, where = found, name
        if all(finite(row_of(together, i, parameters)) for i in range(len(rows))):
            _require_complete(parameters, loss_of, rows, together, tolerance, still.low_precision)
    return IndependenceReport(worst=worst, parameter=where, tolerance=tolerance, rows=len(rows))


def _noise_of_place(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    together: Mapping[str, list[Contribution]],
    turned: Mapping[str, list[Contribution]],
    rows: int,
    base: float,
    low_precision: bool,
) -> float:
    """How much a row's gradient changes with its place in the batch: rounding, or a refusal."""
    noise = 0.0
    for i in range(rows):
        own = row_of(together, i, parameters)
        moved = row_of(turned, (i or rows) - 1, parameters)
        if not finite(own) and not finite(moved):
            continue
        found, name = difference(own, moved, low_precision=low_precision)
        if not found <= base:
            # More than rounding: the gradient depends on where in the batch a row stands.
            raise dependence(module, name, found, base, scaled_by(own, moved))
        noise = max(noise, found)
    return noise


def learn(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], loss_of: LossOf, row: int
) -> Layouts:
    """`learn_layouts` on copies of one data set row, leaving no trace in the module."""
    loss_of = steady(loss_of)
    with preserved_state(module), without_randomness(), torch.enable_grad():
        return learn_layouts(parameters, lambda count: loss_of([row] * count))


def _plain(
    parameters: Mapping[str, nn.Parameter], loss_of: LossOf, rows: Sequence[int]
) -> dict[str, Tensor]:
    """Autograd's own gradient."""
    for parameter in parameters.values():
        parameter.grad = None
    loss = loss_of(rows)
    if loss is not None and loss.requires_grad:
        loss.backward()
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            found[name] = parameter.grad
            parameter.grad = None
    return found


def _alone(parameters: Mapping[str, nn.Parameter], loss_of: LossOf, row: int) -> dict[str, Tensor]:
    try:
        return _plain(parameters, loss_of, [row])
    except PrivacyError:
        raise
    except Exception as error:
        raise needs_company(error) from error


def _require_complete(
    parameters: Mapping[str, nn.Parameter],
    loss_of: LossOf,
    rows: Sequence[int],
    together: Mapping[str, list[Contribution]],
    tolerance: float,
    low_precision: bool,
) -> None:
    plain = _plain(parameters, loss_of, rows)
    total = sum_of(together, len(rows), parameters)
    found, name = difference(total, plain, low_precision=low_precision)
    if not found <= tolerance:
        raise incomplete(name, found, tolerance)


def _require_no_memory(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tolerance: float,
    low_precision: bool,
) -> None:
    found, name = difference(before, after, low_precision=low_precision)
    if not found <= tolerance:
        raise memory(name, found, tolerance)
