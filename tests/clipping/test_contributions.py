"""The three forms of a unit's gradient: their norms, sums and inner products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_privacy.clipping.contributions import (
    Contribution,
    Dense,
    Lookup,
    Outer,
    combine,
    squared_norm,
)
from lightning_privacy.clipping.products import accumulation_dtype, full_precision
from tests.clipping.reference import numbers, tokens

U, ROWS, WIDTH = 3, 7, 5
SHAPE = torch.Size((ROWS, WIDTH))


def dense(seed: int = 1) -> Dense:
    return Dense(numbers(U, ROWS, WIDTH, seed=seed).double())


def outer(positions: int = 4, seed: int = 1) -> Outer:
    left = numbers(U, positions, ROWS, seed=seed).double()
    return Outer(left, numbers(U, positions, WIDTH, seed=seed + 50).double())


def lookup(positions: int = 4, seed: int = 1) -> Lookup:
    values = numbers(U, positions, WIDTH, seed=seed).double()
    return Lookup(tokens(U, positions, below=ROWS, seed=seed), values)


FORMS: dict[str, Callable[[], Contribution]] = {
    "dense": dense,
    "outer": outer,
    "outer of one position": lambda: outer(1),
    "outer in blocks": lambda: outer(200),
    "outer in uneven blocks": lambda: outer(130),
    "lookup": lookup,
    "lookup of many": lambda: lookup(60),
}
MIXTURES: dict[str, Sequence[Callable[[], Contribution]]] = {
    "two outers": [outer, lambda: outer(3, seed=9)],
    "many outers": [lambda i=i: outer(1, seed=i) for i in range(6)],
    "two lookups": [lookup, lambda: lookup(2, seed=9)],
    "outer and lookup": [outer, lookup],
    "lookups and outers": [lookup, outer, lambda: lookup(3, seed=5), lambda: outer(2, seed=6)],
    "dense and outer": [dense, outer],
    "dense and lookup": [lookup, dense],
    "dense twice": [dense, lambda: dense(seed=4)],
    "everything": [outer, dense, lookup, lambda: dense(seed=2), lambda: outer(5, seed=3)],
}


def materialised(items: Sequence[Contribution]) -> Tensor:
    return torch.stack([item.dense(SHAPE) for item in items]).sum(0)


@pytest.mark.parametrize("name", FORMS)
def test_norm_sum_and_exclusion_equal_those_of_the_dense_gradient(name: str) -> None:
    item = FORMS[name]()
    full = item.dense(SHAPE)
    assert full.shape == (U, *SHAPE)
    torch.testing.assert_close(
        item.squared_norm(), full.flatten(1).square().sum(1), rtol=1e-12, atol=0
    )
    coefficients = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    expected = torch.tensordot(coefficients, full, 1)
    torch.testing.assert_close(item.weighted_sum(coefficients, SHAPE), expected)
    rest = item.without(torch.tensor([False, True, False])).dense(SHAPE)
    assert (rest[1] == 0).all()
    torch.testing.assert_close(rest[[0, 2]], full[[0, 2]])


@pytest.mark.parametrize("name", MIXTURES)
def test_a_parameter_used_in_several_ways(name: str) -> None:
    items = [make() for make in MIXTURES[name]]
    full = materialised(items)
    joined = combine(list(items), SHAPE)
    assert len(joined) <= 2
    torch.testing.assert_close(materialised(joined), full)
    torch.testing.assert_close(
        squared_norm(joined), full.flatten(1).square().sum(1), rtol=1e-12, atol=0
    )


def test_without_the_cross_terms_the_norm_of_tied_weights_would_be_wrong() -> None:
    items = combine([outer(), lookup()], SHAPE)
    alone = sum(item.squared_norm() for item in items)
    exact = materialised(items).flatten(1).square().sum(1)
    assert ((alone - exact).abs() / exact).min() > 1e-3


def test_only_combined_contributions_have_a_norm() -> None:
    with pytest.raises(AssertionError, match="outer-product sum and a lookup"):
        squared_norm([dense(), outer()])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_norm_and_is_excluded_by_selection(
    name: str, value: float
) -> None:
    item = FORMS[name]()
    for tensor in (
        getattr(item, field) for field in ("gradients", "right", "values") if hasattr(item, field)
    ):
        tensor[1, 0] = value
    finite = torch.isfinite(item.squared_norm())
    assert finite.tolist() == [True, False, True]
    total = item.without(~finite).weighted_sum(finite.double(), SHAPE)
    assert torch.isfinite(total).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_norms_and_sums_are_float32_or_better(name: str, dtype: torch.dtype) -> None:
    item = FORMS[name]()
    fields = {
        field: value if value.dtype == torch.long else value.to(dtype)
        for field in item.__slots__
        for value in [getattr(item, field)]
    }
    item = type(item)(**fields)
    assert accumulation_dtype(dtype) == torch.float32
    assert item.squared_norm().dtype == torch.float32
    assert item.weighted_sum(torch.ones(U), SHAPE).dtype == torch.float32
    exact = type(item)(**{f: v if v.dtype == torch.long else v.double() for f, v in fields.items()})
    ones = torch.ones(U, dtype=torch.float64)
    torch.testing.assert_close(
        item.weighted_sum(ones.float(), SHAPE).double(),
        exact.weighted_sum(ones, SHAPE),
        rtol=1e-5,
        atol=1e-4,
    )
    ratio = item.squared_norm().double() / exact.squared_norm()
    assert (ratio >= 1 - 1e-6).all()
    assert (ratio <= 1.02).all()


# ---------------------------------------------------------------------- cancellation
def cancelling(dtype: torch.dtype, size: float, kind: str) -> Contribution:
    """Positions whose huge gradients nearly cancel: the norm is that of the small rest."""
    generator = torch.Generator().manual_seed(3)
    units, pairs, a, b = 40, 60, 48, 40
    left = torch.randn(units, pairs, a, generator=generator, dtype=torch.float64)
    right = torch.randn(units, pairs, b, generator=generator, dtype=torch.float64)
    rest = torch.randn(units, 1, b, generator=generator, dtype=torch.float64)
    both = torch.cat((size * right, -size * right, rest), 1)
    if kind == "outer":
        left = torch.cat((left, left, left[:, :1]), 1)
        return Outer(left.to(dtype), both.to(dtype))
    index = torch.randint(0, 9, (units, pairs), generator=generator)
    return Lookup(torch.cat((index, index, index[:, :1]), 1), both.to(dtype))


@pytest.mark.parametrize("kind", ["outer", "lookup"])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    ("dtype", "excess"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
def test_cancellation_never_hides_a_gradient_from_the_clip(
    dtype: torch.dtype, excess: float, size: float, kind: str
) -> None:
    item = cancelling(dtype, size, kind)
    norms = item.squared_norm().sqrt()
    shape = torch.Size((48 if kind == "outer" else 9, 40))
    for unit in range(len(norms)):
        coefficients = torch.zeros_like(norms)
        coefficients[unit] = 1 / norms[unit]
        contribution = item.weighted_sum(coefficients, shape)
        assert float(contribution.double().norm()) <= 1 + excess


@pytest.mark.parametrize("positions", [1, 64, 200])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_has_no_square_does_not_hide_from_the_clip(
    positions: int, turned: bool, dtype: torch.dtype
) -> None:
    """1e-23 times 1e18 is 1e-5, many times; but the square of 1e-23 is zero in float32."""
    power = 7 if dtype == torch.float64 else 1
    left = torch.full((1, positions, 128), 1e-23, dtype=torch.float64).pow(power).to(dtype)
    right = torch.full((1, positions, 96), 1e18, dtype=torch.float64).pow(power).to(dtype)
    pair = Outer(right, left) if turned else Outer(left, right)
    true = pair.left.double().mT @ pair.right.double()
    assert float(pair.squared_norm().double().sqrt()) >= float(true.norm()) > 0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_matrix_products_is_switched_off_and_back_on(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        torch.set_float32_matmul_precision(precision)
        reduced = [backend.fp32_precision for backend in backends]
        assert "ieee" not in reduced
        with full_precision():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == reduced
        with pytest.raises(KeyboardInterrupt), full_precision():
            raise KeyboardInterrupt
        assert [backend.fp32_precision for backend in backends] == reduced
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("value", [0.87, 0.6])
def test_the_norm_of_many_elements_is_within_what_is_accounted(value: float) -> None:
    """Squares of one size, added up from end to end, stop to add: 0.4 % of the norm were missed."""
    elements = 5_000_000
    wide = torch.full((1, elements), value)
    least = (1 - 1e-4) * abs(wide[0, 0].double().item()) * elements**0.5
    assert Dense(wide).norm() > least
    assert Outer(wide[:, None], torch.ones(1, 1, 1)).squared_norm().sqrt() > least
