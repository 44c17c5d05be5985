"""What the private steps looked like from inside. None of it is covered by ε."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_privacy.clipping.statistics import StepStatistics

_USUAL = ("val_loss", "val/loss", "valid_loss", "validation_loss", "loss/val")
# Each holds a few numbers for each unit of its draw.
_MOST_WAITING = 200


class Tally:
    """Adds up statistics of the draws, without making the training wait for the device.

    Attributes:
        units: Units drawn so far.
        nonfinite: Units left out for a gradient that was not finite.
        latest: Figures of the last draw, by name.
        validation_loss: The last validation loss that the module logged, if any.
    """

    def __init__(self) -> None:
        self.units = 0
        self.nonfinite = 0
        self.latest: dict[str, float] = {}
        self.validation_loss: float | None = None
        self._clipped = 0.0
        self._waiting: list[StepStatistics] = []

    @property
    def clipped_share(self) -> float | None:
        """Share of all units that were clipped; None before the first unit."""
        return self._clipped / self.units if self.units else None

    def add(self, statistics: StepStatistics) -> None:
        """Note a draw; nothing is computed yet.

        Args:
            statistics: What its release returned.
        """
        self._waiting.append(statistics)
        if len(self._waiting) >= _MOST_WAITING:
            self.catch_up()

    def catch_up(self) -> None:
        """Compute what was noted."""
        waiting, self._waiting = self._waiting, []
        for statistics in waiting:
            self.units += statistics.units
            self.nonfinite += statistics.nonfinite
            self._clipped += statistics.clipped_share * statistics.units
        if waiting:
            last = waiting[-1]
            self.latest = {
                "clipped_share": last.clipped_share,
                "clipped_mass": last.clipped_mass,
                "mean_norm": last.mean_norm,
                "nonfinite_units": float(last.nonfinite),
            }
            if last.noise_to_signal is not None:
                self.latest["noise_to_signal"] = min(last.noise_to_signal, 1e9)

    def note_validation(self, metrics: Mapping[str, Any]) -> None:
        """Remember the validation loss.

        Args:
            metrics: What the trainer knows after a validation.
        """
        likely = [name for name in metrics if "val" in name and "loss" in name]
        for name in (*_USUAL, *likely):
            if name in metrics:
                self.validation_loss = float(metrics[name])
                return
