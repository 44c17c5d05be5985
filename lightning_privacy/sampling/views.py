"""Several augmented views of each drawn example, averaged before the example is clipped."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from lightning_privacy.sampling.base import MicroBatch, packed
from lightning_privacy.sampling.poisson import PoissonSampler
from lightning_privacy.types import whole_number


class ViewSampler(PoissonSampler):
    """Draws examples, and names the row of each so many times as it has views.

    The data set reads a row anew each time, with other random numbers of its augmentation. The
    views of an example form one unit, whose mean gradient is clipped once: it stays a function of
    that example alone, so ε is that of one view. (De et al. 2022, arXiv 2204.13650, "augmentation
    multiplicity".)

    Args:
        size: As in `PoissonSampler`.
        sample_rate: As in `PoissonSampler`.
        secret: As in `PoissonSampler`.
        views: K >= 1, views of each example.

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    def __init__(self, *, size: int, sample_rate: float, secret: bytes, views: int) -> None:
        super().__init__(size=size, sample_rate=sample_rate, secret=secret)
        self.views = whole_number(
            "views", views, at_least=1, cost="examples without a view", remedy="pass for instance 4"
        )

    @override
    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """Cuts a draw into micro-batches, the views of an example together as far as they fit.

        Args:
            cursor: Number of the draw, >= 0.
            physical_batch_size: Most rows in one pass, >= 1; None for no limit.

        Returns:
            At least one micro-batch.
        """
        if self.views == 1:
            return super().plan(cursor, physical_batch_size)
        units = [np.full(self.views, row) for row in self.draw(cursor)]
        return packed(units, physical_batch_size)
