"""One unit whose rows do not fit into one micro-batch: its gradient is added up, then clipped once.

There is one such unit at a time, so the memory that it takes is that of one gradient. With a local
rate each micro-batch is a step of plain SGD for this unit alone (DP-FedAvg, McMahan et al. 2018,
arXiv 1710.06963): the sum of the gradients along the way is the difference of the parameters, over
the rate. The parameters are put back before anything else sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_privacy.clipping.contributions import Contribution, Dense
from lightning_privacy.clipping.products import full_precision
from lightning_privacy.clipping.units import Units
from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_privacy.clipping.buffer import RowBuffer


class OpenUnit:
    """The unclipped gradient of the unit that the next micro-batch may go on with.

    Args:
        local_rate: moves the parameters after each micro-batch but the last; 0 leaves them.
    """

    def __init__(self, local_rate: float = 0.0) -> None:
        self._local_rate = local_rate
        self._start: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._device: torch.device | None = None

    def __bool__(self) -> bool:
        """Whether rows of a unit wait for the rest of it."""
        return self._device is not None

    @full_precision()
    def add(
        self,
        found: dict[str, list[Contribution]],
        parameters: Mapping[str, nn.Parameter],
        units: Units,
        buffer: RowBuffer | None = None,
    ) -> None:
        """Add what a micro-batch with rows of this unit alone has delivered.

        Args:
            found: contributions of rows by parameter name; emptied.
            parameters: the covered parameters by name.
            units: all rows in one unit.
            buffer: the rest of the rows' gradients.
        """
        self._device, self._latest = units.scale.device, {}
        for name in list(found):
            for item in found.pop(name):
                self._add(name, self._whole(units.gathered(item), parameters[name].shape))
        if buffer is not None:
            rows = units.gathered(Dense(buffer.gradients))
            flat = self._whole(rows, torch.Size([buffer.layout.size]))
            for name, piece in buffer.layout.pieces(flat):
                self._add(name, piece)

    def _whole(self, item: Contribution, shape: torch.Size) -> Tensor:
        return item.weighted_sum(torch.ones(1, device=self._device), shape)

    def _add(self, name: str, total: Tensor) -> None:
        for sums in (self._sums, self._latest) if self._local_rate else (self._sums,):
            sums[name] = sums[name] + total if name in sums else total

    def step(self, parameters: Mapping[str, nn.Parameter], rows: int, of: int) -> None:
        """Take a step of SGD on what was added last, if there is a local rate.

        Args:
            parameters: the covered parameters by name.
            rows: rows of the micro-batch, of which the step is the mean.
            of: rows of the whole unit, over which the sums are means.
        """
        for name, total in self._latest.items():
            parameter = parameters[name]
            self._start.setdefault(name, (parameter, parameter.detach().clone()))
            # Through `.data`: the guards watch for changes that stay, and this one does not.
            parameter.data.sub_(total.to(parameter.dtype), alpha=self._local_rate * of / rows)

    def close(self) -> tuple[dict[str, list[Contribution]], Units]:
        """Hand over the whole unit, to be clipped as one.

        Returns:
            Its contributions by parameter name, and the one unit that they belong to.
        """
        whole: dict[str, list[Contribution]] = {
            name: [Dense(total[None])] for name, total in self._sums.items()
        }
        units = Units.rows(torch.ones(1, device=self._device), 1.0)
        self.drop()
        return whole, units

    def drop(self) -> None:
        """Forget it, and put the parameters back."""
        for parameter, value in self._start.values():
            parameter.data.copy_(value)
        self._start, self._sums, self._latest, self._device = {}, {}, {}, None


def incomplete_unit() -> GuaranteeError:
    """The refusal of a step while the rest of a unit is missing."""
    return GuaranteeError(
        must="a unit is complete before anything else is clipped or released",
        found="a micro-batch whose unit goes on in another one, which did not come",
        cost="the rest of the unit would be clipped by itself, beyond clip_norm in all",
        remedy="run every micro-batch of the draw in order, then release",
    )
