"""Statistics of the draws, added up late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_privacy.callbacks._tally import Tally


def draw(units: int, share: float, nonfinite: int = 0) -> Any:
    return SimpleNamespace(
        units=units,
        nonfinite=nonfinite,
        clipped_share=share,
        clipped_mass=share / 2,
        mean_norm=1.0,
        noise_to_signal=float("inf"),
    )


def test_shares_are_weighted_by_units() -> None:
    tally = Tally()
    assert tally.clipped_share is None
    for statistics in (draw(3, 1.0), draw(1, 0.0, nonfinite=1), draw(0, 0.0)):
        tally.add(statistics)
    tally.catch_up()
    assert tally.clipped_share == pytest.approx(0.75)
    assert tally.nonfinite == 1
    assert tally.units == 4
    assert tally.latest["noise_to_signal"] == pytest.approx(1e9)


def test_what_waits_is_bounded() -> None:
    tally = Tally()
    for _ in range(450):
        tally.add(draw(1, 0.0))
    assert tally.units == 400


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        ({"val_loss": 1.0, "val_other_loss": 2.0}, 1.0),
        ({"accuracy": 1.0, "loss/val_epoch": 2.0}, 2.0),
        ({"loss": 1.0}, None),
    ],
)
def test_the_validation_loss_is_found_by_name(
    metrics: dict[str, float], found: float | None
) -> None:
    tally = Tally()
    tally.note_validation({name: torch.tensor(value) for name, value in metrics.items()})
    assert tally.validation_loss == found
