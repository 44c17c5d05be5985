"""Convolutions in one, two and three dimensions, and those without a rule of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.clipping.ops import convolution
from tests.clipping.reference import (
    Sketch,
    assert_close,
    assert_exact,
    loop_gradients,
    numbers,
    squares,
)

B = 4
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "stride": 3},
    {"groups": 4, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.fixture(params=["windows", "one by one"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one by one":
        monkeypatch.setattr(convolution, "_WINDOWS", 0)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
def test_options(dimensions: int, options: dict[str, Any]) -> None:
    first = CONVOLUTIONS[dimensions](4, 8, 3, **options)
    model = nn.Sequential(first, nn.Tanh(), CONVOLUTIONS[dimensions](8, 3, 1))
    assert_exact(model, squares, numbers(B, 4, *[5] * dimensions))


@pytest.mark.usefixtures("both_forms")
def test_kernels_strides_and_paddings_that_differ_by_dimension() -> None:
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
    assert_exact(layer, squares, numbers(B, 2, 7, 6))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_an_even_kernel_padded_to_the_same_size() -> None:
    assert_exact(nn.Conv2d(2, 3, (2, 4), padding="same"), squares, numbers(B, 2, 5, 6))


@pytest.mark.usefixtures("both_forms")
def test_many_positions_take_the_gram_form() -> None:
    assert_exact(nn.Conv2d(8, 30, 3, stride=4), squares, numbers(B, 8, 9, 9))


@pytest.mark.parametrize(
    ("layer", "size", "copied"),
    [
        (nn.Conv2d(8, 8, 3), 50, False),
        (nn.Conv2d(8, 8, 3), 40, True),
        (nn.Conv2d(32, 32, 3, groups=32), 25, False),
        (nn.Conv2d(128, 8, 1), 40, True),
        (nn.Conv2d(150, 250, 3, stride=2), 21, True),
    ],
    ids=["large", "small", "by channel", "one element", "gram"],
)
def test_large_windows_are_not_copied(
    layer: nn.Conv2d, size: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, patches = [], convolution._Site.patches
    monkeypatch.setattr(convolution._Site, "patches", lambda *a: made.append(True) or patches(*a))
    batch = numbers(2, layer.in_channels, size, size)
    found, _ = clipped_gradient_sum(layer, squares, batch, 1e9)
    assert bool(made) is copied
    expected = loop_gradients(layer, squares, batch)
    assert_close(found, {name: rows.sum(0) for name, rows in expected.items()}, 1e-5)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_of_both_is_frozen(frozen: str) -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.get_parameter(frozen).requires_grad_(False)
    assert_exact(nn.Sequential(nn.Conv2d(2, 3, 1), layer), squares, numbers(B, 2, 5, 5))


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("frames", [1, 3, B])
def test_frames_of_a_video_are_flattened_into_the_rows(frames: int) -> None:
    model = Sketch(
        lambda m, x: m.conv(x.flatten(0, 1)).unflatten(0, (-1, frames)), conv=nn.Conv2d(2, 3, 3)
    )
    assert_exact(model, squares, numbers(B, frames, 2, 5, 4))


@pytest.mark.parametrize("size", [3, B])
def test_rows_in_another_dimension(size: int) -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        # [B, S, C, L]: the steps S are the convolution's batch, the rows lie along its length.
        turned = m.conv(x.permute(1, 2, 0, 3).flatten(2))
        return turned.unflatten(2, (len(x), -1)).permute(2, 0, 1, 3)

    assert_exact(Sketch(forward, conv=nn.Conv1d(2, 3, 1)), squares, numbers(B, size, 2, 3))


@pytest.mark.parametrize("dimensions", TRANSPOSED)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1, "groups": 2}], ids=str)
def test_transposed(dimensions: int, options: dict[str, Any]) -> None:
    layer = TRANSPOSED[dimensions](4, 2, 3, **options)
    assert_exact(layer, squares, numbers(B, 4, *[3] * dimensions))


def test_a_kernel_that_is_an_expression() -> None:
    model = Sketch(
        lambda m, x: nn.functional.conv2d(x, m.kernel.softmax(0) * m.scale),
        kernel=(4, 3, 2, 2),
        scale=(4, 1, 1, 1),
    )
    assert_exact(model, squares, numbers(B, 3, 5, 5))


@pytest.mark.usefixtures("both_forms")
def test_one_position_whose_strides_look_like_channels_last() -> None:
    """Torch's grouped convolution of float64 refuses them where it computes the weight's gradient.

    The generic rule folds the rows into the channels, so that an ordinary batch comes to this.
    """

    def forward(m: Sketch, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).contiguous().transpose(0, 1).transpose(1, 2)
        kernel = m.kernel[:, :2]
        return nn.functional.conv1d(x, kernel, m.bias, padding=1, groups=2).transpose(1, 2)

    assert_exact(Sketch(forward, kernel=(4, 4, 3), bias=(4,)), squares, numbers(2, 1, 4))


def test_patches_with_a_class_token_and_positions() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        patches = m.conv(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((m.token.expand(len(x), -1, -1), patches), 1)
        return tokens + m.positions

    model = Sketch(forward, conv=nn.Conv2d(3, 6, 2, stride=2), token=(1, 1, 6), positions=(1, 5, 6))
    assert_exact(model, squares, numbers(5, 3, 4, 4))


@pytest.mark.usefixtures("both_forms")
def test_a_small_residual_network() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.relu(x + m.block(x))
        return m.head(torch.relu(m.down(x) + m.deep(x)).mean((2, 3)))

    model = Sketch(
        forward,
        stem=nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU()
        ),
        block=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)),
        down=nn.Conv2d(8, 12, 1, stride=2),
        deep=nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GroupNorm(4, 12)),
        head=nn.Linear(12, 3),
    )
    assert_exact(model, squares, numbers(B, 3, 8, 8))


@pytest.mark.usefixtures("both_forms")
def test_under_bfloat16_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(module, x)

    batch = numbers(B, 3, 7, 7)
    found = per_example_gradients(model, loss, batch)
    assert_close(found, loop_gradients(model, loss, batch), 3e-2)
