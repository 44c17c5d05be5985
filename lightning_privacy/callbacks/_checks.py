"""The checks on rows of the data set: thorough before the first step, on two rows later on."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_privacy.callbacks._attributes import Attributes, remembered, warning_of
from lightning_privacy.callbacks._probe import ROWS, LossProbe, attributes_kept
from lightning_privacy.clipping.checks import check_independence, learn
from lightning_privacy.clipping.company import CompanyCheck
from lightning_privacy.clipping.layout import Layouts
from lightning_privacy.clipping.pairs import PairCheck
from lightning_privacy.clipping.randomness import Draws, preserved_state
from lightning_privacy.clipping.row_gradients import GradientCheck, difference, finite, tolerance_of
from lightning_privacy.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.strategies import PrivateRun

_Check = TypeVar("_Check", bound=GradientCheck)

# Gradients below this share of what clipping resolves are of rows that are learnt already: their
# relative rounding is large, and their influence small.
_NEGLIGIBLE = 1e-3
# The automatic rule scales up what is shorter than the clip norm, but for its stability constant.
_NEGLIGIBLE_IF_NORMALISED = 1e-5
# Every so many repeats all rows of a batch are compared.
_COMPANY_EVERY = 3
# Parameters, frozen ones too, from which on a check's memory shows beside the training's.
_LARGE = 10**8


class RowChecks:
    """Are the rows of a batch trained as if each were alone?

    Args:
        settings: What the user configured.
        trainer: The trainer of the fit.
        run: The private run, with its loader.
        parameters: The covered parameters by name.
    """

    def __init__(
        self,
        settings: PrivacySettings,
        trainer: Any,
        run: PrivateRun,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self._settings, self._trainer, self._run = settings, trainer, run
        self._module: Any = trainer.lightning_module
        self._parameters = parameters
        self._layouts = Layouts()
        self._repeated = 0
        self._attributes: Attributes | None = None
        self._warned: set[str] = set()

    def before_training(self) -> Layouts:
        """Learn where the rows of a batch lie, and check that examples are independent.

        Returns:
            The layouts, for the private step.

        Raises:
            GuaranteeError: An example's gradient depends on other examples.
        """
        self._attributes = Attributes(self._module, self._settings.independent_buffers)
        loader = self._run.loader
        assert loader is not None
        one_by_one = loader.batch_size == 1 and self._module.automatic_optimization
        checks = self._settings.independence_check and len(loader.dataset) > 1  # type: ignore[arg-type]
        # Micro-batches of one row need no layouts; more rows than that may not fit into memory.
        if not checks and one_by_one:
            return self._layouts
        with attributes_kept(self._module), preserved_state(self._module):
            probe = LossProbe(self._trainer, loader, self._run)
            rows = probe.rows(self._most_rows()) if checks else [0]
            probe.learn_rows(rows[0])
            self._layouts = learn(self._module, self._parameters, probe, rows[0])
            if checks:
                self._compare(probe, rows)
                # Rows that are computed one by one can only be mixed by what hooks remember.
                self._run.recheck = self.remembering if one_by_one else self.again
        self._layouts.confirm()
        return self._layouts

    def _most_rows(self) -> int:
        """Of a large model, half a physical batch: a check holds the gradients of two batches."""
        loader = self._run.loader
        assert loader is not None
        size = sum(parameter.numel() for parameter in self._module.parameters())
        return ROWS if size < _LARGE else min(ROWS, max(2, (loader.batch_size or 1) // 2))

    def again(self, *arguments: Any) -> None:
        """Check two fresh rows; what random operations give changes from time to time.

        Args:
            *arguments: What the coming training step gets besides its batch.

        Raises:
            GuaranteeError: An example's gradient depends on other examples.
        """
        loader = self._run.loader
        assert loader is not None
        self._repeated += 1
        waiting = self._layouts.waiting()
        # The step before has used them; the memory is needed for those of the pair.
        for parameter in self._parameters.values():
            parameter.grad = None
        with attributes_kept(self._module), preserved_state(self._module):
            probe = LossProbe(self._trainer, loader, self._run, arguments)
            pair = probe.rows(2)
            probe.learn_rows(pair[0])  # the loader may be another one than before the first step
            probe.require_rows_apart(pair)
            draws = Draws(self._repeated % len(Draws))
            self._compare_pair(probe, pair, draws, self._repeated % 2)
            if self._repeated % _COMPANY_EVERY == 0:
                self._compare_company(probe, probe.company())
            waiting -= self._layouts.confirm()
            # Perhaps rows decide what is used. Where passes communicate, all ranks make as many.
            for micro in loader.current if waiting and not self._run.world.lockstep else ():
                self._compare_company(probe, list(dict.fromkeys(micro.indices)))
                waiting -= self._layouts.confirm()
        self._layouts.unseen |= waiting
        self.remembering(*arguments)

    def remembering(self, *arguments: Any) -> None:
        """Check that gradients do not depend on attributes that training has changed.

        Args:
            *arguments: What the coming training step gets besides its batch.

        Raises:
            GuaranteeError: A gradient depends on a tensor kept from earlier batches.
        """
        assert self._attributes is not None
        changed = self._attributes.changed()
        tensors = [name for name, holds_tensors in changed.items() if holds_tensors]
        numbers = [name for name in changed if name not in {*tensors, *self._warned}]
        loader = self._run.loader
        assert loader is not None
        probe = LossProbe(self._trainer, loader, self._run, arguments)
        found = self._influence(probe, tensors)
        if found:
            raise remembered(tensors, found)
        if self._influence(probe, numbers):
            self._warned.update(numbers)
            warnings.warn(warning_of(numbers), stacklevel=2)

    def _influence(self, probe: LossProbe, names: Sequence[str]) -> float:
        """How much a gradient changes with attributes as before the first step; 0 for rounding."""
        if not names or self._attributes is None:
            return 0.0
        row, check = probe.rows(1), self._check(CompanyCheck, probe)
        with attributes_kept(self._module), preserved_state(self._module):
            now = check.gradient(row)
        kept = self._attributes
        # What the first hook made was not there before: then other values tell as much.
        for others in (kept.as_before, kept.as_before_with_flags, kept.altered):
            try:
                with attributes_kept(self._module), others(names):
                    before = check.gradient(row)
                break
            except PrivacyError:
                raise
            except Exception:  # noqa: BLE001, S112 - the next one
                continue
        else:
            return 0.0
        if not finite(now) and not finite(before):
            return 0.0
        low = "16" in str(self._trainer.precision)
        found = difference(now, before, floor=self._negligible(), low_precision=low)[0]
        return found if found > tolerance_of(self._parameters, low) else 0.0

    def _compare(self, probe: LossProbe, rows: Sequence[int]) -> None:
        probe.require_rows_apart(rows)
        check_independence(
            self._module,
            self._parameters,
            probe,
            rows,
            layouts=self._layouts,
            loss_reduction=self._settings.loss_reduction,
            negligible=self._negligible(),
        )
        for draws in Draws:
            self._compare_pair(probe, rows[:2], draws, draws % 2)
        self._compare_company(probe)

    def _compare_pair(
        self, probe: LossProbe, pair: Sequence[int], draws: Draws, place: int
    ) -> None:
        check = dataclasses.replace(self._check(PairCheck, probe), labels=self._run.labels)
        try:
            self._in_full_precision(probe, lambda: check.run(pair, draws, place))
        except PrivacyError:
            raise
        except Exception:
            if draws is Draws.MIDDLE:
                raise
            # Some code cannot do with improbable draws.
            self._compare_pair(probe, pair, Draws.MIDDLE, place)

    def _compare_company(self, probe: LossProbe, rows: Sequence[int] = ()) -> None:
        """Compare some rows; by default as many as a micro-batch has, if `_compare` saw fewer."""
        least, rows = (2, rows) if rows else (ROWS + 1, probe.company())
        trained = sum(parameter.numel() for parameter in self._parameters.values())
        if len(rows) < least or trained >= _LARGE:
            return
        check = self._check(CompanyCheck, probe)
        self._in_full_precision(probe, lambda: check.run(rows))

    def _check(self, kind: type[_Check], probe: LossProbe) -> _Check:
        return kind(
            module=self._module,
            parameters=self._parameters,
            loss_of=probe,
            layouts=self._layouts,
            loss_reduction=self._settings.loss_reduction,
            negligible=self._negligible(),
        )

    def _negligible(self) -> float:
        normalised = self._settings.clipping == "automatic"
        share = _NEGLIGIBLE_IF_NORMALISED if normalised else _NEGLIGIBLE
        return share * self._settings.clip_norm

    def _in_full_precision(self, probe: LossProbe, check: Callable[[], None]) -> None:
        mixed = str(self._trainer.precision).endswith("-mixed")
        probe.full_precision = mixed
        try:
            check()
        except PrivacyError:
            raise
        except Exception:
            # Some models cannot do without autocast.
            probe.full_precision = False
            if not mixed:
                raise
            check()
