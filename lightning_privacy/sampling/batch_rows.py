"""Does a batch hold as many rows as were drawn? A collate function may drop or repeat some."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_privacy.errors import GuaranteeError


class BatchRows:
    """Where a batch shows its rows: learnt from batches of two and of three copies of a row.

    If a row is missing, what the positions of others tell is wrong: a sequence of frames that was
    laid end to end with others would be cut in the middle, and a unit have two contributions.
    """

    def __init__(self) -> None:
        self._tensors = 0
        self._places: list[tuple[int, int]] = []

    def learn(self, two: Any, three: Any) -> None:
        """Find the dimensions that count rows.

        Args:
            two: A batch of two copies of a row.
            three: One of three.
        """
        pairs = list(zip(_tensors(two), _tensors(three), strict=False))
        self._tensors = len(pairs)
        self._places = [
            (number, dim)
            for number, (small, large) in enumerate(pairs)
            for dim, sizes in enumerate(zip(small.shape, large.shape, strict=False))
            if sizes == (2, 3)
        ]

    def require(self, batch: Any, rows: int) -> None:
        """Refuse a batch in which no dimension that counts rows has their number.

        Args:
            batch: A batch; one of another structure than those that were learnt passes.
            rows: How many rows were drawn for it.

        Raises:
            GuaranteeError: It holds more rows, or fewer.
        """
        tensors = _tensors(batch)
        if not self._places or len(tensors) != self._tensors:
            return
        found = [tensors[n].shape[dim] for n, dim in self._places if dim < tensors[n].dim()]
        if found and rows not in found:
            raise GuaranteeError(
                must="the collate function gives a batch of every row that it gets",
                found=f"{found[0]} rows made of {rows}",
                cost="a row's gradient would be charged to another row, so that one unit could add "
                "more than clip_norm",
                remedy="take unusable rows out of the data set before the training, or keep them "
                "and give them a loss of zero",
            )


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
