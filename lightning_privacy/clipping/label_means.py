"""Means over the labels of several rows: seen by their structure, and watched at every step.

`cross_entropy` and `nll_loss` divide by the number of labels that are not ignored, or by the sum of
their class weights. Over several rows that is a mean over examples only if all rows have as many
labels, which a few rows cannot show for all.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_privacy.clipping.refusals import uneven_labels, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

_ARGUMENTS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
_MEANS = frozenset({F.cross_entropy, F.nll_loss})


@dataclasses.dataclass(frozen=True, slots=True)
class LabelMean:
    """One mean over labels: over how many rows and labels, and how many of these were ignored.

    ``uneven``: whether the classes' weights differ; None without weights.
    """

    rows: int
    labels: int
    ignored: Tensor
    uneven: Tensor | None


class label_means(TorchFunctionMode):  # noqa: N801 - reads as a statement
    """Context that notes every mean over labels that a later backward reaches.

    What is computed for a log, and is no part of the loss, is not noted.

    Args:
        sink: where to, at the time of the backward.
        rows: number of rows in the batch.
    """

    def __init__(self, sink: list[LabelMean], rows: int) -> None:
        super().__init__()
        self._sink, self._rows = sink, rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and look at it if it is such a mean."""
        result = func(*args, **(kwargs or {}))
        if func in _MEANS and result.requires_grad:
            self._note(result, dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}))
        return result

    def _note(self, result: Tensor, call: dict[str, Any]) -> None:
        target, weight = call["target"], call.get("weight")
        legacy = call.get("reduce") is False or call.get("size_average") is False
        if legacy or call.get("reduction", "mean") != "mean" or target.is_floating_point():
            return
        ignored = (target == call.get("ignore_index", -100)).sum()
        uneven = None if weight is None else (weight != weight.flatten()[0]).any()
        mean = LabelMean(self._rows, target.numel(), ignored, uneven)
        result.register_hook(lambda _: self._sink.append(mean))


class LabelWatch:
    """Refuses means over the labels of several rows as soon as rows have unequal shares in them."""

    def __init__(self) -> None:
        self._ignored_by_row: set[int] = set()
        self._seen: list[LabelMean] = []

    @property
    def active(self) -> bool:
        """Whether such a mean was ever seen, so that every step is to be watched."""
        return bool(self._ignored_by_row)

    def learn(self, alone: Sequence[LabelMean], together: Sequence[LabelMean]) -> None:
        """Look at the same rows one by one and in one batch.

        Args:
            alone: the means of all batches of one row.
            together: the means of the batch of all of them.

        Raises:
            GuaranteeError: a mean over several rows has class weights, or rows have unequal shares.
        """
        largest = max((mean.labels for mean in alone), default=0)
        over_rows = [mean for mean in together if mean.labels > largest]
        if over_rows:
            self._ignored_by_row |= {int(mean.ignored) for mean in alone}
        for mean in over_rows:
            self._judge(mean)

    def watching(self, rows: int) -> AbstractContextManager[object]:
        """A context for one forward over that many rows; costs nothing unless `active`."""
        # A single row's mean is its own, whatever it divides by.
        return label_means(self._seen, rows) if self.active and rows > 1 else nullcontext()

    def verify(self) -> None:
        """Judge all means since the last call.

        Raises:
            GuaranteeError: rows had unequal shares in one of them.
        """
        seen = self._seen.copy()
        self.forget()
        for mean in seen:
            self._judge(mean)

    def forget(self) -> None:
        """Drop what was seen since the last `verify`."""
        self._seen.clear()

    def _judge(self, mean: LabelMean) -> None:
        if mean.uneven is not None and bool(mean.uneven):
            raise weighted_mean()
        ignored = int(mean.ignored)
        if mean.labels % mean.rows or ignored not in {n * mean.rows for n in self._ignored_by_row}:
            alone = " or ".join(map(str, sorted(self._ignored_by_row)))
            raise uneven_labels(
                f"{ignored} of the {mean.labels} labels of {mean.rows} rows ignored, where {alone} "
                "of each row's own were"
            )
