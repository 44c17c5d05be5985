"""Does a row's gradient change with how many rows are beside it? Asked at the size that trains.

A capacity, a top-k over the batch, statistics that begin above some size or a count of labels may
mix the rows of a full batch and none of a few. So all rows' gradients in a full batch are compared
with the same rows' in two half batches: whatever other rows do to a row, half of them do something
else. A sum with random signs stands for all rows at once.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import TYPE_CHECKING

import torch

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.contributions import squared_norms
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.randomness import preserved_state, steady, without_randomness
from lightning_privacy.clipping.refusals import dependence
from lightning_privacy.clipping.row_gradients import (
    GradientCheck,
    LossOf,
    captured,
    difference,
    finite,
    scaled_by,
    tolerance_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


# Other places in the batch show how much rounding can do; and rounding does no more than this.
_NOISE_FACTOR, _MOST_NOISE = 5.0, 2.0
# So many rows without a finite gradient are computed alone, too.
_FEW = 8


@dataclasses.dataclass(slots=True)
class _Sum:
    """Rows' gradients, each with its sign, added up; and how large that is if nothing cancels.

    Rows that are alike cancel where their signs differ, and leave rounding alone. So differences
    are relative to what the sum is on average over the signs.

    Args:
        gradients: The sums, by parameter name.
        squares: The rows' squared norms, added up, by parameter name.
    """

    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    squares: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether a private step would leave out none of the rows."""
        return finite(self.gradients) and all(map(math.isfinite, self.squares.values()))

    def add(self, name: str, parts: Sequence[Tensor], squares: float) -> None:
        """Add rows' gradients of a parameter, and their squared norms."""
        for part in parts:
            before = self.gradients.get(name)
            self.gradients[name] = part if before is None else before + part
        self.squares[name] = self.squares.get(name, 0.0) + squares

    def difference(self, other: _Sum, floor: float, low_precision: bool) -> tuple[float, str]:
        """The largest relative difference of two such sums, and the parameter's name."""
        squares = (self.squares, other.squares)
        names = {name for each in squares for name in each}
        sizes = {name: math.sqrt(max(each.get(name, 0.0) for each in squares)) for name in names}
        return difference(
            self.gradients, other.gradients, floor=floor, low_precision=low_precision, sizes=sizes
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompanyCheck(GradientCheck):
    """Compares the gradients of many rows together with those in two halves."""

    def run(self, rows: Sequence[int]) -> None:
        """Compare.

        Args:
            rows: data set rows, as many as a training batch holds.

        Raises:
            GuaranteeError: some row's gradient depends on the rows beside it.
        """
        signs = {row: secrets.choice((-1.0, 1.0)) for row in rows}
        still, loss_of = without_randomness(), steady(self.loss_of)
        with preserved_state(self.module), still, full_precision(), torch.enable_grad():
            whole, halves = self._whole_and_halves(loss_of, rows, signs)
            if not (whole.finite and halves.finite):
                # A row whose gradient is not finite contributes zero, and hides the others here.
                rows = self._finite_rows(loss_of, rows)
                whole, halves = self._whole_and_halves(loss_of, rows, signs)
            if len(rows) < 2:
                return
            low, floor = still.low_precision, self.negligible * math.sqrt(len(rows))
            found, name = whole.difference(halves, floor, low)
            tolerance = tolerance_of(self.parameters, low)
            if found <= tolerance:
                return
            turned = self._signed(loss_of, rows[::-1], signs)
            noise = whole.difference(turned, floor, low)[0]
            tolerance = max(tolerance, min(_NOISE_FACTOR * noise, _MOST_NOISE * tolerance))
            if not found <= tolerance:
                scaled = scaled_by(whole.gradients, halves.gradients)
                raise dependence(self.module, name, found, tolerance, scaled, rows=len(rows))

    def gradient(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """The sum of some rows' own gradients, by parameter name.

        Args:
            rows: data set rows.

        Returns:
            The sum; nothing is drawn at random meanwhile.
        """
        loss_of = steady(self.loss_of)
        still = without_randomness()
        with preserved_state(self.module), still, full_precision(), torch.enable_grad():
            return self._signed(loss_of, rows, dict.fromkeys(rows, 1.0)).gradients

    def _whole_and_halves(
        self, loss_of: LossOf, rows: Sequence[int], signs: Mapping[int, float]
    ) -> tuple[_Sum, _Sum]:
        """The signed sums of all rows in one batch, and of the same in two."""
        halves = _Sum()
        for half in filter(len, (rows[::2], rows[1::2])):
            self._signed(loss_of, half, signs, halves)
        return (self._signed(loss_of, rows, signs) if len(rows) else _Sum()), halves

    def _finite_rows(self, loss_of: LossOf, rows: Sequence[int]) -> list[int]:
        """Those whose gradient is finite; of some others, whether it is not so alone either."""
        lost = self._lost(loss_of, rows)
        for row in [row for row in rows if row in lost][:_FEW]:
            if not self._lost(loss_of, [row]):
                name, tolerance = next(iter(self.parameters)), tolerance_of(self.parameters, False)
                raise dependence(self.module, name, math.inf, tolerance, None, rows=len(rows))
        return [row for row in rows if row not in lost]

    def _lost(self, loss_of: LossOf, rows: Sequence[int]) -> set[int]:
        """Rows that a private step would leave out."""
        found = captured(self.parameters, loss_of, rows, self.layouts) or {}
        norms = torch.stack([torch.zeros(len(rows)), *(n.cpu() for n in squared_norms(found))])
        finite_norms = norms.sum(0).isfinite().tolist()
        return {row for row, kept in zip(rows, finite_norms, strict=True) if not kept}

    def _signed(
        self,
        loss_of: LossOf,
        rows: Sequence[int],
        signs: Mapping[int, float],
        total: _Sum | None = None,
    ) -> _Sum:
        """The sum of the rows' own gradients, each with its sign; added to ``total``."""
        total = _Sum() if total is None else total
        found = captured(self.parameters, loss_of, rows, self.layouts) or {}
        scale = float(len(rows)) if self.loss_reduction == "mean" else 1.0
        for name in list(found):
            parameter, items = self.parameters[name], found.pop(name)
            weights = torch.tensor([signs[row] * scale for row in rows], device=parameter.device)
            squares = sum(float(part.double().sum()) for part in squared_norms({name: items}))
            parts = [item.weighted_sum(weights, parameter.shape) for item in items]
            total.add(name, parts, scale**2 * squares)
        return total
