"""Does a batch hold as many rows as were drawn? A collate function may drop or repeat some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from torch import Size


class BatchRows:
    """Where a batch shows its rows: learnt from batches of two and of three copies of a row.

    If a row is missing, what the positions of others tell is wrong: a sequence of frames that was
    laid end to end with others would be cut in the middle, and a unit have two contributions.
    Tensors show it by a dimension; where none does, a list by its length.
    """

    def __init__(self) -> None:
        self._tensors = 0
        self._places: list[tuple[int, int]] = []
        self._list: int | None = None
        self._before: list[tuple[_Shown, int]] | None = []

    def learn(self, two: Any, three: Any) -> None:
        """Find what counts rows.

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
        lengths = enumerate(zip(_lengths(two), _lengths(three), strict=False))
        # The first one: what comes before it is the same for any number of rows.
        self._list = next((number for number, pair in lengths if pair == (2, 3)), None)
        before, self._before = self._before or [], None
        for shown, rows in before:
            self._judge(shown, rows)

    def require(self, batch: Any, rows: int) -> None:
        """Refuse a batch in which nothing that counts rows has their number.

        Args:
            batch: A batch; one of another structure than those that were learnt passes.
            rows: How many rows were drawn for it.

        Raises:
            GuaranteeError: It holds more rows, or fewer.
        """
        shapes = [tensor.shape for tensor in tensors_of(batch)]
        shown = shapes, [] if self._places else _lengths(batch)
        if self._before is not None:
            # The checks, which learn, come when the first batch is there.
            self._before = [*self._before[-1:], (shown, rows)]
        self._judge(shown, rows)

    def _judge(self, shown: _Shown, rows: int) -> None:
        shapes, lengths = shown
        if self._places:
            places = self._places if len(shapes) == self._tensors else []
            found = [shapes[number][dim] for number, dim in places if dim < len(shapes[number])]
        else:
            found = lengths[self._list :][:1] if self._list is not None else []
        if found and rows not in found:
            raise GuaranteeError(
                must="the collate function gives a batch of every row that it gets",
                found=f"{found[0]} rows made of {rows}",
                cost="a row's gradient would be charged to another row, so that one unit could add "
                "more than clip_norm",
                remedy="take unusable rows out of the data set before the training, or keep them "
                "and give them a loss of zero",
            )


_Shown = tuple[list["Size"], list[int]]


def _lengths(batch: Any) -> list[int]:
    """How long the lists of a batch are, each before those that it holds."""
    if not isinstance(batch, list | tuple | dict):
        return []
    own, inner = ([], batch.values()) if isinstance(batch, dict) else ([len(batch)], batch)
    return [*own, *(length for part in inner for length in _lengths(part))]


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
