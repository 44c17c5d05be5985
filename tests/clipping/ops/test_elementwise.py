"""Parameters that are scaled, added and otherwise broadcast over a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.clipping.reference import Sketch, assert_exact, numbers, squares

B = 4
SHAPES = [(), (1,), (6,), (B, 6), (1, 6), (B, 1), (1, 1, 6), (1, B, 6), (1, 1, 1)]
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: p * x,
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "mul": torch.mul,
    "add": torch.add,
    "add with alpha": lambda x, p: torch.add(x, p, alpha=0.5),
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x / p": lambda x, p: x / (p.square() + 1),
    "p / x": lambda x, p: p / (x.square() + 1),
    "power": lambda x, p: (x.square() + 1) ** p,
    "maximum": torch.maximum,
    "where": lambda x, p: torch.where(x > p, x * 2, p),
    "lerp": lambda x, p: torch.lerp(x, x.square(), p),
    "addcmul": lambda x, p: torch.addcmul(x, x, p),
    "in place": lambda x, p: x.clone().mul_(p).add_(p),
    "augmented": lambda x, p: _augmented(x.clone(), p),
}


def _augmented(x: Tensor, p: Tensor) -> Tensor:
    x += p
    x *= p
    return x


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_parameter_for_each_feature(name: str) -> None:
    model = Sketch(lambda m, x: OPERATIONS[name](x, m.p), p=(6,))
    assert_exact(model, squares, numbers(B, B, 6))


@pytest.mark.parametrize("name", ["x * p", "p + x", "x - p"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_that_broadcasts(shape: tuple[int, ...], name: str) -> None:
    model = Sketch(lambda m, x: OPERATIONS[name](x, m.p), p=shape)
    assert_exact(model, squares, numbers(B, B, 6))


@pytest.mark.parametrize("length", [3, B])
def test_sequence_first(length: int) -> None:
    model = Sketch(
        lambda m, x: (x.transpose(0, 1) * m.scale + m.shift[:length]).transpose(0, 1),
        scale=(6,),
        shift=(9, 1, 6),
    )
    assert_exact(model, squares, numbers(B, length, 6))


def test_a_parameter_with_as_many_dimensions_as_the_batch() -> None:
    model = Sketch(lambda m, x: x * m.scale + m.shift, scale=(1, 6), shift=(6,))
    assert_exact(model, squares, numbers(B, 6))


def test_two_parameters_meet_before_the_batch_does() -> None:
    model = Sketch(lambda m, x: x * (m.a * m.b + m.a) + m.a.outer(m.b).sum(0), a=(6,), b=(6,))
    assert_exact(model, squares, numbers(B, 6))
