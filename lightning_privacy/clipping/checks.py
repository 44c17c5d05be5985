"""Does each example's gradient depend on that example alone? Measured, before the first step.

Clipping bounds one unit's influence only if the gradient charged to a unit is its own: the loss
must be a mean over examples of a function of each. Batch norm, a token mean over the batch,
contrastive losses and scaling by a padded length all break that, whatever their class is called. So
a few rows are trained together and alone, and the gradients are compared, for every parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.contributions import (
    Contribution,
    Dense,
    Lookup,
    Outer,
    instantiated,
)
from lightning_privacy.clipping.probe import learn_layouts
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.randomness import preserved_state, without_randomness
from lightning_privacy.errors import GuaranteeError, PrivacyError

if TYPE_CHECKING:
    from lightning_privacy.clipping.layout import Layouts

LossOf = Callable[[Sequence[int]], Tensor | None]

# Relative difference that arithmetic alone may cause; models compute parts in float32 anyway.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1
# Rounding differs from run to run by this much more than permuting the rows shows.
_NOISE_FACTOR = 20.0
_MOST_NOISE = 2.0
# A gradient below this share of the row's whole gradient is compared on that scale.
_FLOOR = 1e-3


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
    low_precision: bool = False,
) -> IndependenceReport:
    """Compare per-example gradients in a batch with those of each row alone.

    Also checks completeness, that the rows' gradients add up to autograd's own, and that the module
    carries nothing from one batch to the next: a row alone gives the same before and after others.
    Random operations are constants meanwhile; buffers, gradients and random states are restored.

    Args:
        module: in training mode, as the training will use it.
        parameters: the covered parameters by name.
        loss_of: the training loss of a batch of the given data set rows.
        rows: a few different rows of the data set, at least two.
        layouts: from `learn_layouts`.
        loss_reduction: ``"mean"`` or ``"sum"`` over rows.
        low_precision: the forward runs in bfloat16 or float16.

    Returns:
        What was measured.

    Raises:
        GuaranteeError: some row's gradient differs by more than the tolerance; names the parameter.
    """
    scale = float(len(rows)) if loss_reduction == "mean" else 1.0
    base = _LOW_PRECISION_TOLERANCE if low_precision else _base_tolerance(parameters)
    with preserved_state(module), without_randomness(), full_precision(), torch.enable_grad():
        together = _captured(parameters, loss_of, rows, layouts)
        if together is None:
            return IndependenceReport(worst=0.0, parameter="", tolerance=base, rows=0)
        first = _alone(parameters, loss_of, rows[0])
        turned = _captured(parameters, loss_of, [*rows[1:], rows[0]], layouts) or {}
        noise = _noise_of_place(module, parameters, together, turned, len(rows), base)
        tolerance = max(base, min(_NOISE_FACTOR * noise, _MOST_NOISE * base))
        worst, where = 0.0, ""
        for i, index in enumerate(rows):
            own = _row(together, i, parameters, scale)
            alone = _alone(parameters, loss_of, index)
            if not _finite(alone):
                continue  # such a row contributes zero to any sum
            if i == 0:
                _require_no_memory(first, alone, tolerance)
            found, name = _difference(own, alone)
            if not found <= tolerance:
                raise _dependence(module, name, found, tolerance, own, alone)
            if found >= worst:
                worst, where = found, name
        if all(_finite(_row(together, i, parameters)) for i in range(len(rows))):
            _require_complete(parameters, loss_of, rows, together, tolerance)
    return IndependenceReport(worst=worst, parameter=where, tolerance=tolerance, rows=len(rows))


def _noise_of_place(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    together: Mapping[str, list[Contribution]],
    turned: Mapping[str, list[Contribution]],
    rows: int,
    base: float,
) -> float:
    """How much a row's gradient changes with its place in the batch: rounding, or a refusal."""
    noise = 0.0
    for i in range(rows):
        own = _row(together, i, parameters)
        moved = _row(turned, (i or rows) - 1, parameters)
        if not _finite(own) and not _finite(moved):
            continue
        found, name = _difference(own, moved)
        if not found <= base:
            # More than rounding: the gradient depends on where in the batch a row stands.
            raise _dependence(module, name, found, base, own, moved)
        noise = max(noise, found)
    return noise


def learn(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], loss_of: LossOf, row: int
) -> Layouts:
    """`learn_layouts` on copies of one data set row, leaving no trace in the module."""
    with preserved_state(module), without_randomness(), torch.enable_grad():
        return learn_layouts(parameters, lambda count: loss_of([row] * count))


def _captured(
    parameters: Mapping[str, nn.Parameter], loss_of: LossOf, rows: Sequence[int], layouts: Layouts
) -> dict[str, list[Contribution]] | None:
    capture = Capture(parameters, rows=len(rows), layouts=layouts)
    with capture.opened():
        loss = loss_of(rows)
        if loss is None or not loss.requires_grad:
            return None
        capture.armed = True
        loss.backward()
        return capture.collect()


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
        raise GuaranteeError(
            must="the training step works on a batch of one row",
            found=f"{type(error).__name__}: {error}",
            cost="what needs other rows (BatchNorm, a contrastive loss) mixes examples, and then "
            "clipping bounds nobody's influence; Poisson sampling draws single rows too",
            remedy="replace BatchNorm by GroupNorm, or rewrite the loss for each example alone",
        ) from error


