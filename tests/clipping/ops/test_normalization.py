"""Normalisation with and without affine parameters; batch statistics are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import Sketch, assert_exact, numbers, squares

B = 4
LAYERS = {
    "layer": nn.LayerNorm(6),
    "layer without bias": nn.LayerNorm(6, bias=False),
    "layer without affine": nn.LayerNorm(6, elementwise_affine=False),
    "layer over two dimensions": nn.LayerNorm((5, 6)),
    "rms": nn.RMSNorm(6),
    "rms over two dimensions": nn.RMSNorm((5, 6), eps=1e-3),
    "rms without affine": nn.RMSNorm(6, elementwise_affine=False),
}
BY_CHANNEL = {
    "group": nn.GroupNorm(2, 6),
    "group without affine": nn.GroupNorm(3, 6, affine=False),
    "instance": nn.InstanceNorm2d(6, affine=True),
    "instance without affine": nn.InstanceNorm2d(6),
    "batch in eval mode": nn.BatchNorm2d(6).eval(),
    "batch in eval mode without affine": nn.BatchNorm2d(6, affine=False).eval(),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", LAYERS)
def test_over_the_last_dimensions(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), LAYERS[name], nn.Tanh())
    assert_exact(model, squares, numbers(B, 5, 6))


@pytest.mark.parametrize("length", [3, B])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_sequence_first_and_flattened(kind: type[nn.Module], length: int) -> None:
    model = Sketch(
        lambda m, x: (
            m.norm(x.transpose(0, 1)).transpose(0, 1) + m.norm(x.flatten(0, 1)).view_as(x).tanh()
        ),
        norm=kind(6),
    )
    assert_exact(model, squares, numbers(B, length, 6))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_of_a_table_of_parameters(kind: type[nn.Module]) -> None:
    model = Sketch(lambda m, x: x + m.norm(m.table)[: x.shape[1]], norm=kind(6), table=(9, 6))
    assert_exact(model, squares, numbers(B, B, 6))


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize("size", [(3, 2), (6, B)], ids=str)
def test_by_channel(name: str, size: tuple[int, int]) -> None:
    layer = BY_CHANNEL[name]
    assert_exact(nn.Sequential(nn.Conv2d(2, 6, 1), layer, nn.Tanh()), squares, numbers(B, 2, *size))


def test_frozen_batch_statistics_stay_in_use() -> None:
    layer = nn.BatchNorm1d(6)
    layer.running_mean.copy_(numbers(6))
    layer.running_var.copy_(numbers(6).abs() + 0.5)
    before = layer.running_mean.clone()
    assert_exact(nn.Sequential(nn.Linear(6, 6), layer.eval()), squares, numbers(B, 6))
    assert torch.equal(layer.running_mean, before.double())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False)])
def test_batch_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedOperationError, match="GroupNorm"):
        per_example_gradients(nn.Sequential(nn.Linear(6, 6), layer), squares, numbers(B, 6))


def test_running_instance_statistics_are_refused() -> None:
    layer = nn.InstanceNorm1d(6, affine=True, track_running_stats=True)
    with pytest.raises(UnsupportedOperationError, match=r"instance_norm on 0\.weight"):
        per_example_gradients(nn.Sequential(layer), squares, numbers(B, 6, 5))
