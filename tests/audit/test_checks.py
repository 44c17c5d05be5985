"""The checks keep quiet at releases that are as they should be, made without any trainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lightning_privacy.audit.checks import (
    Check,
    clipping_checks,
    noise_checks,
    rate_check,
    sampling_checks,
    seed_checks,
)
from lightning_privacy.audit.probe import ProbeModule, ProbeSettings, Recording

SHOWN = ProbeSettings(steps=240, noise_multiplier=1e-4, members=16, heavy=8)
FEW = ProbeSettings(steps=80, noise_multiplier=1e-4, members=2)
NOISY = ProbeSettings(steps=100, noise_multiplier=1.0)


def perfect(settings: ProbeSettings, seed: int) -> Recording:
    """What a correct trainer releases, drawn here."""
    draw = torch.Generator().manual_seed(seed)
    columns = ProbeModule(settings).columns()
    size = max(place.stop for place in columns.values())
    noise = torch.randn(settings.steps, size, generator=draw, dtype=torch.float64)
    releases = settings.noise_multiplier * noise

    def drawn(rows: int) -> Tensor:
        return torch.rand(settings.steps, rows, generator=draw) < settings.sample_rate

    members = drawn(settings.members).double() / 2**0.5
    for name in ("a.weight", "b.weight"):
        start = columns[name].start
        releases[:, start : start + settings.members] += members
    releases[:, columns["net.0.weight"].start] += drawn(settings.heavy).double().sum(1)
    return Recording(
        releases=releases,
        columns=columns,
        settings=settings,
        steps=settings.steps,
        epsilon=1.0,
        sample_rate=settings.sample_rate,
        expected_batch_size=settings.expected_batch_size,
    )


def failures(checks: list[Check]) -> list[str]:
    return [f"{check.name}: {check.found}" for check in checks if not check.passed]


@pytest.mark.parametrize("seed", range(60))
def test_perfect_draws_raise_no_alarm(seed: int) -> None:
    shown, few = perfect(SHOWN, seed), perfect(FEW, seed)
    assert failures([*clipping_checks(shown), *sampling_checks(shown)]) == []
    assert failures([*clipping_checks(few), rate_check(few)]) == []


@pytest.mark.parametrize("seed", range(20))
def test_perfect_noise_raises_no_alarm(seed: int) -> None:
    first, second = perfect(NOISY, seed), perfect(NOISY, 1000 + seed)
    assert failures([*noise_checks(first), *seed_checks(first, second, canaries=False)]) == []


def test_equal_noise_raises_an_alarm() -> None:
    first = perfect(NOISY, 0)
    assert failures(seed_checks(first, dataclasses.replace(first), canaries=False))


def test_one_parameter_of_one_step_raises_an_alarm_and_one_number_none() -> None:
    first, second = perfect(NOISY, 0), perfect(NOISY, 1000)
    # As float32 numbers of two audits are, once in a thousand of them.
    second.releases[7, 5] = first.releases[7, 5]
    assert not failures(seed_checks(first, second, canaries=False))
    bias = first.columns["net.0.bias"]
    second.releases[7, bias] = first.releases[7, bias]
    assert failures(seed_checks(first, second, canaries=False))
