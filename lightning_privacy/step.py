"""The private step, whole: capture, clip, sum, noise once, divide by a public constant.

One step over one Poisson draw, whatever the number of micro-batches it is cut into
(Abadi et al. 2016, arXiv 1607.00133, algorithm 1)::

    for each micro-batch:   begin -> forward -> arm -> backward -> end
        g_u   gradient of unit u          S += sum_u clip(g_u, C)
    release:                gradient = (S + N(0, (sigma C)^2 I)) / expected_batch_size

A unit is a row, or the rows that `begin` names: their mean is g_u. A unit that does not fit into
one micro-batch has consecutive ones for itself, and is clipped after the last of them.

Lightning only calls these methods. The noise multiplier, the clipping rule and the public constant
come from one frozen plan, and the sensitivity from the rule itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

import lightning_privacy.clipping.ops  # noqa: F401 - registers the rules
from lightning_privacy.accounting.precision import require_slack
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.contributions import Dense
from lightning_privacy.clipping.guards import LeakGuard
from lightning_privacy.clipping.layout import Layouts
from lightning_privacy.clipping.norms import ClippingRule, clipping_rule
from lightning_privacy.clipping.open_unit import OpenUnit, incomplete_unit
from lightning_privacy.clipping.probe import learn_layouts
from lightning_privacy.clipping.revisit import Revisit, large_matrices
from lightning_privacy.clipping.statistics import Signal, StepStatistics
from lightning_privacy.clipping.tiers import TieredClipping
from lightning_privacy.clipping.units import ClippedSum, Units, clipped_sum, sent
from lightning_privacy.distributed import Departures, World
from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.noise import bundles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning_privacy.clipping.buffer import BufferLayout, RowBuffer
    from lightning_privacy.clipping.contributions import Found
    from lightning_privacy.noise.base import NoiseMechanism
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.sampling import UnitRows
    from lightning_privacy.types import LossReduction


class PrivateStep:
    """Clips, sums, noises and averages; the only place where ``.grad`` is written.

    Args:
        parameters: the trainable parameters by name. All of them get noise at each release.
        plan: clip norm, clipping kind, noise multiplier and the public normaliser.
        noise: draws the noise.
        loss_reduction: whether the loss is a mean or a sum over the rows of a micro-batch.
        local_rate: for a unit of several micro-batches, the rate of its local steps; 0 for none.
        world: the ranks over which a draw is spread; each calls the same methods in the same order.

    Raises:
        ConfigurationError: there is no trainable parameter, or one is not a plain parameter.
    """

    buffering = revisiting = True  # see clipping.buffer and clipping.revisit

    def __init__(
        self,
        *,
        parameters: Mapping[str, nn.Parameter],
        plan: PrivacyPlan,
        noise: NoiseMechanism,
        loss_reduction: LossReduction = "mean",
        local_rate: float = 0.0,
        world: World | None = None,
    ) -> None:
        if not parameters:
            raise ConfigurationError(
                must="the module has trainable parameters",
                found="none",
                cost="there is no gradient to protect",
                remedy="unfreeze what should be trained",
            )
        self.parameters = dict(parameters)
        self.held = self.parameters  # what the optimizers hold
        self.layouts = Layouts()
        self._plan, self._noise, self._loss_reduction = plan, noise, loss_reduction
        self._world = world or World()
        self._rule = self._clipping_rule()
        # Sums are kept divided by the public constant: one pass over the gradients less.
        self._share = 1.0 / plan.expected_batch_size
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._large = large_matrices(self.parameters) if self.revisiting else frozenset()
        self._guard = LeakGuard(self.parameters)
        self._capture: Capture | None = None
        self._weights: tuple[float, ...] = ()
        self._rows: UnitRows | None = None
        self._open = OpenUnit(local_rate)
        self._last: tuple[Found, Units, RowBuffer | None] | None = None
        self._buffered: BufferLayout | None = None
        self._sums: dict[str, Tensor] = {}
        self._buffered_sum: Tensor | None = None
        self._parts: list[ClippedSum] = []

    def _clipping_rule(self) -> ClippingRule:
        return clipping_rule(self._plan.clipping, self._plan.clip_norm, self.parameters)

    # ------------------------------------------------------------------ one micro-batch
    @property
    def active(self) -> bool:
        """Whether a micro-batch is between `begin` and `end`."""
        return self._capture is not None

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum, from the sensitivity that the rule states."""
        return self._plan.noise_multiplier * self._rule.sensitivity

    @property
    def pending(self) -> bool:
        """Whether clipped sums wait for their release."""
        return bool(self._parts) or self._last is not None

    def begin(self, weights: Sequence[float], units: UnitRows | None = None) -> None:
        """Start a micro-batch of ``len(weights)`` rows.

        Clears ``.grad`` of every covered parameter: Lightning does so only after the forward.

        Args:
            weights: 1 for a row that counts, 0 for one that only fills the batch.
            units: which rows form one unit; None where each row is a unit of its own.
        """
        self.abort_micro_batch()
        self._settle()
        if self._open and (units is None or self._rows is None or units.sizes != self._rows.sizes):
            raise incomplete_unit()
        self._rows = units
        for parameter in self.parameters.values():
            parameter.grad = None
        self._weights = tuple(weights)
        left = self._large and units is None and self._rule.groups == 1
        capture = Capture(
            self.parameters, rows=len(self._weights), layouts=self.layouts,
            buffering=self.buffering and self._rule.groups == 1,
            revisit=Revisit(self._large, self._plan.precision_slack) if left else None,
        )  # fmt: skip
        capture.open()
        self._capture = capture

    def arm(self, *, twice: bool = False) -> bool:
        """The backward of this micro-batch comes now; gradients computed before are refused.

        Args:
            twice: whether the caller can keep the graph, and gives the loss to `end`.

        Returns:
            Whether it has to.
        """
        capture = self._capture
        if capture is None:
            return False
        capture.armed = True
        if capture.revisit is not None and not (twice and capture.revisit.keep_what_fits()):
            capture.revisit = None
        return capture.revisit is not None

    def end(self, loss: Tensor | None = None) -> None:
        """After the backward: clip each unit's gradient and add it to the running sum.

        Args:
            loss: whose backward is to run once more, if `arm` asked for that.
        """
        capture = self._capture
        if capture is None:
            raise GuaranteeError(
                must="end follows begin",
                found="end without a micro-batch",
                cost="a micro-batch would be missing from the sum, or counted twice",
                remedy="call begin before the forward of each micro-batch",
            )
        found = capture.collect()
        require_slack(capture.types(found), self._plan.precision_slack)
        if capture.revisit is not None and loss is not None:
            units = self._units()
            part = self._clip(found, units, capture.buffer, capture.revisit.norms(found))
            capture.revisit.run(capture.roots(loss), part, self.parameters, self._add, units.scale)
            self.abort_micro_batch()
            return
        self.abort_micro_batch()
        if self._open or (self._rows is not None and self._rows.unfinished):
            self._open.add(found, self.parameters, self._units(), capture.buffer)
            if self._rows is not None and self._rows.unfinished:
                self._open.step(self.parameters, len(self._weights), self._rows.sizes[0])
        else:
            self._last = found, self._units(), capture.buffer
        if self._last is None or self._world.alone:
            self._settle()

    def contribute(self, gradients: Mapping[str, Tensor]) -> None:
        """Clip and add units whose gradients are known, without forward and backward.

        They are records like all others: under the same rule, sum, noise and accounting. Whoever
        calls this has drawn them at the plan's rate, independently of everything else.

        Args:
            gradients: For some parameters, by name, ``[U, *shape]``; zero on all others.
        """
        self._settle()
        one = next(iter(gradients.values()))
        found: Found = {name: [Dense(gradient)] for name, gradient in gradients.items()}
        self._clip(found, Units.rows(one.new_ones(len(one)), 1.0))

    def _settle(self) -> None:
        """Clip the last micro-batch, and a unit of several, unless the next one goes on with it."""
        if self._last is not None:
            last, self._last = self._last, None
            self._clip(*last)
        if self._open and not (self._rows is not None and self._rows.unfinished):
            self._clip(*self._open.close())

    def _clip(
        self,
        found: Found,
        units: Units,
        buffer: RowBuffer | None = None,
        norms: Sequence[Tensor] = (),
        add: Callable[[str, Tensor], None] | None = None,
    ) -> ClippedSum:
        rule: ClippingRule = self._rule
        if self._rows is not None and self._rows.clip_shares is not None:
            shares = sent(torch.tensor(self._rows.clip_shares), units.scale.device)
            rule = TieredClipping(rule, shares)
        part = clipped_sum(
            found, self.parameters, units, rule, buffer, self._share, add or self._add, norms
        )
        if part.buffered is not None and buffer is not None:
            self._add_buffered(buffer.layout, part.buffered)
        self._parts.append(dataclasses.replace(part, buffered=None, weights=None, excluded=None))
        return part

    def _add(self, name: str, gradient: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient

    def _add_buffered(self, layout: BufferLayout, total: Tensor) -> None:
        if self._buffered_sum is not None and layout == self._buffered:
            self._buffered_sum += total
            return
        self._spread()
        self._buffered, self._buffered_sum = layout, total

    def _spread(self) -> None:
        """Move the sums of the buffer to those by name."""
        if self._buffered_sum is not None and self._buffered is not None:
            for name, gradient in self._buffered.pieces(self._buffered_sum):
                self._add(name, gradient)
        self._buffered_sum = None

    def abort_micro_batch(self) -> None:
        """Untag the parameters and drop what was captured; the running sums stay."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    # ------------------------------------------------------------------ the release
    def release(
        self,
        release: int,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        signal: bool = True,
    ) -> StepStatistics:
        """Write ``(S + N(0, (sigma C)^2 I)) / expected_batch_size`` to ``.grad``.

        Guarantee: the gradients of all covered parameters together are one release of the Gaussian
        mechanism with noise multiplier sigma on a sum of sensitivity C. A parameter that no row
        reached gets noise alone; so does an empty draw.

        Args:
            release: number of this release; keys the noise and must never repeat.
            parameters: those of one optimizer; None releases all.
            signal: whether to measure the clipped sum for the statistics, a pass over it.

        Returns:
            Statistics of the draw.
        """
        last, self._last = self._last, None
        self._settle()
        if self._open:
            raise incomplete_unit()
        chosen = self.parameters if parameters is None else self._chosen(parameters)
        measured = Signal(self.noise_std * self._share, self._world, wanted=signal)

        def arrived(names: tuple[str, ...], total: Tensor) -> None:
            measured.after(total)
            self._hand_over(names, total)

        found, _, buffer = last or ({}, None, None)
        missing = [*found, *(buffer.layout.shapes if buffer else ())]
        noised = partial(self._noised, release=release, measured=measured)
        departures = Departures(bundles(chosen), noised, self._world.exchange(arrived), missing)

        def add(name: str, gradient: Tensor) -> None:
            self._add(name, gradient)
            departures.added(name)

        if last is not None:
            self._clip(*last, add=add)
        departures.finish()
        statistics = StepStatistics(self._parts, measured, self._world)
        if parameters is None or (not self._sums and self._buffered_sum is None):
            self.discard()
        return statistics

    def _noised(self, names: tuple[str, ...], release: int, measured: Signal) -> Tensor:
        """This rank's clipped sum with this rank's noise: nothing else leaves a rank."""
        total = self._total(names)
        measured.before(total)
        std = self.noise_std * self._share * self._world.noise_share
        if std:
            total = total.to(torch.promote_types(total.dtype, self._noise.sum_dtype))
            self._noise.add_(total, "\n".join(names), release, std)
        return total

    def _total(self, names: tuple[str, ...]) -> Tensor:
        """The clipped sums of a bundle, flat; zeros where nothing contributed."""
        buffered = self._buffered_sum
        if buffered is not None and self._buffered is not None:
            if names == tuple(self._buffered.shapes) and self._sums.keys().isdisjoint(names):
                self._buffered_sum = None
                return buffered
            self._spread()
        parts = []
        for name in names:
            parameter, total = self.parameters[name], self._sums.pop(name, None)
            if total is None:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                total = torch.zeros_like(parameter, dtype=dtype)
            parts.append(total.flatten())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _hand_over(self, names: tuple[str, ...], total: Tensor) -> None:
        members = [self.parameters[name] for name in names]
        pieces = _unflatten_dense_tensors(total.to(members[0].dtype), members)
        for member, piece in zip(members, pieces, strict=True):
            member.grad = piece

    def discard(self) -> None:
        """Drop the running sums: a draw that is not released."""
        self._sums.clear()
        self._parts.clear()
        self._last = None
        self._open.drop()
        self._buffered_sum = None

    def abort(self) -> None:
        """Restore the parameters and drop everything. Safe at any time."""
        self.abort_micro_batch()
        self.discard()

    def close(self) -> None:
        """`abort`, and stop watching for raw gradients: the fit is over."""
        self.abort()
        self._guard.remove()

    def learn_layouts(self, forward: Callable[[int], object]) -> None:
        """Learn where rows lie, from ``forward(n)`` on a batch of ``n`` copies of one row."""
        self.layouts = learn_layouts(self.parameters, forward)

    def _units(self) -> Units:
        weights = torch.tensor(self._weights)
        scale = float(len(weights)) if self._loss_reduction == "mean" else 1.0
        if self._rows is None:
            units = Units.rows(weights, scale)
        else:
            index, sizes = torch.tensor(self._rows.index), torch.tensor(self._rows.sizes)
            units = Units.segments(index, weights * scale, sizes)
        return units.to(next(iter(self.parameters.values())).device)

    def _chosen(self, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        chosen = {}
        for parameter in parameters:
            if id(parameter) in self._names:
                chosen[self._names[id(parameter)]] = parameter
            elif parameter.requires_grad:
                raise GuaranteeError(
                    must="an optimizer holds only parameters that the private step covers",
                    found=f"another trainable parameter, of shape {tuple(parameter.shape)}",
                    cost="its gradient would be neither clipped nor noised",
                    remedy="make it a parameter of the module before fit, and unfreeze none later",
                )
        return chosen
