"""Rows' gradients side by side: what goes into the buffer, and that it changes no sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping.buffer import BufferLayout, RowBuffer
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.norms import FlatClipping
from lightning_privacy.clipping.units import ClippedSum, Units, clipped_sum
from tests.clipping.reference import (
    clipped_by_hand,
    loop_gradients,
    numbers,
    relative_error,
    squares,
)

B, CLIP = 5, 0.3


class Net(nn.Module):
    """Two dense layers; ``mode`` decides what else happens to the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.mode = "once"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.mode == "twice":
            hidden = self.first(hidden).tanh()
        if self.mode == "as a factor":
            hidden = hidden * self.first.weight[0]
        return hidden if self.mode == "not at all" else self.second(hidden)


def capture_of(model: nn.Module, x: Tensor) -> Capture:
    capture = Capture(dict(model.named_parameters()), rows=len(x), buffering=True)
    with capture.opened():
        loss = squares(model, x)
        capture.armed = True
        loss.backward()
    return capture


def clipped(model: nn.Module, x: Tensor) -> ClippedSum:
    capture = capture_of(model, x)
    parameters = dict(model.named_parameters())
    units = Units.rows(torch.ones(len(x)), float(len(x)))
    part = clipped_sum(
        capture.collect(), parameters, units, FlatClipping(clip_norm=CLIP), capture.buffer
    )
    assert capture.buffer is not None
    assert part.buffered is not None
    for name, gradient in capture.buffer.layout.pieces(part.buffered):
        assert name not in part.gradients or not gradient.any()
        part.gradients[name] = part.gradients.get(name, 0) + gradient
    return part


def layout_of(model: nn.Module, x: Tensor) -> BufferLayout | None:
    buffer = capture_of(model, x).buffer
    return None if buffer is None else buffer.layout


def test_small_products_lie_in_the_buffer() -> None:
    layout = layout_of(Net(), numbers(B, 6, 4))
    assert layout is not None
    assert list(layout.shapes) == ["first.weight", "second.weight"]
    assert layout.offsets == {"first.weight": 0, "second.weight": 16}
    assert layout.size == 28
    assert layout.dtype == torch.float32


def test_what_is_kept_as_factors_does_not() -> None:
    assert layout_of(nn.Linear(300, 200), numbers(B, 2, 300)) is None


def test_without_buffering_nothing_does() -> None:
    model = Net()
    capture = Capture(dict(model.named_parameters()), rows=B)
    with capture.opened():
        loss = squares(model, numbers(B, 6, 4))
        capture.armed = True
        loss.backward()
    assert capture.buffer is None


@pytest.mark.parametrize("mode", ["once", "twice", "as a factor", "not at all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_that_of_the_loop(mode: str, dtype: torch.dtype) -> None:
    model, x = Net().to(dtype), numbers(B, 6, 4).to(dtype)
    model.mode = mode
    expected = clipped_by_hand(loop_gradients(model, squares, x), CLIP)
    found = clipped(model, x)
    whole = {n: found.gradients.get(n, torch.zeros_like(p)) for n, p in model.named_parameters()}
    errors = relative_error(whole, expected)
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 1e-12), errors


def test_a_row_that_is_not_finite_contributes_zero() -> None:
    model, x = Net(), numbers(B, 6, 4)
    broken = x.clone()
    broken[1, 2, 0] = float("nan")
    found = clipped(model, broken)
    kept = [0, 2, 3, 4]
    expected = clipped_by_hand(loop_gradients(model, squares, x[kept]), CLIP)
    assert found.nonfinite.tolist() == [False, True, False, False, False]
    assert max(relative_error(found.gradients, expected).values()) < 1e-5


FILLS: dict[str, Callable[[RowBuffer, Any], None]] = {
    "two products": lambda buffer, factors: [buffer.add_product("b", *f) for f in factors],
    "one product": lambda buffer, factors: buffer.add_product("b", *factors[0]),
}


@pytest.mark.parametrize("fill", FILLS)
def test_products_are_written_and_then_added(fill: str) -> None:
    layout = BufferLayout({"a": torch.Size([3]), "b": torch.Size([2, 4])}, torch.float32)
    buffer = RowBuffer(layout, B, torch.device("cpu"))
    buffer.gradients.fill_(float("nan"))
    factors = [(numbers(B, 6, 2, seed=i), numbers(B, 6, 4, seed=i + 9)) for i in range(2)]
    FILLS[fill](buffer, factors)
    used = factors if fill == "two products" else factors[:1]
    expected = sum(left.mT @ right for left, right in used)
    assert buffer.wrote("b")
    assert not buffer.wrote("a")
    whole = buffer.complete()
    assert not whole[:, :3].any()
    torch.testing.assert_close(whole[:, 3:].view(B, 2, 4), expected)
