"""What the private steps looked like from inside. None of it is covered by ε."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_privacy.clipping.statistics import StepStatistics

_USUAL = ("val_loss", "val/loss", "valid_loss", "validation_loss", "loss/val")
# Each holds a few numbers for each unit of its draw.
_MOST_WAITING = 200
# From here on every other point of the history goes: a plot shows no more.
_LONGEST_HISTORY = 800


class Tally:
    """Adds up statistics of the draws, without making the training wait for the device.

    Attributes:
        units: Units drawn so far.
        nonfinite: Units left out for a gradient that was not finite.
        latest: Figures of the last draw, by name.
        validation_loss: The last validation loss that the module logged, if any.
        history: The same figures of some draws, each with the number of its draw, from 1.
    """

    def __init__(self) -> None:
        self.units = 0
        self.nonfinite = 0
        self.latest: dict[str, float] = {}
        self.validation_loss: float | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self._draws, self._stride = 0, 1
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
            self._draws += 1
            self.latest = _figures(statistics)
            self._remember()

    def _remember(self) -> None:
        # Draws whose noise was set beside the signal are rare, and shown for that.
        if self._draws % self._stride == 0 or "noise_to_signal" in self.latest:
            self.history.append((self._draws, self.latest))
        if len(self.history) > _LONGEST_HISTORY:
            self.history, self._stride = self.history[::2], 2 * self._stride

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a process that was not there.

        Returns:
            All that was noted.
        """
        self.catch_up()
        return {
            "units": self.units,
            "nonfinite": self.nonfinite,
            "clipped": self._clipped,
            "latest": self.latest,
            "validation_loss": self.validation_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another process has noted.

        Args:
            state: What `state_dict` returned there.
        """
        self.units, self.nonfinite = state["units"], state["nonfinite"]
        self._clipped, self.latest = state["clipped"], dict(state["latest"])
        self.validation_loss = state["validation_loss"]

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


def _figures(statistics: StepStatistics) -> dict[str, float]:
    figures = {
        "clipped_share": statistics.clipped_share,
        "clipped_mass": statistics.clipped_mass,
        "mean_norm": statistics.mean_norm,
        "nonfinite_units": float(statistics.nonfinite),
    }
    if statistics.noise_to_signal is not None:
        figures["noise_to_signal"] = min(statistics.noise_to_signal, 1e9)
    return figures
