"""Gaussian noise on a public grid: nothing of a sum's low bits reaches the release.

Noise in floating point has holes: not every number is a sum of s and some value of the generator,
and which are tells about s (Mironov, CCS 2012; for Gaussians Jin et al., S&P 2022, and Haney et
al., arXiv 2207.13793). Here both the sum and the noise are rounded to multiples of a power of two
g that depends on public numbers alone, and added as whole numbers, which is exact. As the rounded
sum s' lies on the grid, s' + round(Z) = round(s' + Z): the release is a function of the Gaussian
mechanism in real numbers on s'. Rounding moves a coordinate by at most g / 2, so that the
sensitivity of s' is at most C + g sqrt(d) <= C (1 + τ) for d coordinates, which is accounted.

With R ranks each rounds its own part of the sum, s'_r, and its own noise Z_r of variance
σ² C² / R, on the same grid, and the parts are added up as whole numbers again.

- Sensitivity. A unit that comes or goes may move others to other ranks, so all parts may change;
  but each coordinate of each part is rounded by at most g / 2. So the sensitivity of
  s' = Σ s'_r is at most C + R g sqrt(d): the grid is finer by R, and τ stays what it is.
- Noise. round(Z_r) is kg with probability g (φ_r * u)(kg), φ_r the density of Z_r and u that of a
  uniform number U in (-g / 2, g / 2). Adding up over r convolves these samples of smooth functions;
  by Poisson's summation that is sampling their convolution φ * u * ... * u, φ the density of
  Z ~ N(0, σ² C²), but for aliases below exp(-π² σ² C² / (R g²)). Exactly those probabilities has
  round(Z + U_2 + ... + U_R). So the release is distributed as round(s' + Z + U_2 + ... + U_R): a
  function of the Gaussian mechanism on s' and of numbers that are independent of the data. The
  standard deviation of Z_r is at least 8 g (else refused), so an alias is below 1e-270.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_privacy.noise.base import NoiseMechanism

ROUNDING_SLACK = 2.0**-20
"""τ: by how much rounding a sum to the grid may raise its sensitivity, relatively."""

_LEAST_STEPS = 8


class GridNoise:
    """Rounds to a grid, adds noise of several draws on the same grid, and does so exactly.

    Guarantee: if the sum of the draws were normal, the release would be a function of that of the
    Gaussian mechanism with real numbers and sensitivity C (1 + `ROUNDING_SLACK`). What is left to
    trust is the generator: a multiple of the grid has as its probability what the sum of the draws
    puts on an interval of length g, and that interval holds thousands of the draws' values, at the
    least. Adding several draws, each scaled down, makes the probabilities smoother still, and an
    attack would have to guess all draws at once (Holohan and Braghin, arXiv 2107.10138).

    Values are float64 on the way: as long as the sum and the noise stay below 2**52 grid steps,
    every operation is exact. With d = 7e9 parameters that is above 10,000 / R units.

    Args:
        noise: The source of the draws; its values must be float64 for a float64 tensor.
        noise_multiplier: σ > 0, by which a release's standard deviation gives its sensitivity.
        dimension: Number of coordinates of a whole release, over all tensors.
        draws: How many draws make a value, >= 1.
        parts: How many noised parts of a sum are added up afterwards, >= 1: R ranks, each with its
            own noise of σ C / sqrt(R). Where there are several, tensors have to be float64, so that
            adding them up is exact.

    Raises:
        ConfigurationError: An argument is outside its range, or the noise of a part would be
            narrower than 8 steps of the grid.
    """

    def __init__(
        self,
        noise: NoiseMechanism,
        *,
        noise_multiplier: float,
        dimension: int,
        draws: int = 2,
        parts: int = 1,
    ) -> None:
        cost, remedy = "a grid whose effect is not accounted", "pass the plan's own numbers"
        self._noise = noise
        self._multiplier = real_number(
            "noise_multiplier", noise_multiplier, "(0, inf)", cost=cost, remedy=remedy
        )
        self._dimension = whole_number("dimension", dimension, at_least=1, cost=cost, remedy=remedy)
        self._draws = whole_number("draws", draws, at_least=1, cost=cost, remedy=remedy)
        self._parts = whole_number("parts", parts, at_least=1, cost=cost, remedy=remedy)
        self.sum_dtype = torch.float64 if parts > 1 else torch.float32
        if parts > 1 and self.step(1.0) > 1 / _LEAST_STEPS:
            raise ConfigurationError(
                must=f"the noise of a rank is at least {_LEAST_STEPS} steps of the grid wide",
                found=f"noise_multiplier={noise_multiplier!r}",
                cost="rounded parts whose sum is not distributed as a rounded sum",
                remedy="train in one process, or with more noise",
            )

    def step(self, std: float) -> float:
        """Returns the grid's step g for a standard deviation.

        Args:
            std: Standard deviation of the noise of a part, > 0: σ times the sensitivity, divided by
                sqrt(R).

        Returns:
            The largest power of two with R g sqrt(d) <= τ C.
        """
        sensitivity = std * math.sqrt(self._parts) / self._multiplier
        finest = sensitivity * ROUNDING_SLACK / math.sqrt(self._dimension) / self._parts
        return 2.0 ** math.floor(math.log2(finest))

    def sample(self, name: str, like: Tensor, release: int, std: float) -> Tensor:
        """Returns fresh noise, rounded to the grid.

        Args:
            name: The parameter's name.
            like: A tensor whose shape and device the noise gets.
            release: The number of the release, >= 0.
            std: Standard deviation in every coordinate, >= 0.

        Returns:
            A float32 tensor (float64 for a float64 ``like``).
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return self.add_(zeros, name, release, std)

    def add_(self, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        """Rounds a tensor to the grid and adds noise on the grid, in place.

        Args:
            tensor: Where to add; float64, or float32 where there is one part.
            name: The parameter's name.
            release: The number of the release, >= 0.
            std: Standard deviation of a part's noise in every coordinate, >= 0.

        Returns:
            ``tensor``.

        Raises:
            ConfigurationError: The tensor has another type.
        """
        if tensor.dtype not in {self.sum_dtype, torch.float64}:
            raise ConfigurationError(
                must="noise must be added in float64, by one process also in float32",
                found=f"a tensor of type {tensor.dtype}",
                cost="a sum that was rounded to another grid before",
                remedy="add up and add noise in `sum_dtype`, and cast afterwards",
            )
        if not std:
            return tensor
        step, own = self.step(std), std / math.sqrt(self._draws)
        total = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        for draw in range(self._draws):
            self._noise.add_(total, f"{name}\n\ndraw {draw}", release, own)
        total.div_(step).round_()
        total.add_(tensor.detach().double().div_(step).round_()).mul_(step)
        total.add_(0.0)  # -0.0 becomes 0.0: a zero's sign would tell from which side it was rounded
        tensor.detach().copy_(total)
        return tensor
