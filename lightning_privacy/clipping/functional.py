"""Per-example gradients and clipped sums for research and debugging, without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.contributions import instantiated
from lightning_privacy.clipping.guards import LeakGuard
from lightning_privacy.clipping.norms import FlatClipping
from lightning_privacy.clipping.probe import learn_layouts
from lightning_privacy.clipping.randomness import preserved_state, without_randomness
from lightning_privacy.clipping.refusals import no_single_loss
from lightning_privacy.clipping.units import Units, clipped_sum
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_privacy.clipping.layout import Layouts

LossFunction = Callable[[nn.Module, Any], Tensor]


def per_example_gradients(
    module: nn.Module, loss_fn: LossFunction, batch: Any, *, loss_reduction: str = "mean"
) -> dict[str, Tensor]:
    """The gradient of every example's own loss.

    The module is used as it is: nothing is wrapped, ``.grad`` is not touched. Batch statistics are
    refused; other losses that mix examples are not looked for, as `DifferentialPrivacy` does: of a
    mean over all tokens of a batch, a row is B times that example's part of it.

    Args:
        module: any module; its trainable parameters are covered.
        loss_fn: ``loss_fn(module, batch)`` gives the scalar loss, a mean (or sum) over the examples
            of a function of each example alone.
        batch: a tensor, or tensors in tuples, lists and dicts, all led by the ``B`` examples.
        loss_reduction: ``"mean"`` or ``"sum"``: what ``loss_fn`` does over examples.

    Returns:
        By parameter name, gradients ``[B, *shape]``; row i is the gradient of example i's own loss.
        A parameter that the loss does not use has zeros.

    Raises:
        UnsupportedOperationError: an operation on a trainable parameter has no exact rule.
        GuaranteeError: a gradient arrived outside the capture.
        ConfigurationError: an argument is not what it must be.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> loss = lambda model, x: model(x).square().mean()
        >>> per_example_gradients(model, loss, torch.ones(2, 3))["weight"].shape
        torch.Size([2, 1, 3])
    """
    rows = _rows_of(batch)
    parameters = _trainable(module)
    capture = _captured(module, parameters, loss_fn, batch, instantiate=True)
    scale = _scale(loss_reduction, rows)
    found = capture.collect()
    return {
        name: instantiated(found[name], parameter.shape) * scale
        if name in found
        else parameter.detach().new_zeros(rows, *parameter.shape)
        for name, parameter in parameters.items()
    }


def clipped_gradient_sum(
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    clip_norm: float,
    units: Tensor | Sequence[int] | None = None,
    *,
    loss_reduction: str = "mean",
) -> tuple[dict[str, Tensor], Tensor]:
    """The sum of all units' gradients, each clipped to ``clip_norm``. No noise is added.

    Guarantee: adding or removing one unit changes the sum by at most ``clip_norm`` in Euclidean
    norm over all parameters, up to rounding; a unit whose gradient is not finite contributes zero.

    Args:
        module: any module; its trainable parameters are covered.
        loss_fn: as for `per_example_gradients`.
        batch: as for `per_example_gradients`.
        clip_norm: the bound C, positive.
        units: ``[B]`` the unit of each row, numbered from 0; a unit's gradient is the mean over its
            rows. None: each row is a unit.
        loss_reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The sum by parameter name (float32 or better), and the norms ``[U]`` before clipping, zero
        for a unit that was left out.

    Raises:
        UnsupportedOperationError: an operation on a trainable parameter has no exact rule.
        ConfigurationError: an argument is not what it must be.
    """
    rows = _rows_of(batch)
    parameters = _trainable(module)
    rule = FlatClipping(clip_norm=clip_norm)
    capture = _captured(module, parameters, loss_fn, batch, instantiate=False)
    scale = _scale(loss_reduction, rows)
    device = next(iter(parameters.values())).device
    result = clipped_sum(capture.collect(), parameters, _units(units, rows, scale, device), rule)
    total = {
        name: result.gradients[name]
        if name in result.gradients
        else torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in parameters.items()
    }
    return total, result.norms


def _captured(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    loss_fn: LossFunction,
    batch: Any,
    *,
    instantiate: bool,
) -> Capture:
    rows = _rows_of(batch)
    layouts = _layouts(module, parameters, loss_fn, batch) if rows > 1 else None
    capture = Capture(parameters, rows=rows, layouts=layouts, instantiate=instantiate)
    with capture.opened(), torch.enable_grad(), LeakGuard.watching(parameters):
        loss = loss_fn(module, batch)
        _require_loss(loss)
        capture.armed = True
        loss.backward()
    return capture


def _require_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            must="loss_fn(module, batch) returns the loss, a tensor",
            found=f"{type(loss).__name__}",
            cost="there is no gradient to compute",
            remedy="return the loss; .loss where a model returns an object that holds it",
        )
    if loss.numel() != 1:
        raise no_single_loss(loss.shape)
    if not loss.requires_grad:
        raise ConfigurationError(
            must="the loss depends on the module's trainable parameters",
            found="a loss without a gradient",
            cost="there is no gradient to compute",
            remedy="compute it from the module, without detach() or torch.no_grad()",
        )


def _layouts(
    module: nn.Module, parameters: dict[str, nn.Parameter], loss_fn: LossFunction, batch: Any
) -> Layouts:
    def forward(rows: int) -> object:
        return loss_fn(module, tree_map_only(Tensor, lambda t: _copies(t, rows), batch))

    with preserved_state(module), without_randomness(), torch.enable_grad():
        return learn_layouts(parameters, forward)


def _copies(tensor: Tensor, rows: int) -> Tensor:
    """The first row, that many times; a number is no row."""
    return tensor[:1].expand(rows, *tensor.shape[1:]).clone() if tensor.dim() else tensor


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            must="the arguments are the module, the loss function and a batch, in this order",
            found=f"{type(module).__name__} for a module",
            cost="there is no parameter to take a gradient of",
            remedy="call it as per_example_gradients(module, loss_fn, batch)",
        )
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigurationError(
            must="the module has trainable parameters",
            found=f"{type(module).__name__} has none",
            cost="there is no gradient to protect",
            remedy="unfreeze what should be trained",
        )
    return found


def _rows_of(batch: Any) -> int:
    sizes = {t.shape[0] for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigurationError(
            must="all tensors of the batch are led by the same number of examples, at least one",
            found=f"leading sizes {sorted(sizes)}",
            cost="gradients could not be assigned to examples",
            remedy="pass a batch whose tensors all have the examples first",
        )
    return sizes.pop()


def _units(
    units: Tensor | Sequence[int] | None, rows: int, scale: float, device: torch.device
) -> Units:
    if units is None:
        return Units.rows(torch.ones(rows, device=device), scale)
    index = _index(units, rows, device)
    present = torch.unique(index)
    if index.shape != (rows,) or not torch.equal(
        present, torch.arange(len(present), device=device)
    ):
        found = f"units of shape {tuple(index.shape)} with values {present.tolist()[:10]}"
        raise _wrong_units(rows, found)
    return Units.segments(index.long(), scale)


def _wrong_units(rows: int, found: str) -> ConfigurationError:
    return ConfigurationError(
        must=f"units has one entry for each of the {rows} rows, numbered from 0 without gaps",
        found=found,
        cost="rows would be charged to the wrong unit",
        remedy="number the units of this batch 0, 1, 2, …",
    )


def _index(units: Tensor | Sequence[int], rows: int, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(units, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong_units(rows, f"units={units!r:.80}") from error


def _scale(loss_reduction: str, rows: int) -> float:
    if loss_reduction not in ("mean", "sum"):
        raise ConfigurationError(
            must='loss_reduction is "mean" or "sum"',
            found=f"loss_reduction={loss_reduction!r}",
            cost="examples' gradients would be clipped at the wrong scale",
            remedy="declare what the loss does over the examples of a batch",
        )
    return float(rows) if loss_reduction == "mean" else 1.0
