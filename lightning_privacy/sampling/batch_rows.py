"""Does a batch hold as many rows as were drawn? A collate function may drop or repeat some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Size


class BatchRows:
    """Where a batch shows its rows: learnt from batches of two and of three copies of a row.

    If a row is missing, what the positions of others tell is wrong: a sequence of frames that was
    laid end to end with others would be cut in the middle, and a unit have two contributions.
    """

    def __init__(self) -> None:
        self._tensors = 0
        self._places: list[tuple[int, int]] = []
        self._before: list[tuple[list[Size], int]] | None = []

    def learn(self, two: Any, three: Any) -> None:
        """Find the dimensions that count rows.

        Args:
            two: A batch of two copies of a row.
            three: One of three.

        Raises:
            GuaranteeError: A batch that was given to `require` before holds more rows, or fewer.
        """
        pairs = list(zip(tensors_of(two), tensors_of(three), strict=False))
        self._tensors = len(pairs)
        self._places = [
            (number, dim)
            for number, (small, large) in enumerate(pairs)
            for dim, sizes in enumerate(zip(small.shape, large.shape, strict=False))
            if sizes == (2, 3)
        ]
        before, self._before = self._before or [], None
        for shapes, rows in before:
            self._judge(shapes, rows)

    def require(self, batch: Any, rows: int) -> None:
        """Refuse a batch in which no dimension that counts rows has their number.

        Args:
            batch: A batch; one of another structure than those that were learnt passes.
            rows: How many rows were drawn for it.

        Raises:
            GuaranteeError: It holds more rows, or fewer.
        """
        shapes = [tensor.shape for tensor in tensors_of(batch)]
        if self._before is not None:
            # The checks, which learn, come when the first batch is there.
            self._before = [*self._before[-1:], (shapes, rows)]
        self._judge(shapes, rows)

    def _judge(self, shapes: Sequence[Size], rows: int) -> None:
        if not self._places or len(shapes) != self._tensors:
            return
        found = [shapes[number][dim] for number, dim in self._places if dim < len(shapes[number])]
        if found and rows not in found:
            raise GuaranteeError(
                must="the collate function gives a batch of every row that it gets",
                found=f"{found[0]} rows made of {rows}",
                cost="a row's gradient would be charged to another row, so that one unit could add "
                "more than clip_norm",
                remedy="take unusable rows out of the data set before the training, or keep them "
                "and give them a loss of zero",
            )


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in an order that its structure gives.

    Args:
        batch: Containers of tensors, also in the attributes of objects of a class of their own.

    Returns:
        The tensors.
    """
    found: list[Tensor] = []
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found += (part for part in tree_flatten(vars(leaf))[0] if isinstance(part, Tensor))
    return found
