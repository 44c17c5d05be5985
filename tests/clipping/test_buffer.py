"""Rows' gradients side by side: what goes into the buffer, and that it changes no sum."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_privacy.clipping.buffer import BufferLayout
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.layout import Layouts
from lightning_privacy.clipping.norms import FlatClipping
from lightning_privacy.clipping.units import ClippedSum, Units, clipped_sum
from lightning_privacy.errors import UnsupportedOperationError
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
        if self.mode == "in two types":
            with torch.autocast("cpu", torch.bfloat16):
                hidden = hidden + self.first(x).tanh()
        if self.mode == "as a factor":
            hidden = hidden * self.first.weight[0]
        return hidden if self.mode == "not at all" else self.second(hidden)


def capture_of(model: nn.Module, x: Tensor, layouts: Layouts | None = None) -> Capture:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    capture = Capture(parameters, rows=len(x), layouts=layouts, buffering=True)
    with capture.opened():
        loss = squares(model, x)
        capture.armed = True
        loss.backward()
    return capture


def clipped(model: nn.Module, x: Tensor) -> ClippedSum:
    capture = capture_of(model, x)
    parameters = dict(model.named_parameters())
    units = Units.rows(torch.ones(len(x)), float(len(x)))
    found = capture.collect()
    part = clipped_sum(found, parameters, units, FlatClipping(clip_norm=CLIP), capture.buffer)
    assert capture.buffer is not None
    assert part.buffered is not None
    for name, gradient in capture.buffer.layout.pieces(part.buffered):
        assert name not in part.gradients or not gradient.any()
        part.gradients[name] = part.gradients.get(name, 0) + gradient
    return part


def layout_of(model: nn.Module, x: Tensor) -> BufferLayout | None:
    capture = capture_of(model, x)
    capture.collect()
    buffer = capture.buffer
    return None if buffer is None else buffer.layout


def test_small_products_lie_in_the_buffer() -> None:
    layout = layout_of(Net(), numbers(B, 6, 4))
    assert layout is not None
    assert list(layout.shapes) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [*layout.offsets.values()] == [0, 16, 20, 32]
    assert layout.size == 35
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
    assert capture.collect()
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


def test_what_is_computed_in_two_types_is_clipped_as_one() -> None:
    """The norm of a sum is not that of its parts: it was clipped to 1.41 times the clip norm."""
    model, x = Net(), numbers(B, 6, 4)
    model.mode = "in two types"
    expected = clipped_by_hand(loop_gradients(model, squares, x), CLIP)
    found = clipped(model, x)
    assert max(relative_error(found.gradients, expected).values()) < 0.02
    alone = clipped(model, x[:1]).gradients.values()
    assert float(sum(part.double().square().sum() for part in alone)) ** 0.5 <= CLIP * 1.001


def test_a_row_that_is_not_finite_contributes_zero() -> None:
    model, x = Net(), numbers(B, 6, 4)
    broken = x.clone()
    broken[1, 2, 0] = float("nan")
    found = clipped(model, broken)
    kept = [0, 2, 3, 4]
    expected = clipped_by_hand(loop_gradients(model, squares, x[kept]), CLIP)
    assert found.nonfinite.tolist() == [False, True, False, False, False]
    assert max(relative_error(found.gradients, expected).values()) < 1e-5


def test_gradients_lie_in_the_order_of_the_parameters() -> None:
    model, x = Net(), numbers(B, 6, 4)
    capture = capture_of(model, x)
    others = capture.collect()
    buffer = capture.buffer
    assert buffer is not None
    assert not others
    rows = loop_gradients(model, squares, x)
    for name, start in buffer.layout.offsets.items():
        own = rows[name].flatten(1)
        found = buffer.gradients[:, start : start + own.shape[1]]
        torch.testing.assert_close(found * B, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_bring_their_gradients_block_by_block(reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                inner = nn.Sequential(layer, self.shared, nn.Tanh())
                x = checkpoint(inner, x, use_reentrant=reentrant)
            return x

    model, x = Blocks(), numbers(B, 6, 4).requires_grad_()
    expected = clipped_by_hand(loop_gradients(model, squares, x), CLIP)
    assert max(relative_error(clipped(model, x).gradients, expected).values()) < 1e-5


def test_nothing_holds_a_micro_batch_after_its_end() -> None:
    model, x = Net(), numbers(B, 6, 4)
    gc.collect()
    gc.disable()
    try:
        capture = capture_of(model, x)
        capture.collect()
        alive = weakref.ref(capture)
        del capture
        assert alive() is None
    finally:
        gc.enable()


def test_a_gradient_before_the_backward_is_refused() -> None:
    model, x = Net(), numbers(B, 6, 4)
    capture = Capture(dict(model.named_parameters()), rows=B, buffering=True)
    with capture.opened():
        loss = squares(model, x)
        with pytest.raises(UnsupportedOperationError, match="the step's own backward"):
            loss.backward()


@pytest.mark.parametrize("change", ["nothing", "fewer rows", "bfloat16", "values", "frozen"])
def test_what_is_known_of_a_use_holds_for_that_use_only(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 4, bias=False))
    x, layouts = numbers(B, 6, 4), Layouts()
    capture_of(model, x, layouts)
    assert layouts.products
    if change == "fewer rows":
        x = x[:2]
    if change == "values":
        model[0].weight.data.mul_(2)
    if change == "frozen":
        model[2].weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "bfloat16"):
        found, expected = capture_of(model, x, layouts), capture_of(model, x)
    found.collect()
    expected.collect()
    assert found.buffer is not None
    assert expected.buffer is not None
    assert found.buffer.layout == expected.buffer.layout
    assert torch.equal(found.buffer.gradients, expected.buffer.gradients)


def test_a_known_use_of_a_parameter_that_is_frozen_in_between_gives_it_no_gradient() -> None:
    layer, x, layouts = nn.Linear(4, 3, bias=False), numbers(B, 6, 4), Layouts()
    capture_of(layer, x, layouts)
    capture = Capture({"weight": layer.weight}, rows=B, layouts=layouts, buffering=True)
    with capture.opened():
        layer.weight.requires_grad_(False)
        loss = squares(layer, x.clone().requires_grad_())
        capture.armed = True
        loss.backward()
        layer.weight.requires_grad_(True)
    assert not capture.collect()
    assert capture.buffer is None
