"""Where rows lie: learnt from two sizes of batch, refused where it cannot be known."""

from __future__ import annotations

import pytest
import torch

from lightning_privacy.clipping.layout import (
    Layouts,
    RowDim,
    Shape,
    Signature,
    default_rows,
    shape_of,
)
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import numbers

KEY = ("rule", "linear", "weight")


def learnt(*shapes: tuple[Shape, Shape], outputs: tuple[tuple[Shape, Shape], ...] = ()) -> Layouts:
    """Layouts of one use, from its arguments with two and with three rows."""
    layouts = Layouts()
    small, large = zip(*shapes, strict=True)
    out_small, out_large = zip(*outputs, strict=True) if outputs else ((), ())
    layouts.learn(KEY, [(small, out_small)], [(large, out_large)])
    return layouts


def found(layouts: Layouts, *shape: int, rows: int) -> Signature | None:
    return layouts.find(KEY, [numbers(*shape)], rows)


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((2, 7), (3, 7), RowDim(0, flattened=False)),
        ((7, 2, 5), (7, 3, 5), RowDim(1, flattened=False)),
        ((8, 5), (12, 5), RowDim(0, flattened=True)),
        ((5, 8), (5, 12), RowDim(1, flattened=True)),
        ((2, 2), (3, 2), RowDim(0, flattened=False)),
        ((7, 5), (7, 5), None),
        ((1, 7), (1, 7), None),
        ((), (), None),
    ],
)
def test_a_dimension_that_grows_with_the_rows(
    small: Shape, large: Shape, expected: RowDim | None
) -> None:
    (signature,) = learnt((small, large))._known[KEY]
    assert signature.inputs[0].rows == expected
    assert not signature.irregular


@pytest.mark.parametrize(
    ("small", "large"),
    [((4, 5), (5, 5)), ((2, 2), (3, 3)), ((2, 4, 6), (3, 6, 6)), ((2,), (2, 1)), (5, 7)],
)
def test_a_size_out_of_proportion_is_irregular_and_refused(small: Shape, large: Shape) -> None:
    layouts = learnt((small, large))
    assert layouts._known[KEY][0].irregular
    leaf = numbers(*small) if isinstance(small, tuple) else small
    with pytest.raises(UnsupportedOperationError, match="linear on weight has a size that is not"):
        layouts.find(KEY, [leaf], 2)


def test_integers_that_count_rows() -> None:
    layouts = learnt(((7, 5), (7, 5)), (2, 3), (10, 15), (-1, -1), (True, True))
    (signature,) = layouts._known[KEY]
    rows = [leaf.rows for leaf in signature.inputs]
    assert rows == [None, RowDim(0, flattened=False), RowDim(0, flattened=True), None, None]
    assert layouts.find(KEY, [numbers(7, 5), 4, 20, -1, True], 4) is signature
    assert layouts.find(KEY, [numbers(7, 5), 5, 20, -1, True], 4) is None
    assert layouts.find(KEY, [numbers(7, 5), 4, 21, -1, True], 4) is None


def test_what_was_never_learnt_is_unknown() -> None:
    layouts = learnt(((2, 7), (3, 7)))
    assert KEY in layouts
    assert ("rule", "linear", "bias") not in layouts
    assert layouts.find("other", [numbers(2, 7)], 2) is None
    assert found(layouts, 5, 7, rows=4) is None
    assert found(layouts, 4, 7, 1, rows=4) is None
    assert layouts.find(KEY, [numbers(4, 7), numbers(4, 7)], 4) is None
    assert layouts.find(KEY, [4], 4) is None


def test_uses_with_other_numbers_of_arguments_are_skipped() -> None:
    layouts = Layouts()
    layouts.learn(KEY, [(((2, 7),), ())], [(((3, 7), 3), ())])
    assert layouts._known[KEY] == []


