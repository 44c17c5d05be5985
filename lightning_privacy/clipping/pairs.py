"""The check of independence on two rows: cheap enough to be repeated while the model trains.

A loss may begin to mix examples in a later epoch, or only where rows differ that the check before
the first step did not draw.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.clipping.label_means import LabelMean, LabelWatch, label_means
from lightning_privacy.clipping.leaves import require_covered
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.randomness import (
    Draws,
    preserved_state,
    steady,
    without_randomness,
)
from lightning_privacy.clipping.refusals import dependence, memory
from lightning_privacy.clipping.row_gradients import (
    MOST_ROUNDING,
    GradientCheck,
    LossOf,
    captured,
    difference,
    finite,
    floor_of,
    row_of,
    scaled_by,
    tolerance_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


# Rounding beside another row may be this much more than beside a copy.
_NOISE_FACTOR = 5.0


@dataclasses.dataclass(slots=True)
class _Batch:
    """What one forward and backward showed; gradients by row and parameter name."""

    loss: Tensor | None = None
    means: list[LabelMean] = dataclasses.field(default_factory=list)
    gradients: list[Mapping[str, Tensor]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairCheck(GradientCheck):
    """Compares the gradients of two rows together with those of each alone.

    No raw gradient reaches a parameter meanwhile: a row alone is captured, too.

    Args:
        labels: learns which means over labels every step is to be watched for.
    """

    labels: LabelWatch = dataclasses.field(default_factory=LabelWatch)

    def run(self, pair: Sequence[int], draws: Draws = Draws.MIDDLE, place: int = 0) -> None:
        """Compare one of two rows.

        Args:
            pair: two data set rows that differ in what a loss may divide by: labels, lengths.
            draws: what random operations give meanwhile.
            place: which of the two is computed alone.

        Raises:
            GuaranteeError: a gradient depends on the other row or on earlier ones, a mean over
                labels is not one over examples, or a trainable tensor is not covered.
        """
        still, loss_of = without_randomness(draws), steady(self.loss_of, draws)
        with preserved_state(self.module), still, full_precision(), torch.enable_grad():
            first, together, alone = (
                self._batch(loss_of, rows) for rows in (pair[place:][:1], pair, pair[place:][:1])
            )
            require_covered(self.module, self.parameters.values(), [first.loss, alone.loss])
            own, shared = alone.gradients[0], together.gradients[place]
            if finite(own):
                self._require_same(first.gradients[0], own, still.low_precision)
            # Otherwise the row contributes zero to any sum, alone as in company.
            if finite(own) or finite(shared):
                self._require_own(loss_of, pair[place], place, shared, own, still.low_precision)
            self.labels.learn(alone.means, together.means)

    def _batch(self, loss_of: LossOf, rows: Sequence[int]) -> _Batch:
        batch = _Batch()

        def noted(chosen: Sequence[int]) -> Tensor | None:
            with label_means(batch.means, len(chosen)):
                batch.loss = loss_of(chosen)
            return batch.loss

        found = captured(self.parameters, noted, rows, self.layouts) or {}
        scale = float(len(rows)) if self.loss_reduction == "mean" else 1.0
        batch.gradients = [row_of(found, n, self.parameters, scale) for n in range(len(rows))]
        return batch

    def _require_same(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], low: bool
    ) -> None:
        found, name = self._difference(before, after, low)
        tolerance = tolerance_of(self.parameters, low)
        if not found <= tolerance:
            raise memory(name, found, tolerance)

    def _require_own(
        self,
        loss_of: LossOf,
        row: int,
        place: int,
        own: Mapping[str, Tensor],
        alone: Mapping[str, Tensor],
        low: bool,
    ) -> None:
        found, name = self._difference(own, alone, low)
        tolerance = tolerance_of(self.parameters, low)
        if found <= tolerance:
            return
        # A row in company of its copy shows how much rounding alone can do, which is another at
        # each place of a batch.
        copied = self._batch(loss_of, [row, row]).gradients[place]
        rounding = _NOISE_FACTOR * self._difference(copied, alone, low)[0]
        tolerance = max(tolerance, min(rounding, MOST_ROUNDING))
        if not found <= tolerance:
            raise dependence(self.module, name, found, tolerance, scaled_by(own, alone))

    def _difference(
        self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], low: bool
    ) -> tuple[float, str]:
        floor = floor_of(self.negligible, low)
        return difference(first, second, floor=floor, low_precision=low)
