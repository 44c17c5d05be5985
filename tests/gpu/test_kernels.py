"""The Triton programs against torch in float64."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_privacy.clipping import kernels, products
from lightning_privacy.clipping.contributions import outer_norm
from lightning_privacy.noise import GaussianNoise, fresh_secret, secret_from_seed

pytestmark = pytest.mark.gpu

UNITS = 3


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("positions", [1, 2, 127, 128, 129, 512, 700, 1024])
@pytest.mark.parametrize("widths", [[64], [48, 8, 8], [16, 33, 8, 100, 7], [2048]])
def test_gram_products(positions: int, widths: list[int]) -> None:
    dtype = torch.bfloat16
    lefts = [random(UNITS, positions, width, seed=i, dtype=dtype) for i, width in enumerate(widths)]
    right = random(UNITS, positions, 96, seed=9, dtype=dtype)
    assert kernels.serve(*lefts, right)
    product, largest = products.gram_product(lefts, right)
    left = torch.cat(lefts, -1).double()
    gradient = left.mT @ right.double()
    expected = gradient.square().sum((1, 2))
    sizes = (left.norm(dim=2) * right.double().norm(dim=2)).sum(1)
    torch.testing.assert_close(largest.double(), sizes, rtol=1e-5, atol=0)
    # The matrix units round sums of thousands of terms towards zero, all alike.
    error = (product.double() - expected).abs() - 1e-4 * expected
    assert float((error / sizes.square()).max()) < 1e-6


@pytest.mark.parametrize("rest", [0.0, 1e-4, 1e-3, 1e-2])
def test_positions_that_cancel_cannot_hide_a_gradient(rest: float) -> None:
    left = random(UNITS, 256, 11008, seed=1, dtype=torch.bfloat16)
    right = random(UNITS, 256, 2048, seed=2, dtype=torch.bfloat16)
    left = torch.cat([left, left], 1)
    right = torch.cat([right, ((rest - 1) * right.float()).bfloat16()], 1)
    true = (left.double().mT @ right.double()).square().sum((1, 2))
    bound = outer_norm([left], right).double()
    assert bool((bound >= true * (1 - 1e-3)).all()), (bound / true).tolist()


def test_gram_products_of_views() -> None:
    whole = random(UNITS, 70, 80, seed=1, dtype=torch.bfloat16)
    left, right = whole[:, 3:, :40], whole[:, 3:, 40:]
    turned = whole.transpose(1, 2)[:, :67]
    for pair in ((left, right), (left.flip(0), right), (turned[..., :10], right[..., :7])):
        product, _ = products.gram_product([pair[0]], pair[1])
        expected = (pair[0].double().mT @ pair[1].double()).square().sum((1, 2))
        torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_gram_products_of_layers_that_share_launches(offset: int) -> None:
    layers = []
    for seed, (positions, widths) in enumerate(
        [(200, (64, 16)), (130, (40,)), (200, (64, 16))] * 3
    ):
        lefts = [
            random(UNITS, positions, offset + width, seed=10 * seed + i, dtype=torch.bfloat16)
            for i, width in enumerate(widths)
        ]
        right = random(UNITS, positions, 72, seed=10 * seed + 9, dtype=torch.bfloat16)
        layers.append(([left[..., offset:] for left in lefts], right))
    halves = [factor.half() for factor in (*layers[0][0], layers[0][1])]
    # One of its own type, one of two types and one on the CPU's path go along.
    layers += [(halves[:-1], halves[-1].float()), (halves[:-1], layers[0][1])]
    product, largest = products.gram_products(layers)
    alone = [products.gram_product(*layer) for layer in layers]
    for found, expected in zip((product, largest), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(
            found.sort(0).values, torch.stack(expected).sort(0).values, rtol=0, atol=0
        )
    for own, (lefts, right) in zip(alone, layers, strict=True):
        left = torch.cat([left.double() for left in lefts], -1)
        true = (left.mT @ right.double()).square().sum((1, 2))
        torch.testing.assert_close(own[0].double(), true, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(5, 7, 33), (3, 512, 96), (2, 1)])
def test_scaled_rows_are_rounded_once(shape: tuple[int, ...]) -> None:
    rows = random(*shape, seed=1, dtype=torch.bfloat16)
    coefficients = random(shape[0], seed=2, dtype=torch.float32)
    wide = coefficients.view(-1, *[1] * (len(shape) - 1)) * rows.float()
    for given in (rows, rows.mT.contiguous().mT):
        assert torch.equal(products.scaled_rows(coefficients, given), wide.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_shows_in_its_own_unit(value: float) -> None:
    left = random(UNITS, 200, 64, seed=1, dtype=torch.bfloat16)
    right = random(UNITS, 200, 64, seed=2, dtype=torch.bfloat16)
    left[1, 150, 3] = value
    product, largest = products.gram_product([left], right)
    finite = torch.isfinite(product) & torch.isfinite(largest)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("size", [1, 1000, 1024, 100_001])
def test_weighted_rows_select_and_never_multiply_by_zero(size: int) -> None:
    rows = random(5, size, seed=3, dtype=torch.bfloat16)
    rows[2] = float("nan")
    coefficients = torch.tensor([0.5, 1.0, 0.0, -2.0, 0.001], device="cuda")
    kept = [0, 1, 3, 4]
    expected = coefficients[kept].double() @ rows[kept].double()
    found = products.weighted_rows(coefficients, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_added_noise_is_normal_and_of_the_size_asked_for() -> None:
    noise, size = GaussianNoise(fresh_secret()), 8_000_001
    values = torch.full((size,), 5.0, device="cuda")
    noise.add_(values, "weight", 0, 3.0)
    values = ((values - 5.0) / 3.0).double()
    squares = float(values.square().sum())
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], size)
    assert low < squares < high
    assert abs(float(values.mean())) < 5 / size**0.5
    assert abs(float(values.pow(3).mean())) < 5 * 15**0.5 / size**0.5
    assert abs(float(values.pow(4).mean()) - 3) < 5 * 96**0.5 / size**0.5
    sample = values[:400_000].cpu().numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-6
    # Beyond 4.5 standard deviations 54 are expected.
    assert 20 < int((values.abs() > 4.5).sum()) < 110
    for lag in (1, 2, 1024, 2048):
        correlation = float((values[:-lag] * values[lag:]).mean())
        assert abs(correlation) < 5 / size**0.5, lag


def test_every_bit_of_the_key_decides_the_noise() -> None:
    def draw(secret: int, name: str = "weight", release: int = 0) -> Tensor:
        values = torch.zeros(5000, device="cuda")
        GaussianNoise(secret_from_seed(secret)).add_(values, name, release, 1.0)
        return values

    assert torch.equal(draw(7), draw(7))
    others = [draw(7 + 2**32), draw(7 + 2**64), draw(7, "bias"), draw(7, release=1)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((draw(7), other)))[0, 1])) < 0.08


def test_each_half_of_the_key_reaches_the_generator() -> None:
    from lightning_privacy.noise._triton import add_noise

    draws = []
    for bit in (None, 0, 31, 32, 63, 64, 95, 96, 127):
        values = torch.zeros(5000, device="cuda")
        add_noise(values, 12345 if bit is None else 12345 ^ (1 << bit), 1.0)
        draws.append(values)
    for other in draws[1:]:
        assert abs(float(torch.corrcoef(torch.stack((draws[0], other)))[0, 1])) < 0.08
