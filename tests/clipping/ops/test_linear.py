"""Dense layers of any input rank, wherever the rows lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import (
    Sketch,
    assert_close,
    assert_exact,
    loop_gradients,
    numbers,
    squares,
)

B = 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (B, 6), (3, B, 6), (2, 3, 2, 6)], ids=str)
def test_any_input_rank(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    assert_exact(model, squares, numbers(B, *shape))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_any_number_of_rows(rows: int) -> None:
    assert_exact(nn.Linear(6, 5), squares, numbers(rows, 3, 6))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_of_both_is_frozen(frozen: str) -> None:
    layer = nn.Linear(6, 5)
    layer.get_parameter(frozen).requires_grad_(False)
    assert_exact(nn.Sequential(nn.Linear(6, 6), layer), squares, numbers(B, 3, 6))


@pytest.mark.parametrize("length", [3, B, 2 * B])
def test_sequence_first(length: int) -> None:
    model = Sketch(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=nn.Linear(6, 5))
    assert_exact(model, squares, numbers(B, length, 6))


@pytest.mark.parametrize("length", [1, 3, B])
def test_rows_flattened_into_the_first_dimension(length: int) -> None:
    model = Sketch(lambda m, x: m.layer(x.flatten(0, 1)).view(len(x), -1), layer=nn.Linear(6, 5))
    assert_exact(model, squares, numbers(B, length, 6))


def test_the_same_layer_twice_with_different_ranks() -> None:
    model = Sketch(
        lambda m, x: (
            m.layer(x).mean(1) + m.layer(x.mean(1)) + m.layer(x.flatten(0, 1)).view_as(x)[:, 0]
        ),
        layer=nn.Linear(6, 6),
    )
    assert_exact(model, squares, numbers(B, 3, 6))


def test_a_weight_used_as_two_layers_and_transposed() -> None:
    def forward(m: Sketch, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, m.weight).tanh()
        return F.linear(F.linear(hidden, m.weight.t()), m.weight, m.bias)

    assert_exact(Sketch(forward, weight=(5, 6), bias=(5,)), squares, numbers(B, 3, 6))


def test_addmm_and_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    assert_exact(nn.Sequential(Conv1D(5, 6), nn.GELU(), Conv1D(3, 5)), squares, numbers(B, 7, 6))


@pytest.mark.parametrize("length", [3, B])
def test_a_layer_applied_to_a_table_of_parameters(length: int) -> None:
    model = Sketch(lambda m, x: x + m.layer(m.table)[:length], layer=nn.Linear(6, 6), table=(9, 6))
    assert_exact(model, squares, numbers(B, length, 6))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_layer_applied_to_rows_and_to_a_constant(size: int) -> None:
    bank = numbers(size, 6, seed=5)
    model = Sketch(lambda m, x: m.layer(x) @ m.layer(bank.to(x.dtype)).t(), layer=nn.Linear(6, 6))
    assert_exact(model, squares, numbers(B, 6))


def test_an_unbatched_vector_of_parameters() -> None:
    model = Sketch(lambda m, x: x * m.layer(m.vector), layer=nn.Linear(6, 6), vector=(6,))
    assert_exact(model, squares, numbers(B, 6))


def test_weight_and_bias_may_be_expressions() -> None:
    model = Sketch(
        lambda m, x: F.linear(x, m.weight * m.mask.sigmoid(), 2 * m.bias),
        weight=(5, 6),
        mask=(5, 6),
        bias=(5,),
    )
    assert_exact(model, squares, numbers(B, 3, 6))


@pytest.mark.parametrize("length", [None, 3, 12])
def test_under_bfloat16_autocast(length: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    batch = numbers(B, 6) if length is None else numbers(B, length, 6)

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(module, x)

    found = per_example_gradients(model, loss, batch)
    assert_close(found, loop_gradients(model, loss, batch), 2e-2)


def test_rows_and_a_constant_of_equal_shape_are_refused() -> None:
    bank = numbers(B, 6, seed=5)
    model = Sketch(lambda m, x: m.layer(x) @ m.layer(bank).t(), layer=nn.Linear(6, 6))
    with pytest.raises(UnsupportedOperationError, match="linear on layer.weight") as caught:
        per_example_gradients(model, squares, numbers(B, 6))
    assert "expand a constant" in caught.value.remedy


def test_an_input_that_is_written_to_between_two_layers_is_cast_again() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        x = x * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            first = m.first(x)
            with torch.no_grad():
                x.add_(1.0)
            return first.float() + m.second(x).float()

    model = Sketch(forward, first=nn.Linear(3, 4), second=nn.Linear(3, 4))
    batch = numbers(B, 5, 3)
    found = per_example_gradients(model, squares, batch)
    expected = loop_gradients(model, squares, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].float(), gradient, rtol=0.05, atol=1e-2)
