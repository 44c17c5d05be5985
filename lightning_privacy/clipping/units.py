"""Units are segments: which rows form one unit, what counts, and the clipped sum over units.

Legend: ``B`` rows, ``U`` units, ``K`` groups of parameters that are clipped together.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_privacy.clipping.contributions import (
    Contribution,
    Dense,
    Lookup,
    Outer,
    squared_norms,
)
from lightning_privacy.clipping.products import full_precision, skips_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_privacy.clipping.buffer import RowBuffer
    from lightning_privacy.clipping.norms import ClippingRule

# So many sums keep a GPU busy until the next ones come.
_AHEAD = 16

# Stands for all parameters in the buffer; no parameter has an empty name.
_BUFFER = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Units:
    """Rows and the units they belong to.

    Attributes:
        count: number of units ``U``.
        scale: ``[B]`` what a row's captured gradient is multiplied by: 0 for rows that only fill
            the batch, and otherwise what undoes the loss's mean and takes the unit's own mean.
        index: ``[B]`` the unit of each row; None when each row is a unit of its own.
        places: ``[B]`` where each row lies when every unit is padded to ``most`` rows.
        most: the most rows of a unit.
    """

    count: int
    scale: Tensor
    index: Tensor | None = None
    places: Tensor | None = None
    most: int = 1

    @classmethod
    def rows(cls, weights: Tensor, reduction_scale: float) -> Units:
        """Each row is a unit; ``weights [B]`` is 0 for filling rows and 1 for others."""
        return cls(count=len(weights), scale=weights * reduction_scale)

    @classmethod
    def segments(
        cls, index: Tensor, weights: Tensor | float = 1.0, sizes: Tensor | None = None
    ) -> Units:
        """Units of several rows; a unit's gradient is its rows' mean.

        Args:
            index: ``[B]``: each row's unit, 0 to U-1.
            weights: what a row's gradient is multiplied by before the mean; ``[B]`` or for all.
            sizes: ``[U]`` over how many rows to take the mean; None for those that are here.
        """
        here = (
            torch.bincount(index) if sizes is None else torch.bincount(index, minlength=len(sizes))
        )
        sizes = here if sizes is None else sizes
        first = torch.cumsum(here, 0) - here
        order = torch.argsort(index, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device) - first[index[order]]
        most = int(here.max())
        # In float64: thirds must not cost a float64 gradient its last digits.
        scale = weights / sizes[index].double()
        return cls(len(sizes), scale, index, index * most + position, most)

    def to(self, device: torch.device) -> Units:
        """The same on a device, without a wait for what it still has to do."""
        return dataclasses.replace(
            self,
            scale=sent(self.scale, device),
            index=None if self.index is None else sent(self.index, device),
            places=None if self.places is None else sent(self.places, device),
        )

    @property
    def members(self) -> Tensor:
        """``[U]`` whether a unit has rows that count."""
        if self.index is None:
            return self.scale != 0
        live = torch.zeros(self.count, device=self.scale.device)
        return live.index_add_(0, self.index, (self.scale != 0).to(live.dtype)) > 0

    @property
    def unit_scale(self) -> Tensor:
        """``[U]`` what remains to be multiplied after `gathered`."""
        return self.scale if self.index is None else torch.ones_like(self.scale[: self.count])

    def gathered(self, item: Contribution) -> Contribution:
        """A contribution of rows as one of units; the same where each row is a unit."""
        if self.index is None:
            return item
        if isinstance(item, Dense):
            scaled = item.gradients * _column(self.scale, item.gradients)
            total = scaled.new_zeros(self.count, *scaled.shape[1:])
            return Dense(total.index_add_(0, self.index, scaled))
        if isinstance(item, Outer):
            left = item.left * _column(self.scale, item.left)
            return Outer(self._side_by_side(left), self._side_by_side(item.right))
        values = item.values * _column(self.scale, item.values)
        return Lookup(self._side_by_side(item.index), self._side_by_side(values))

    def _side_by_side(self, tensor: Tensor) -> Tensor:
        """``[B, M, ..]`` to ``[U, most rows of a unit * M, ..]``, zeros where a unit has fewer."""
        if self.places is None:
            raise AssertionError("rows are units already")
        padded = tensor.new_zeros(self.count * self.most, *tensor.shape[1:])
        padded[self.places] = tensor
        return padded.view(self.count, self.most * tensor.shape[1], *tensor.shape[2:])


@dataclasses.dataclass(frozen=True, slots=True)
class ClippedSum:
    """The clipped contributions of one micro-batch, summed over its units.

    Attributes:
        gradients: by parameter name, in float32 or better; absent where nothing contributed.
        norms: ``[U]`` each unit's norm over all parameters before clipping; 0 for filling rows.
        factors: ``[U]`` the smallest factor by which a unit was scaled; 0 when left out.
        nonfinite: ``[U]`` units left out because their gradient was not finite.
        members: ``[U]`` units that count.
        buffered: ``[P]`` the sum for the parameters of the buffer, in the order of its layout.
        weights: ``[K, U]`` what a unit's gradient was multiplied by.
        excluded: ``[U]`` units to leave out by selection; None if there are none.
    """

    gradients: dict[str, Tensor]
    norms: Tensor
    factors: Tensor
    nonfinite: Tensor
    members: Tensor
    buffered: Tensor | None = None
    weights: Tensor | None = None
    excluded: Tensor | None = None


@full_precision()
def clipped_sum(  # noqa: PLR0913 - what there is, how to clip it, and where it goes
    found: dict[str, list[Contribution]],
    parameters: Mapping[str, nn.Parameter],
    units: Units,
    rule: ClippingRule,
    buffer: RowBuffer | None = None,
    share: float = 1.0,
    add: Callable[[str, Tensor], None] | None = None,
    further: Sequence[Tensor] = (),
) -> ClippedSum:
    """Clip each unit's gradient by ``rule`` and add up.

    Guarantee: adding or removing one unit changes the sum by at most ``rule.sensitivity`` in
    Euclidean norm, up to rounding (the plan's ``precision_slack``), whatever the unit holds: one
    with a NaN or an infinite norm contributes exactly zero, by selection. (Abadi et al. 2016,
    arXiv 1607.00133, algorithm 1.)

    Args:
        found: contributions of rows by parameter name. Emptied while working, to free memory.
        parameters: the covered parameters by name; one without contributions has gradient zero.
        units: which rows form which unit.
        rule: how to clip.
        buffer: the rest of the rows' gradients; only for a rule with one group.
        share: what the sum is multiplied by.
        add: takes each parameter's sum as soon as it is there, so that not all are held at once;
            ``gradients`` is empty then.
        further: squared norms ``[U]`` of gradients that are not in ``found``, before ``scale``; for
            units of one row and a rule with one group.
    """
    if buffer is not None:
        found[_BUFFER] = [Dense(buffer.gradients)]
    names = list(found)
    gathered = {name: [units.gathered(item) for item in found.pop(name)] for name in names}
    members, scale = units.members, units.unit_scale
    by_group = _group_norms(gathered, rule, scale, further)
    squared = by_group.sum(0)
    finite = torch.isfinite(squared)
    taken = finite & members
    factors = torch.where(taken, rule.factors(torch.where(taken, by_group, 0)), 0)
    weights = factors * scale.to(factors.dtype) * share
    gradients: dict[str, Tensor] = {}

    def keep(name: str, total: Tensor) -> None:
        if add is None or not name:
            gradients[name] = total
        else:
            add(name, total)

    excluded = _sum_up(gathered, parameters, weights, rule, taken, keep)
    norms = torch.where(taken, squared, 0).sqrt()
    smallest = factors.amin(0) if len(factors) else torch.ones_like(norms)
    buffered = gradients.pop(_BUFFER, None)
    lost = ~finite & members
    return ClippedSum(gradients, norms, smallest, lost, members, buffered, weights, excluded)


def _group_norms(
    gathered: Mapping[str, list[Contribution]],
    rule: ClippingRule,
    scale: Tensor,
    further: Sequence[Tensor],
) -> Tensor:
    """``[K, U]`` squared norms by group."""
    by_group: list[dict[str, list[Contribution]]] = [{} for _ in range(rule.groups)]
    for name, items in gathered.items():
        by_group[_group_of(name, rule)][name] = items
    norms = [[torch.zeros_like(scale), *squared_norms(members)] for members in by_group]
    norms[0] += further
    dtype = reduce(torch.promote_types, (norm.dtype for group in norms for norm in group))
    totals = [torch.stack([norm.to(dtype) for norm in group]).sum(0) for group in norms]
    return torch.stack(totals) * scale.to(dtype).square()


def _sum_up(
    gathered: dict[str, list[Contribution]],
    parameters: Mapping[str, nn.Parameter],
    weights: Tensor,
    rule: ClippingRule,
    taken: Tensor,
    keep: Callable[[str, Tensor], None],
) -> Tensor | None:
    """``keep`` the weighted sums in order, with exact zeros for units that are not ``taken [U]``.

    Whether all units are taken has to be known before most sums, and to learn it is to wait for a
    GPU. So it is given the first few before, which are done again in the rare other case.

    Returns:
        Units to leave out; None if it is known that there are none.
    """

    def total(name: str, items: list[Contribution]) -> Tensor:
        shape = parameters[name].shape if name else torch.Size([-1])
        return _weighted(items, weights[_group_of(name, rule)], shape)

    ahead: dict[str, Tensor] | None = None
    excluded = None
    for name in [*gathered]:
        if ahead is None and not all(map(_skips_zeros, gathered[name])):
            early = [*gathered][:_AHEAD] if taken.is_cuda else []
            ahead = {name: total(name, gathered[name]) for name in early}
            if not bool(taken.all()):
                excluded, ahead = ~taken, {}
        items = gathered.pop(name)
        if excluded is not None:
            items = [item.without(excluded) for item in items]
        known = ahead.pop(name, None) if ahead else None
        keep(name, total(name, items) if known is None else known)
    return ~taken if ahead is None else excluded


def _group_of(name: str, rule: ClippingRule) -> int:
    return rule.group_of(name) if name != _BUFFER else 0


def _skips_zeros(item: Contribution) -> bool:
    return isinstance(item, Dense) and skips_zeros(item.gradients)


def _weighted(items: list[Contribution], coefficients: Tensor, shape: torch.Size) -> Tensor:
    total = items[0].weighted_sum(coefficients, shape)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    for item in items[1:]:
        total = total + item.weighted_sum(coefficients, shape)
    return total


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from pageable memory it would wait for all that a GPU has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _column(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