def _row(
    found: Mapping[str, list[Contribution]],
    row: int,
    parameters: Mapping[str, nn.Parameter],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """One row's gradients by parameter name."""
    gradients = {}
    for name, items in found.items():
        shape = parameters[name].shape
        own = [_only(item, row) for item in items]
        gradients[name] = instantiated(own, shape)[0] * scale
    return gradients


def _only(item: Contribution, row: int) -> Contribution:
    own = slice(row, row + 1)
    if isinstance(item, Dense):
        return Dense(item.gradients[own])
    if isinstance(item, Outer):
        return Outer(item.left[own], item.right[own])
    return Lookup(item.index[own], item.values[own])


def _difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference over parameters, and where. NaN counts as infinite."""
    whole = max(_norm(first.values()), _norm(second.values()))
    worst, where = 0.0, ""
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            size = _norm([t for t in (a, b) if t is not None])
            found = size / max(whole * _FLOOR, size) if size else 0.0
        else:
            size = max(_norm([a]), _norm([b]), _FLOOR * whole)
            found = _norm([a.double() - b.double()]) / size if size else 0.0
        if found != found:
            found = float("inf")
        if found > worst:
            worst, where = found, name
    return worst, where


def _finite(gradients: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def _norm(tensors: Iterable[Tensor]) -> float:
    squares = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors]
    return math.sqrt(sum(squares))


def _base_tolerance(parameters: Mapping[str, nn.Parameter]) -> float:
    return max(
        _TOLERANCE.get(parameter.dtype, _LOW_PRECISION_TOLERANCE)
        for parameter in parameters.values()
    )


def _require_complete(
    parameters: Mapping[str, nn.Parameter],
    loss_of: LossOf,
    rows: Sequence[int],
    together: Mapping[str, list[Contribution]],
    tolerance: float,
) -> None:
    plain = _plain(parameters, loss_of, rows)
    total: dict[str, Tensor] = {}
    for row in range(len(rows)):
        for name, gradient in _row(together, row, parameters).items():
            total[name] = gradient if name not in total else total[name] + gradient
    found, name = _difference(total, plain)
    if not found <= tolerance:
        raise GuaranteeError(
            must="the per-example gradients add up to autograd's own gradient",
            found=f"{name} differs by {found:.2g} (relative; tolerance {tolerance:.2g})",
            cost="a part of the gradient was captured wrongly or not at all",
            remedy="report this model; until then freeze the parameter",
        )


def _require_no_memory(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], tolerance: float
) -> None:
    found, name = _difference(before, after)
    if not found <= tolerance:
        raise GuaranteeError(
            must="a training step leaves nothing behind that later steps read",
            found=f"{name}: the gradient of one row alone differs by {found:.2g} (relative; "
            f"tolerance {tolerance:.2g}) before and after other rows were computed",
            cost="an example would act on the gradients of others at later steps, where its own "
            "clipping does not bound it (queues of embeddings, moving averages, hidden states)",
            remedy="drop the memory, or fill it from public data",
        )


def _dependence(
    module: nn.Module,
    name: str,
    found: float,
    tolerance: float,
    own: Mapping[str, Tensor],
    alone: Mapping[str, Tensor],
) -> GuaranteeError:
    sizes = _norm(own.values()), _norm(alone.values())
    both = [n for n in own if n in alone]
    product = sum(float((own[n].double() * alone[n].double()).sum()) for n in both)
    aligned = bool(sizes[0] and sizes[1]) and product / (sizes[0] * sizes[1]) > 0.999
    if aligned:
        why = (
            f"; all gradients are scaled by {sizes[0] / sizes[1]:.3g}: the loss divides by "
            "something that other rows change"
        )
        remedy = (
            "average each example's own loss first and then the examples (transformers' `.loss` is "
            "a mean over all tokens of the batch), or declare loss_reduction"
        )
    else:
        batch_norms = [
            label
            for label, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
        ]
        why = f"; batch normalisation at {', '.join(batch_norms[:4])}" if batch_norms else ""
        remedy = (
            "replace BatchNorm by GroupNorm; compute losses and scalings from one example at a "
            "time; keep the batch as first dimension"
        )
    return GuaranteeError(
        must="an example's gradient depends on that example alone",
        found=f"{name}: a row's gradient in a batch differs from the same row's alone by "
        f"{found:.2g} (relative; tolerance {tolerance:.2g}){why}",
        cost="adding one example changes the others' clipped gradients, so the sensitivity is not "
        "clip_norm and the printed ε would be too small",
        remedy=remedy,
    )
