"""The numbers are near normal, independent along every index, and a pure function of it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_privacy.attention.counter import (
    Seed,
    indices,
    mix,
    noise_matrix,
    query_key,
    standard_normal,
)

CPU = torch.device("cpu")


def matrix(seed: int = 7, shape: tuple[int, int, int, int] = (2, 4, 256, 256)) -> Tensor:
    return noise_matrix(Seed.of(seed, CPU), shape)


def correlation(first: Tensor, second: Tensor) -> float:
    """In units of its standard deviation under independence."""
    pair = torch.stack([first.flatten(), second.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1]) * math.sqrt(first.numel())


def test_the_moments_are_those_of_four_uniform_bytes() -> None:
    z = matrix().double().flatten()
    n = len(z)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(1.7 / n))
    assert float((z**3).mean()) == pytest.approx(0, abs=5 * math.sqrt(15 / n))
    assert float((z**4).mean()) - 3 == pytest.approx(-0.3, abs=0.03)
    assert float(z.abs().max()) <= 3.451


def test_the_distribution_is_within_one_percent_of_normal() -> None:
    z = matrix().flatten()[:200_000].numpy()
    assert stats.kstest(z, "norm").statistic < 0.012


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_each_byte_of_the_hash_is_uniform(shift: int) -> None:
    hashed = mix(mix(torch.arange(512, dtype=torch.int32))[:, None] + torch.arange(512))
    counts = torch.bincount(((hashed >> shift) & 255).flatten().long(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("of", [lambda z: z, torch.square, torch.sign], ids=["z", "z2", "sign"])
@pytest.mark.parametrize("distance", [1, 2, 16, 128])
def test_neighbours_are_uncorrelated(of: object, distance: int) -> None:
    z = of(matrix())  # type: ignore[operator]
    for dim in (2, 3):
        length = z.shape[dim] - distance
        pair = z.narrow(dim, 0, length), z.narrow(dim, distance, length)
        assert abs(correlation(*pair)) < 5
    assert abs(correlation(z, z.mT)) < 5


def test_heads_examples_and_seeds_are_uncorrelated() -> None:
    z = matrix()
    for first, second in (
        (z[:, 1:], z[:, :-1]),
        (z[1:], z[:-1]),
        (z[0, 1], z[1, 0]),
        (z, matrix(8)),
        (z, matrix(7 + 2**40)),
        (z[:, :, 1:, 1:], z[:, :, :-1, :-1]),
    ):
        assert abs(correlation(first, second)) < 5


def test_no_example_head_or_seed_shares_a_row_of_numbers() -> None:
    z = torch.cat([matrix(), matrix(8), matrix(7 + 2**40)])
    rows = z.flatten(0, 2)[:, :32]
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_keys_of_rows_are_no_progression() -> None:
    """A plain sum of positions would make one head's matrix a shifted copy of another's."""
    place = [
        indices(n, CPU).view(shape) for n, shape in ((4, (4, 1, 1)), (8, (8, 1)), (128, (128,)))
    ]
    keys = query_key(Seed.of(7, CPU), *place).long()
    assert len(keys.unique()) == keys.numel()
    for dim in range(3):
        steps = keys.diff(dim=dim) % 2**32
        assert len(steps.unique()) == steps.numel()


def test_a_matrix_has_the_singular_values_of_independent_numbers() -> None:
    """Structure of any kind, in rows or columns, would stand out above the edge of the spectrum."""
    for z in matrix(shape=(1, 2, 512, 512))[0]:
        values = torch.linalg.svdvals(z.double())
        assert float(values[0]) < 2 * math.sqrt(512) * 1.03
        assert float((values**2).sum()) == pytest.approx(512**2, rel=0.01)


def test_a_number_is_a_function_of_its_place_alone() -> None:
    seed, z = Seed.of(7, CPU), matrix()
    at = [torch.tensor(i, dtype=torch.int32) for i in (1, 3, 17, 201)]
    assert torch.equal(standard_normal(seed, *at), z[1, 3, 17, 201])
    assert torch.equal(matrix(shape=(1, 2, 64, 32)), z[:1, :2, :64, :32])


def test_positions_count_from_where_an_example_begins() -> None:
    seed = Seed.of(7, CPU)
    begin = torch.tensor([0, 5])
    padded = noise_matrix(seed, (2, 4, 261, 261), begin)
    assert torch.equal(padded[1, :, 5:, 5:], matrix()[1])
    assert torch.equal(padded[0, :, :256, :256], matrix()[0])


def test_with_a_cache_the_queries_are_the_last_ones() -> None:
    late = noise_matrix(Seed.of(7, CPU), (2, 4, 3, 256))
    assert torch.equal(late, matrix()[:, :, -3:])


def test_many_rows_are_made_in_chunks() -> None:
    seed = Seed.of(7, CPU)
    z = noise_matrix(seed, (20, 2, 512, 128))
    assert torch.equal(z[:1], noise_matrix(seed, (1, 2, 512, 128)))
    assert torch.equal(z[:, 0, 0, 0], torch.stack([one[0, 0, 0] for one in z]))
    assert len(z[:, 0, 0].unique(dim=0)) == 20
