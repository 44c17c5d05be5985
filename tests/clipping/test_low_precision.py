"""In bfloat16 a unit adds no more than the clip norm and the slack that the noise covers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.accounting.precision import precision_slack_for
from lightning_privacy.clipping.contributions import Contribution, Dense, Outer
from lightning_privacy.clipping.norms import FlatClipping
from lightning_privacy.clipping.units import Units, clipped_sum

CLIP_NORM, POSITIONS, OUT, IN = 0.7, 48, 40, 56
SLACK = precision_slack_for("bf16-mixed")


def factors(generator: torch.Generator, kind: int) -> tuple[Tensor, Tensor]:
    """Factors ``[1, M, a]`` and ``[1, M, b]`` of one unit's gradient; each kind is its own trap."""
    left = torch.randn(1, POSITIONS, OUT, generator=generator)
    right = torch.randn(1, POSITIONS, IN, generator=generator)
    if kind == 1:  # magnitudes far from one another, from unit to unit
        left *= 10 ** (12 * torch.rand((), generator=generator) - 6)
        right *= 10 ** (12 * torch.rand((), generator=generator) - 6)
    elif kind == 2:  # and within a unit
        left *= 10 ** (8 * torch.rand(1, POSITIONS, 1, generator=generator) - 4)
    elif kind == 3:  # positions cancel but for the rounding
        half = POSITIONS // 2
        left[:, half:] = left[:, :half]
        right[:, half:] = -right[:, :half] * (1 + 10 ** -(4 * torch.rand((), generator=generator)))
    elif kind == 4:  # all positions alike: rounding errors add up
        left[:], right[:] = left[:, :1], right[:, :1]
        left *= 1 + 1e-3 * torch.randn(left.shape, generator=generator)
    return left, right


def excess(device: str, units: int, seed: int) -> float:
    """The largest norm that one of many units adds, relative to the clip norm, minus one."""
    generator = torch.Generator().manual_seed(seed)
    rule = FlatClipping(clip_norm=CLIP_NORM)
    parameters = {
        "kept": nn.Parameter(torch.zeros(OUT, IN)),
        "made": nn.Parameter(torch.zeros(OUT, IN)),
    }
    largest = []
    for unit in range(units):
        pairs = [
            tuple(half.to(device, torch.bfloat16) for half in factors(generator, unit % 5))
            for _ in parameters
        ]
        found: dict[str, list[Contribution]] = {
            "kept": [Outer(*pairs[0])],
            "made": [Dense(torch.bmm(pairs[1][0].mT, pairs[1][1]))],
        }
        whole = clipped_sum(found, parameters, Units.rows(torch.ones(1, device=device), 1.0), rule)
        squares = [gradient.double().square().sum() for gradient in whole.gradients.values()]
        largest.append(torch.stack(squares).sum().sqrt())
    return float(torch.stack(largest).max()) / CLIP_NORM - 1


def test_units_of_every_magnitude_on_the_cpu() -> None:
    assert excess("cpu", 1000, seed=1) <= SLACK / 2


@pytest.mark.gpu
def test_units_of_every_magnitude_on_a_gpu() -> None:
    assert excess("cuda", 10_000, seed=2) <= SLACK / 2
