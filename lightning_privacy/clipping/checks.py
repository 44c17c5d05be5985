"""Does each example's gradient depend on that example alone? Measured, before the first step.

Clipping bounds one unit's influence only if the gradient charged to a unit is its own: the loss
must be a mean over examples of a function of each. Batch norm, a token mean over the batch,
contrastive losses and scaling by a padded length all break that, whatever their class is called. So
a few rows are trained together and alone, and the gradients are compared, for every parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.leaves import require_covered
from lightning_privacy.clipping.probe import learn_layouts, without_reentrant_checkpointing
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.randomness import preserved_state, steady, without_randomness
from lightning_privacy.clipping.refusals import dependence, incomplete, memory, needs_company
from lightning_privacy.clipping.row_gradients import (
    Gradients,
    LossOf,
    captured,
    difference,
    finite,
    floor_of,
    norm,
    rounding_of,
    row_of,
    scaled_by,
    tolerance_of,
)
from lightning_privacy.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from lightning_privacy.clipping.layout import Layouts

# Rounding differs from run to run by this much more than permuting the rows shows.
_NOISE_FACTOR = 20.0
_MOST_NOISE = 2.0

_Apart = Callable[..., tuple[float, str]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndependenceReport:
    """What `check_independence` measured.

    Attributes:
        worst: largest relative difference between a row's gradient in the batch and alone.
        parameter: where it was found.
        tolerance: the largest difference that would have passed for any row.
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
    negligible: float = 0.0,
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
        negligible: a row's gradient below this norm is compared on that scale, because of rounding.

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
        placed, moved = (
            [row_of(found, i, parameters, scale) for i in range(len(rows))]
            for found in (together, turned)
        )
        apart = functools.partial(difference, floor=floor_of(negligible, low), low_precision=low)
        comparison = _Comparison(module, parameters, loss_of, apart)
        noise, _ = comparison.worst(rows, placed, [moved[-1], *moved[:-1]], base)
        tolerance = max(base, min(_NOISE_FACTOR * noise, _MOST_NOISE * base))
        alone = (_alone(parameters, loss_of, row) for row in rows)
        worst, where = comparison.worst(rows, placed, alone, tolerance, first)
        if all(map(finite, placed)):
            plain = _plain(parameters, loss_of, rows)
            _require_complete(placed, plain, scale, tolerance, apart)
    return IndependenceReport(worst=worst, parameter=where, tolerance=tolerance, rows=len(rows))


@dataclasses.dataclass(frozen=True, slots=True)
class _Comparison:
    """How rows' gradients in a batch are compared with what they are otherwise."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss_of: LossOf
    apart: _Apart

    def worst(
        self,
        rows: Sequence[int],
        placed: Sequence[Mapping[str, Tensor]],
        otherwise: Iterable[Mapping[str, Tensor]],
        tolerance: float,
        before: Mapping[str, Tensor] | None = None,
    ) -> tuple[float, str]:
        """The largest difference and where; more than rounding is refused.

        ``before`` is what the first row was before any other, and must still be.
        """
        worst, where = 0.0, ""
        for row, own, other in zip(rows, placed, otherwise, strict=True):
            if before is not None and finite(other):
                _require_no_memory(before, other, tolerance, self.apart)
            before = None
            if not finite(own) and not finite(other):
                continue  # such a row contributes zero to any sum
            found, name = self.apart(own, other)
            if not found <= tolerance and not found <= self.rounding(row):
                raise dependence(self.module, name, found, tolerance, scaled_by(own, other))
            if found >= worst:
                worst, where = found, name
        return worst, where

    def rounding(self, row: int) -> float:
        """How much rounding can do to a row alone."""
        alone = _alone(self.parameters, self.loss_of, row)
        again = functools.partial(_alone, self.parameters, self.loss_of, row)
        return rounding_of(self.parameters, lambda: self.apart(again(), alone)[0])


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
    rows: Sequence[Gradients],
    plain: Mapping[str, Tensor],
    scale: float,
    tolerance: float,
    apart: _Apart,
) -> None:
    """The rows' gradients add up to autograd's own."""
    names = rows[0]
    total = Gradients(names, lambda name: functools.reduce(torch.add, (row[name] for row in rows)))
    whole = Gradients(plain, lambda name: plain[name] * scale)
    # Rows may cancel, as they do at an optimum: what is left is rounding of what they are.
    sizes = {name: math.sqrt(sum(norm([row[name]]) ** 2 for row in rows)) for name in names}
    found, name = apart(total, whole, sizes=sizes)
    if not found <= tolerance:
        raise incomplete(name, found, tolerance)


def _require_no_memory(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], tolerance: float, apart: _Apart
) -> None:
    found, name = apart(before, after)
    if not found <= tolerance:
        raise memory(name, found, tolerance)
