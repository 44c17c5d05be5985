"""Where the rows of a batch lie in the arguments of an operation.

A shape alone cannot tell a table of 16 positions from 16 rows. So the layout is *learnt*: the
forward runs once with two and once with three copies of a row, and a dimension that grows in that
proportion is the rows' dimension. Operations never seen in a probe fall back on the convention that
rows come first.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_ROWS = (2, 3)


@dataclasses.dataclass(frozen=True, slots=True)
class RowDim:
    """Dimension ``dim`` holds the rows; ``flattened``: each row has several entries."""

    dim: int
    flattened: bool

    def multiplicity(self, size: int, rows: int) -> int | None:
        """Entries per row, or None when ``size`` does not fit ``rows``."""
        if not self.flattened:
            return 1 if size == rows else None
        return size // rows if rows and size % rows == 0 else None


Shape = tuple[int, ...] | int | None
Record = tuple[tuple[Shape, ...], tuple[Shape, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One argument (or result) of a call: a tensor, an integer that counts rows, or anything else.

    ``constant`` is the shape of a tensor, or the integer, that was the same for any number of rows.
    """

    ndim: int | None = None
    rows: RowDim | None = None
    irregular: bool = False
    constant: Shape = None


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """What was learnt about one use of one operation."""

    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]

    def fits(self, leaves: Sequence[object], rows: int) -> bool:
        """Whether a call with these flattened arguments can be this one."""
        return len(leaves) == len(self.inputs) and all(
            _fits(known, leaf, rows) for known, leaf in zip(self.inputs, leaves, strict=True)
        )

    @property
    def irregular(self) -> bool:
        """Whether some size grew out of proportion to the number of rows."""
        return any(leaf.irregular for leaf in (*self.inputs, *self.outputs))


class Layouts:
    """All learnt signatures, by operation and the names of the parameters that enter it.

    Attributes:
        places: where rows were found to lie, by a caller's own key, so as not to search again.
        products: uses of dense layers that are products with copies of the weight, by the
            capture's own key.
        unseen: uses that nothing was learnt about, since the last `confirm`.
    """

    def __init__(self) -> None:
        self.places: dict[object, RowDim | None] = {}
        self.products: set[object] = set()
        self.unseen: set[object] = set()
        self._confirmed: set[object] = set()
        self._known: dict[object, list[Signature]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layouts) and self._known == other._known

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def learn(self, key: object, small: Sequence[Record], large: Sequence[Record]) -> None:
        """Compare the uses of ``key`` with 2 rows and with 3 rows, in order of execution."""
        known = self._known.setdefault(key, [])
        for (inputs_2, outputs_2), (inputs_3, outputs_3) in zip(small, large, strict=False):
            if len(inputs_2) != len(inputs_3) or len(outputs_2) != len(outputs_3):
                continue
            signature = Signature(
                tuple(map(_leaf, inputs_2, inputs_3)), tuple(map(_leaf, outputs_2, outputs_3))
            )
            if signature not in known:
                known.append(signature)

    def find(self, key: object, leaves: Sequence[object], rows: int) -> Signature | None:
        """The one signature that fits, None when the key was never learnt.

        Raises:
            UnsupportedOperationError: when several different signatures fit, or the one that does
                has a size that depends on the data.
        """
        fitting = [known for known in self._known.get(key, ()) if known.fits(leaves, rows)]
        if not fitting:
            use = key, tuple(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves)
            if use not in self._confirmed:
                self.unseen.add(use)
            return None
        if len(fitting) > 1:
            fitting = _one_meaning(_uncontradicted(fitting, leaves), leaves, rows)
        if len(fitting) > 1 or fitting[0].irregular:
            raise UnsupportedOperationError(
                must="an operation on a trainable parameter keeps its rows in one known dimension",
                found=_ambiguity(key, fitting),
                cost="one row's gradient would be charged to another, so clipping bounds nothing",
                remedy="give the operation inputs whose first dimension is the batch; expand a "
                "constant to it",
            )
        return fitting[0]

    def waiting(self) -> set[object]:
        """Take the uses that no check has met; those that one meets now are `unseen` again."""
        waiting, self.unseen = self.unseen, set()
        self.places.clear()
        self.products.clear()
        return waiting

    def confirm(self) -> set[object]:
        """Take the convention as right for all uses since: a check has compared their rows."""
        met, self.unseen = self.unseen, set()
        self._confirmed |= met
        return met


