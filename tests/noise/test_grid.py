"""Noise on a public grid: exact, of the right size, and blind to low bits."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_privacy import ConfigurationError
from lightning_privacy.callbacks._planning import noise_of
from lightning_privacy.distributed import Shards, World
from lightning_privacy.noise import GaussianNoise, GridNoise, secret_from_seed
from lightning_privacy.noise.grid import ROUNDING_SLACK
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

STD, SIGMA = 1.5, 0.75


def grid(dimension: int = 1000, draws: int = 2, secret: int = 1) -> GridNoise:
    return GridNoise(
        GaussianNoise(secret_from_seed(secret)),
        noise_multiplier=SIGMA,
        dimension=dimension,
        draws=draws,
    )


def numbers(size: int = 1000, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dimension", [1, 2, 1000, 10**6, 7 * 10**9])
def test_the_grid_is_as_coarse_as_the_accounting_allows(dimension: int) -> None:
    step = grid(dimension).step(STD)
    sensitivity = STD / SIGMA
    assert math.log2(step).is_integer()
    assert step * math.sqrt(dimension) <= ROUNDING_SLACK * sensitivity
    assert 2 * step * math.sqrt(dimension) > ROUNDING_SLACK * sensitivity
    # Noise of up to ten standard deviations, and 10,000 units, stay exact in float64.
    assert (10 * STD + 10_000 * sensitivity) / step < 2**52


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_everything_lies_on_the_grid_and_commutes_with_rounding(draws: int) -> None:
    total, step = numbers(), grid().step(STD)
    released = grid(draws=draws).add_(total.clone(), "w", 0, STD)
    assert torch.equal((released / step).round(), released / step)
    # The same draws without a grid, added to the rounded sum and rounded once.
    plain = torch.zeros(1000, dtype=torch.float64)
    source = GaussianNoise(secret_from_seed(1))
    for draw in range(draws):
        source.add_(plain, f"w\n\ndraw {draw}", 0, STD / math.sqrt(draws))
    rounded = (total / step).round() * step
    assert torch.equal(released, ((rounded + plain) / step).round() * step)


def test_low_bits_of_the_sum_do_not_reach_the_release() -> None:
    step = grid().step(STD)
    whole = (numbers() / step).round() * step
    low = whole + (torch.rand(1000, dtype=torch.float64) - 0.5) * 0.98 * step
    assert not torch.equal(low, whole)
    assert torch.equal(grid().add_(low, "w", 0, STD), grid().add_(whole, "w", 0, STD))
    # Without a grid they do.
    low = whole + (torch.rand(1000, dtype=torch.float64) - 0.5) * 0.98 * step
    plain = [GaussianNoise(secret_from_seed(1)).add_(t, "w", 0, STD) for t in (low, whole)]
    assert not torch.equal(*plain)


def test_a_rounded_sum_moves_no_further_than_accounted() -> None:
    one = numbers(seed=2)
    other = one + numbers(seed=3) / float(numbers(seed=3).norm()) * STD / SIGMA
    step = grid().step(STD)
    moved = ((one / step).round() - (other / step).round()) * step
    assert float(moved.norm()) <= STD / SIGMA * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_the_noise_has_the_standard_deviation_that_was_asked_for(draws: int) -> None:
    size = 200_000
    noise = grid(size, draws).sample("w", torch.empty(size), 3, STD)
    assert noise.dtype == torch.float32
    squares = float((noise.double() / STD).square().sum())
    assert abs(squares - size) < 5 * math.sqrt(2 * size)
    assert abs(float(noise.double().mean())) < 5 * STD / math.sqrt(size)
    assert float(noise.abs().max()) > 3.5 * STD


def test_draws_and_releases_differ() -> None:
    source = grid(draws=2)
    zeros = torch.zeros(1000, dtype=torch.float64)
    first, second = (source.add_(zeros.clone(), "w", release, STD) for release in (0, 1))
    assert not torch.equal(first, second)


def test_no_noise_changes_nothing_and_half_precision_is_refused() -> None:
    total = numbers()
    assert torch.equal(grid().add_(total.clone(), "w", 0, 0.0), total)
    with pytest.raises(ConfigurationError, match="also in float32"):
        grid().add_(total.half(), "w", 0, STD)


@pytest.mark.parametrize("change", [{"noise_multiplier": 0}, {"dimension": 0}, {"draws": 0}])
def test_arguments_outside_their_range(change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"noise_multiplier": 1.0, "dimension": 1}
    with pytest.raises(ConfigurationError):
        GridNoise(GaussianNoise(secret_from_seed(1)), **{**usual, **change})


# ---------------------------------------------------------------------- an option of the callback
class Gradients(Callback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.found.append(torch.cat([p.grad.flatten() for p in module.parameters()]).clone())


class Double(Regression):
    def loss(self, batch: Any) -> Tensor:
        return super().loss([part.double() for part in batch])


@pytest.mark.filterwarnings(*LIGHTNING_NOISE)
def test_a_fit_releases_on_the_grid_and_accounts_for_it(tmp_path: Path) -> None:
    results = []
    for rounding in (False, True):
        seen, callback = Gradients(), privacy(secure_rounding=rounding, test_seed=None)
        trainer(tmp_path, callback, seen, precision="64-true").fit(Double(), loader())
        plan = callback.plan
        assert plan is not None
        results.append(plan)
        size = seen.found[0].numel()
        coarse = GridNoise(
            GaussianNoise(bytes(32)), noise_multiplier=plan.noise_multiplier, dimension=size
        ).step(plan.noise_std / plan.expected_batch_size)
        on_grid = [bool(((g / coarse).round() == g / coarse).all()) for g in seen.found]
        assert all(on_grid) if rounding else not any(on_grid)
    assert results[1].precision_slack == results[0].precision_slack + ROUNDING_SLACK
    assert results[1].epsilon() >= results[0].epsilon()


# ---------------------------------------------------------------------- several ranks
def parts_of(totals: list[Tensor], sigma: float = SIGMA) -> tuple[list[Tensor], float]:
    """What each rank hands over, and the step of their grid."""
    size = len(totals)
    ranks = [
        GridNoise(
            GaussianNoise(secret_from_seed(rank)), noise_multiplier=sigma,
            dimension=totals[0].numel(), parts=size,
        )
        for rank in range(size)
    ]  # fmt: skip
    share = STD / math.sqrt(size)
    noised = [rank.add_(t.clone(), "w", 0, share) for rank, t in zip(ranks, totals, strict=True)]
    return noised, ranks[0].step(share)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_several_ranks_add_up_exactly_on_one_grid(ranks: int) -> None:
    noised, step = parts_of([numbers(seed=rank) for rank in range(ranks)])
    assert ranks * step * math.sqrt(1000) <= ROUNDING_SLACK * STD / SIGMA
    total = sum(noised[1:], noised[0])
    assert torch.equal(total, sum(noised[-2::-1], noised[-1]))
    assert torch.equal((total / step).round() * step, total)
    assert all(torch.equal((part / step).round() * step, part) for part in noised)


def test_units_may_move_between_ranks() -> None:
    moved, unit = numbers(seed=2), numbers(seed=3)
    unit *= STD / SIGMA / unit.norm()
    step = parts_of([moved, moved])[1]
    before = (moved / step).round() + (numbers(seed=4) / step).round()
    after = (numbers(seed=5) / step).round()
    after += ((moved + unit + numbers(seed=4) - numbers(seed=5)) / step).round()
    assert float((before - after).norm()) * step <= STD / SIGMA * (1 + ROUNDING_SLACK)


def test_the_noise_of_all_ranks_together_has_the_standard_deviation() -> None:
    size = 100_000
    noised, _ = parts_of([torch.zeros(size, dtype=torch.float64) for _ in range(3)])
    squares = float(((noised[0] + noised[1] + noised[2]) / STD).square().sum())
    assert abs(squares - size) < 5 * math.sqrt(2 * size)


def test_rounded_parts_add_up_to_a_rounded_sum_with_uniform_numbers() -> None:
    """The probabilities of the proof, on a coarse grid: noise of 2 ranks, one step wide each."""
    from scipy.stats import norm

    width, steps = 1.0, torch.arange(-12, 13, dtype=torch.float64)
    single = torch.from_numpy(
        norm.cdf(steps + 0.5, scale=width) - norm.cdf(steps - 0.5, scale=width)
    )
    both = torch.nn.functional.conv1d(single[None, None], single[None, None], padding=12)[0, 0]
    # round(Z + U), Z of both ranks: the uniform number is integrated over.
    shifts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 - 0.5
    points = steps[:, None] + shifts
    wide = math.sqrt(2) * width
    rounded = norm.cdf(points + 0.5, scale=wide) - norm.cdf(points - 0.5, scale=wide)
    error = float((both - torch.from_numpy(rounded.mean(axis=1))).abs().max())
    assert error < math.exp(-(math.pi**2))


def test_parts_in_low_precision_and_too_narrow_noise_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="float64"):
        parts_of([numbers().float()] * 2)
    with pytest.raises(ConfigurationError, match="steps of the grid"):
        parts_of([numbers()] * 2, sigma=1e-8)


def test_each_kind_of_world_has_its_grid() -> None:
    plan: Any = SimpleNamespace(noise_multiplier=1.0)
    settings: Any = SimpleNamespace(secure_rounding=True)
    layer = {"w": torch.nn.Parameter(torch.zeros(3))}
    replicas, shards = World(), Shards()
    replicas.size = shards.size = 4
    spread, local = (noise_of(settings, plan, bytes(32), w, layer) for w in (replicas, shards))
    assert (spread.sum_dtype, local.sum_dtype) == (torch.float64, torch.float32)


class TinyNegative(GaussianNoise):
    """Noise that the grid rounds to zero, from below."""

    def add_(self, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        return tensor.sub_(1e-30)


def test_the_sign_of_a_zero_does_not_tell_from_which_side_a_sum_was_rounded() -> None:
    noise = GridNoise(TinyNegative(secret_from_seed(1)), noise_multiplier=SIGMA, dimension=2)
    released = noise.add_(torch.tensor([0.0, -1e-30], dtype=torch.float64), "w", 0, STD)
    assert not released.any()
    assert not released.signbit().any()
