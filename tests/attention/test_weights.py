"""Noise on weights without its matrix equals noise on weights with it."""

from __future__ import annotations

import pytest
import torch

from lightning_privacy.attention.counter import noise_matrix
from lightning_privacy.attention.realisation import Injection
from lightning_privacy.attention.weights import weights_noise

ROWS, HEADS, LENGTH, WIDTH = 3, 4, 11, 5


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("chunk", [2**24, 3 * HEADS * LENGTH * 2])
def test_values_and_gradients(groups: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_privacy.attention.weights._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    value = torch.randn(ROWS, groups, LENGTH, WIDTH, **options).requires_grad_()
    up = torch.randn(ROWS, HEADS, LENGTH, WIDTH, **options)
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False
    injection = Injection(std=0.3, where="weights")
    layer = injection.layer("one")
    injection.begin(0)
    seed, _ = layer.seed(value.device)
    begin = torch.tensor([0, 4, 0])
    matrix = noise_matrix(seed, (ROWS, HEADS, LENGTH, LENGTH), begin).double() * mask * 0.3
    expected = matrix @ value.repeat_interleave(HEADS // groups, 1)
    injection.begin(0)
    found = weights_noise(layer, value, HEADS, mask, 0.3)
    torch.testing.assert_close(found, expected)
    for first, second in zip(
        torch.autograd.grad(found, value, up), torch.autograd.grad(expected, value, up), strict=True
    ):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