def default_rows(tensor: Tensor, rows: int, *, may_flatten: bool) -> RowDim | None:
    """The convention: rows come first, or are flattened into the first of two dimensions."""
    if tensor.dim() and tensor.shape[0] == rows:
        return RowDim(0, flattened=False)
    if may_flatten and rows and 0 < tensor.dim() <= 2 and tensor.shape[0] % rows == 0:
        return RowDim(0, flattened=tensor.shape[0] > 0)
    return None


def shape_of(value: object) -> Shape:
    """What `Layouts.learn` compares: a tensor's shape, an integer, or nothing."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _leaf(small: Shape, large: Shape) -> Leaf:
    if isinstance(small, int) and isinstance(large, int):
        row = _row_dim(0, small, large)
        constant = small if small == large else None
        return Leaf(None, row, irregular=row is None and small != large, constant=constant)
    if not isinstance(small, tuple) or not isinstance(large, tuple):
        return Leaf()
    if len(small) != len(large):
        return Leaf(len(small), None, irregular=True)
    grown = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    rows = [_row_dim(dim, small[dim], large[dim]) for dim in grown]
    if not grown:
        return Leaf(len(small), constant=small)
    irregular = len(grown) > 1 or None in rows
    return Leaf(len(small), None if irregular else rows[0], irregular=irregular)


def _row_dim(dim: int, small: int, large: int) -> RowDim | None:
    two, three = PROBE_ROWS
    if small == large or small % two or large % three or small // two != large // three:
        return None
    return RowDim(dim, flattened=small != two)


def _ambiguity(key: object, fitting: list[Signature]) -> str:
    _, name, parameters, *_ = key if isinstance(key, tuple) else ("", key, "")
    names = parameters if isinstance(parameters, str) else ", ".join(parameters)
    if len(fitting) == 1:
        return f"{name} on {names} has a size that is not in proportion to the number of rows"
    dims = {leaf.rows.dim if leaf.rows else None for known in fitting for leaf in known.inputs}
    places = " or ".join("in no dimension" if d is None else f"in dimension {d}" for d in dims)
    return f"{name} on {names} is used in several ways: the rows could lie {places}"


def _fits(known: Leaf, leaf: object, rows: int) -> bool:
    if isinstance(leaf, torch.Tensor):
        if known.ndim != leaf.dim():
            return False
        return (
            known.rows is None
            or known.rows.multiplicity(leaf.shape[known.rows.dim], rows) is not None
        )
    if known.ndim is not None:
        return False
    if known.rows is None:
        return True
    return isinstance(leaf, int) and known.rows.multiplicity(leaf, rows) is not None


def _uncontradicted(fitting: list[Signature], leaves: Sequence[object]) -> list[Signature]:
    """Without those that take for a constant what has not the constant's size.

    Compared only where another signature has the rows: other sizes may differ from batch to batch.
    """
    dims = {
        (position, known.rows.dim)
        for signature in fitting
        for position, known in enumerate(signature.inputs)
        if known.rows is not None
    }
    return [
        signature
        for signature in fitting
        if all(_fits_constant(signature.inputs[i], leaves[i], dim) for i, dim in dims)
    ]


def _fits_constant(known: Leaf, leaf: object, dim: int) -> bool:
    if isinstance(known.constant, tuple) and isinstance(leaf, Tensor):
        return known.constant[dim] == leaf.shape[dim]
    return known.constant is None or known.constant == leaf


def _one_meaning(fitting: list[Signature], leaves: Sequence[object], rows: int) -> list[Signature]:
    """The least flattened of signatures that say the same of this call; all, where they do not.

    ``[B * T, d]`` with one position per row is ``[B, d]``. But rows and a constant that all rows
    share, of equal shape, cannot be told apart.
    """
    meanings = {_meaning(signature, leaves, rows) for signature in fitting}
    if len(meanings) > 1:
        return fitting
    return [min(fitting, key=lambda s: sum(bool(k.rows and k.rows.flattened) for k in s.inputs))]


def _meaning(signature: Signature, leaves: Sequence[object], rows: int) -> tuple[object, ...]:
    entries: list[object] = [signature.irregular]
    for known, leaf in zip(signature.inputs, leaves, strict=True):
        if known.rows is None:
            entries.append(None)
            continue
        size = leaf.shape[known.rows.dim] if isinstance(leaf, Tensor) else leaf
        assert isinstance(size, int)
        entries.append((known.rows.dim, known.rows.multiplicity(size, rows)))
    entries.extend(known.rows and known.rows.dim for known in signature.outputs)
    return tuple(entries)
