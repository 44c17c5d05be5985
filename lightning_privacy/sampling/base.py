"""How a draw of any size becomes micro-batches of a bounded size, never an empty one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Args:
        indices: Row numbers in the data set; at least one.
        weights: For each row 1.0 if it was drawn, or 0.0 if it only fills the place of an empty
            draw and must contribute nothing.

    Raises:
        GuaranteeError: There is no row, the lengths differ, or a weight is neither 0 nor 1.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses what no private step could run."""
        if (
            not self.indices
            or len(self.indices) != len(self.weights)
            or not set(self.weights) <= {0.0, 1.0}
        ):
            raise GuaranteeError(
                must="a micro-batch must have at least one row and a weight 0 or 1 for each",
                found=f"{len(self.indices)} rows and the weights {sorted(set(self.weights))} for "
                f"{len(self.weights)}",
                cost="a contribution that is scaled after its norm was bounded",
                remedy="make micro-batches with micro_batches(draw, physical_batch_size)",
            )

    @property
    def drawn(self) -> int:
        """How many of the rows were drawn (private: never log it without saying so)."""
        return sum(weight > 0 for weight in self.weights)


def micro_batches(
    draw: np.ndarray | Sequence[int], physical_batch_size: int | None
) -> tuple[MicroBatch, ...]:
    """Cuts a draw into as few micro-batches as will do, of as equal a size as can be.

    Every row is in one of them, in the order of the draw. Equal sizes keep a GPU busier than full
    ones with a small rest.

    An empty draw gives one row of weight 0, so that a model always sees a valid batch and a
    private step always runs: skipping it would show that nobody was drawn.

    Args:
        draw: Row numbers, each at most once.
        physical_batch_size: Most rows in one pass, >= 1; None puts the whole draw into one.

    Returns:
        At least one micro-batch.

    Raises:
        ConfigurationError: The physical batch size is no whole number >= 1.
    """
    rows = [int(row) for row in draw]
    if not rows:
        return (MicroBatch(indices=(0,), weights=(0.0,)),)
    count = 1
    if physical_batch_size is not None:
        size = whole_number(
            "physical_batch_size",
            physical_batch_size,
            at_least=1,
            cost="rows that were drawn and accounted for, and never used",
            remedy="pass the number of rows that fit into memory at once",
        )
        count = -(-len(rows) // size)
    bounds = [len(rows) * part // count for part in range(count + 1)]
    return tuple(
        MicroBatch(indices=tuple(rows[start:end]), weights=(1.0,) * (end - start))
        for start, end in pairwise(bounds)
    )
