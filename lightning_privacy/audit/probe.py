"""A module whose private steps can be read off; `lightning_privacy.audit.fits` trains it.

Each canary has coordinates of its own: row i of two tables ``a`` and ``b``. Its loss is a multiple
of (a_i + b_i) / √2, far steeper than the clip norm, so that its clipped gradient is exactly the
clip norm times a unit vector u_i that no other example touches. The released sum, projected on u_i
and divided by the clip norm, is then 1 where the canary was drawn and 0 where not, plus noise of
standard deviation σ: each release shows who was drawn, how it was clipped and what noise was added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

FEATURES, WIDTH = 8, 16
SILENT, CANARY, HEAVY = 0, 1, 2
"""Kinds of rows: without any gradient, with private coordinates, through the whole network."""

_STEEP = 10.0
_FAR = 1e3
_FEWEST_ROWS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """One fit of the probe.

    Args:
        steps: Private steps.
        noise_multiplier: σ > 0.
        members: Canaries in the data; as many are left out.
        heavy: Rows of one content, with a steep gradient on every parameter of the network.
        silent: Rows without a gradient.
        size: The public number of rows: what the callback is told. The data may be longer.
        sample_rate: q, in (0, 1].
        clip_norm: C > 0.
        physical_batch_size: Rows in one micro-batch.
        clipping: The clipping kind.
        adapters: Train low-rank factors of frozen layers instead of the layers.
        copies: Rows of each unit. Above 1 units are users, and the numbers here are of users.
        seed: What ``seed_everything`` gets before the fit.
    """

    steps: int
    noise_multiplier: float
    members: int = 0
    heavy: int = 0
    silent: int = 0
    size: int = 24
    sample_rate: float = 0.25
    clip_norm: float = 2.0
    physical_batch_size: int = 4
    clipping: str = "flat"
    adapters: bool = False
    copies: int = 1
    seed: int = 0

    @property
    def unit(self) -> dict[str, Any]:
        """What the callback is told of units."""
        return {"unit": "user", "group_size": self.copies} if self.copies > 1 else {}

    @property
    def expected_batch_size(self) -> int:
        """The public normaliser."""
        return round(self.size * self.sample_rate)


@dataclass(kw_only=True, slots=True)
class Recording:
    """What a fit of the probe released, and what its callback said about it.

    Attributes:
        releases: ``[T, D]`` noised sums over the clip norm, all parameters side by side.
        columns: Where each parameter lies.
        settings: What was asked for.
        steps: Steps that the callback has charged.
        epsilon: ε that it reports of them at δ = 1e-5.
        sample_rate: q of its plan.
        expected_batch_size: The normaliser of its plan.
        others: What the other ranks of the fit saw.
    """

    releases: Tensor
    columns: dict[str, slice]
    settings: ProbeSettings
    steps: int
    epsilon: float
    sample_rate: float
    expected_batch_size: float
    others: tuple[Recording, ...] = ()

    @property
    def projections(self) -> Tensor:
        """``[T, M]`` on the canaries' directions, 1 for a full contribution.

        Members come first, then those left out.
        """
        return (self._table("a") + self._table("b")) / math.sqrt(2) / self._share(2)

    @property
    def across(self) -> Tensor:
        """``[T, M]`` on the directions (a_i − b_i) / √2, where there is noise alone."""
        return (self._table("a") - self._table("b")) / math.sqrt(2) / self._share(2)

    @property
    def heavy_norm(self) -> Tensor:
        """``[T]`` norm over the network's parameters, in full contributions."""
        parts = [self.releases[:, c] for n, c in self.columns.items() if n.startswith("net.")]
        return torch.cat(parts, dim=1).norm(dim=1) / self._share(self._layers - 2)

    @property
    def _layers(self) -> int:
        return len({name.rpartition(".")[0] for name in self.columns})

    def _share(self, layers: int) -> float:
        """The part of the clip norm that a row may have which touches so many layers."""
        return math.sqrt(layers / self._layers) if self.settings.clipping == "per_layer" else 1.0

    def _table(self, name: str) -> Tensor:
        return self.releases[:, self.columns[f"{name}.weight"]]


class _LowRank(nn.Module):
    """A frozen linear layer with two trainable factors."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class ProbeModule(pl.LightningModule):
    """The probe: two tables for canaries beside an ordinary network."""

    def __init__(self, settings: ProbeSettings) -> None:
        super().__init__()
        rows = max(_FEWEST_ROWS, 2 * settings.members)
        self.a, self.b = nn.Embedding(rows, 1), nn.Embedding(rows, 1)
        for table in (self.a, self.b):
            nn.init.zeros_(table.weight)
        layer = _LowRank if settings.adapters else nn.Linear
        # Two layers of one shape, to see whether they get the same noise.
        self.net = nn.Sequential(
            layer(FEATURES, WIDTH), nn.Tanh(), layer(WIDTH, WIDTH), nn.Tanh(), layer(WIDTH, WIDTH)
        )
        self.settings = settings
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The mean over the rows of each row's own loss."""
        kind, index, x = batch
        steep = _STEEP * self.settings.clip_norm / math.sqrt(2)
        canary = steep * (self.a(index) + self.b(index))[:, 0]
        heavy = (self.net(x) - _FAR).square().mean(1)
        return (canary * (kind == CANARY) + heavy * (kind == HEAVY)).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Read what was released, before the optimizer uses it."""
        scale = self.settings.expected_batch_size / self.settings.clip_norm
        flat = [_whole(p.grad).double().flatten() for _, p in self.trained() if p.grad is not None]
        self.seen.append(torch.cat(flat).cpu() * scale)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Steps so small that heavy rows stay heavy."""
        return torch.optim.SGD([p for _, p in self.trained()], lr=1e-4)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters with their names."""
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def columns(self) -> dict[str, slice]:
        """Where each parameter lies in a release."""
        places, start = {}, 0
        for name, parameter in self.trained():
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return places


def _whole(gradient: Tensor) -> Tensor:
    """All of a gradient of which each rank has a shard."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class ProbeRows(TensorDataset):
    """Kinds, canary numbers and features, and whose rows they are."""

    users: tuple[int, ...] = ()


def probe_rows(settings: ProbeSettings) -> ProbeRows:
    """The data, the kinds mixed along the rows, and so the rows of each user."""
    kinds = [CANARY] * settings.members + [HEAVY] * settings.heavy + [SILENT] * settings.silent
    numbers = [*range(settings.members), *[0] * (settings.heavy + settings.silent)]
    units = torch.arange(len(kinds)).repeat(settings.copies)
    order = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(7))]
    x = torch.linspace(-1, 1, FEATURES).expand(len(order), FEATURES).clone()
    rows = ProbeRows(torch.tensor(kinds)[order], torch.tensor(numbers)[order], x)
    rows.users = tuple(order.tolist())
    return rows