def test_equal_uses_are_remembered_once() -> None:
    layouts = Layouts()
    uses = [(((2, 7),), ((2, 5),))] * 3, [(((3, 7),), ((3, 5),))] * 3
    layouts.learn(KEY, *uses)
    assert len(layouts._known[KEY]) == 1


def two_uses(first: tuple[Shape, Shape], second: tuple[Shape, Shape]) -> Layouts:
    layouts = Layouts()
    pairs = [(((small,), ()), ((large,), ())) for small, large in (first, second)]
    layouts.learn(KEY, *map(list, zip(*pairs, strict=True)))
    return layouts


def test_flattened_rows_with_one_entry_each_mean_the_same_as_rows() -> None:
    layouts = two_uses(((8, 7), (12, 7)), ((2, 7), (3, 7)))
    signature = found(layouts, 5, 7, rows=5)
    assert signature is not None
    assert signature.inputs[0].rows == RowDim(0, flattened=False)
    signature = found(layouts, 10, 7, rows=5)
    assert signature is not None
    assert signature.inputs[0].rows == RowDim(0, flattened=True)


def test_rows_in_either_of_two_dimensions_are_refused_when_both_fit() -> None:
    layouts = two_uses(((2, 7, 5), (3, 7, 5)), ((7, 2, 5), (7, 3, 5)))
    signature = found(layouts, 4, 6, 5, rows=4)
    assert signature is not None
    assert signature.inputs[0].rows == RowDim(0, flattened=False)
    with pytest.raises(UnsupportedOperationError, match="in dimension 0 or in dimension 1"):
        found(layouts, 4, 4, 5, rows=4)


def test_rows_and_a_constant_of_the_same_size_are_refused() -> None:
    layouts = two_uses(((2, 5), (3, 5)), ((6, 5), (6, 5)))
    rows, constant = found(layouts, 4, 5, rows=4), found(layouts, 6, 5, rows=4)
    assert rows is not None
    assert rows.inputs[0].rows == RowDim(0, flattened=False)
    assert constant is not None
    assert constant.inputs[0].rows is None
    with pytest.raises(UnsupportedOperationError, match="in no dimension") as caught:
        found(layouts, 6, 5, rows=6)
    assert "expand a constant" in caught.value.remedy


def test_a_constant_with_a_dimension_of_size_one_is_no_row() -> None:
    layouts = two_uses(((2, 9, 5), (3, 9, 5)), ((1, 9, 5), (1, 9, 5)))
    rows, constant = found(layouts, 4, 8, 5, rows=4), found(layouts, 1, 8, 5, rows=4)
    assert rows is not None
    assert rows.inputs[0].rows == RowDim(0, flattened=False)
    assert constant is not None
    assert constant.inputs[0].rows is None


@pytest.mark.parametrize(
    ("shape", "may_flatten", "expected"),
    [
        ((4,), False, RowDim(0, flattened=False)),
        ((4, 7), True, RowDim(0, flattened=False)),
        ((8, 7), True, RowDim(0, flattened=True)),
        ((8, 7), False, None),
        ((8, 7, 2), True, None),
        ((7, 4), True, None),
        ((), True, None),
    ],
)
def test_the_convention(shape: tuple[int, ...], may_flatten: bool, expected: RowDim | None) -> None:
    assert default_rows(numbers(*shape), 4, may_flatten=may_flatten) == expected


def test_what_is_remembered_of_an_argument() -> None:
    assert shape_of(torch.zeros(2, 3)) == (2, 3)
    assert shape_of(5) == 5
    for other in (True, 1.0, None, "mean", slice(3)):
        assert shape_of(other) is None


def test_multiplicity() -> None:
    assert RowDim(0, flattened=False).multiplicity(4, 4) == 1
    assert RowDim(0, flattened=False).multiplicity(8, 4) is None
    assert RowDim(0, flattened=True).multiplicity(8, 4) == 2
    assert RowDim(0, flattened=True).multiplicity(9, 4) is None
    assert RowDim(0, flattened=True).multiplicity(9, 0) is None
