"""How a draw of any size becomes micro-batches of a bounded size, never an empty one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


class Sampler(Protocol):
    """What a loader asks of draws."""

    @property
    def size(self) -> int:
        """Number of rows of the data set."""
        ...

    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """The micro-batches of one draw, as a function of its number."""
        ...

    def worker_seed(self, cursor: int) -> int:
        """A seed for data-loading workers, independent of the draws."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRows:
    """Which rows of a micro-batch form one unit, where a unit is more than a row.

    Args:
        index: For each row the number of its unit in this micro-batch, 0 to U - 1.
        sizes: For each unit the number of its rows in the whole draw, of which its gradient is
            the mean.
        unfinished: Whether the unit goes on in the next micro-batch. It is then the only one.
        clip_shares: For each unit its share of the clip norm, in (0, 1]; None where all have the
            whole.

    Raises:
        GuaranteeError: The numbers of units do not agree, an unfinished unit is not alone, or a
            share is outside its range.
    """

    index: tuple[int, ...]
    sizes: tuple[int, ...]
    unfinished: bool = False
    clip_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses what would clip a part of a unit, two units as one, or above the clip norm."""
        shares = self.clip_shares
        if shares is not None and (
            len(shares) != len(self.sizes) or not all(0 < share <= 1 for share in shares)
        ):
            raise GuaranteeError(
                must="each unit has a share of the clip norm, above 0 and at most 1",
                found=f"{len(shares)} shares for {len(self.sizes)} units, up to {max(shares)}",
                cost="a unit whose contribution exceeds clip_norm",
                remedy="pass for each unit the clip norm of its tier over the largest one",
            )
        if set(self.index) != set(range(len(self.sizes))) or (
            self.unfinished and len(self.sizes) != 1
        ):
            raise GuaranteeError(
                must="units are numbered from 0, and one that goes on is alone in its micro-batch",
                found=f"the units {sorted(set(self.index))}, {len(self.sizes)} sizes, "
                f"unfinished={self.unfinished}",
                cost="a user who is clipped in parts has a contribution above clip_norm",
                remedy="make micro-batches with packed(units, physical_batch_size)",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Args:
        indices: Row numbers in the data set; at least one.
        weights: For each row 1.0 if it was drawn, or 0.0 if it only fills the place of an empty
            draw and must contribute nothing.
        units: Which rows form one unit; None where each row is a unit of its own.

    Raises:
        GuaranteeError: There is no row, the lengths differ, or a weight is neither 0 nor 1.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    units: UnitRows | None = None

    def __post_init__(self) -> None:
        """Refuses what no private step could run."""
        if (
            not self.indices
            or len(self.indices) != len(self.weights)
            or (self.units is not None and len(self.units.index) != len(self.indices))
            or not set(self.weights) <= {0.0, 1.0}
        ):
            raise GuaranteeError(
                must="a micro-batch must have at least one row and a weight 0 or 1 for each",
                found=f"{len(self.indices)} rows and the weights {sorted(set(self.weights))} for "
                f"{len(self.weights)}",
                cost="a contribution that is scaled after its norm was bounded",
                remedy="make micro-batches with micro_batches(draw, physical_batch_size)",
            )

    @property
    def drawn(self) -> int:
        """How many of the rows were drawn (private: never log it without saying so)."""
        return sum(weight > 0 for weight in self.weights)


def micro_batches(
    draw: np.ndarray | Sequence[int], physical_batch_size: int | None
) -> tuple[MicroBatch, ...]:
    """Cuts a draw into as few micro-batches as will do, of as equal a size as can be.

    Every row is in one of them, in the order of the draw. Equal sizes keep a GPU busier than full
    ones with a small rest.

    An empty draw gives one row of weight 0, so that a model always sees a valid batch and a
    private step always runs: skipping it would show that nobody was drawn.

    Args:
        draw: Row numbers, each at most once.
        physical_batch_size: Most rows in one pass, >= 1; None puts the whole draw into one.

    Returns:
        At least one micro-batch.

    Raises:
        ConfigurationError: The physical batch size is no whole number >= 1.
    """
    rows = [int(row) for row in draw]
    if not rows:
        return (MicroBatch(indices=(0,), weights=(0.0,)),)
    count = -(-len(rows) // _most_rows(physical_batch_size, len(rows)))
    bounds = [len(rows) * part // count for part in range(count + 1)]
    return tuple(
        MicroBatch(indices=tuple(rows[start:end]), weights=(1.0,) * (end - start))
        for start, end in pairwise(bounds)
    )


def packed(
    units: Sequence[np.ndarray],
    physical_batch_size: int | None,
    clip_shares: Sequence[float] | None = None,
) -> tuple[MicroBatch, ...]:
    """Cuts a draw of units of several rows into micro-batches that keep units together.

    Whole units share a micro-batch as far as they fit, larger ones first. A unit that is larger
    than a micro-batch has consecutive ones for itself, so that one unclipped gradient is kept in
    memory at a time, whatever the units' sizes and numbers.

    Args:
        units: For each unit its row numbers, at least one; no row twice.
        physical_batch_size: Most rows in one pass, >= 1; None puts the whole draw into one.
        clip_shares: For each unit its share of the clip norm, in (0, 1]; None for the whole.

    Returns:
        At least one micro-batch; of an empty draw one row of weight 0.

    Raises:
        ConfigurationError: The physical batch size is no whole number >= 1.
    """
    if not len(units):
        return micro_batches((), physical_batch_size)
    most = _most_rows(physical_batch_size, sum(map(len, units)))
    parts: list[MicroBatch] = []
    waiting: list[int] = []
    room = most
    for number in sorted(range(len(units)), key=lambda unit: len(units[unit]), reverse=True):
        size = len(units[number])
        if size > most:
            parts.extend(_spread(units[number], most, _shares_of(clip_shares, [number])))
            continue
        if size > room:
            parts.append(_together(units, waiting, clip_shares))
            waiting, room = [], most
        waiting.append(number)
        room -= size
    return (*parts, _together(units, waiting, clip_shares)) if waiting else tuple(parts)


def _spread(unit: np.ndarray, most: int, shares: tuple[float, ...] | None) -> list[MicroBatch]:
    count = -(-len(unit) // most)
    bounds = [len(unit) * part // count for part in range(count + 1)]
    return [
        _micro_batch(
            unit[start:end].tolist(),
            UnitRows(
                index=(0,) * (end - start),
                sizes=(len(unit),),
                unfinished=end < len(unit),
                clip_shares=shares,
            ),
        )
        for start, end in pairwise(bounds)
    ]


def _together(
    units: Sequence[np.ndarray], numbers: Sequence[int], clip_shares: Sequence[float] | None
) -> MicroBatch:
    sizes = tuple(len(units[number]) for number in numbers)
    index = tuple(place for place, size in enumerate(sizes) for _ in range(size))
    rows = [row for number in numbers for row in units[number].tolist()]
    shares = _shares_of(clip_shares, numbers)
    return _micro_batch(rows, UnitRows(index=index, sizes=sizes, clip_shares=shares))


def _shares_of(
    clip_shares: Sequence[float] | None, numbers: Sequence[int]
) -> tuple[float, ...] | None:
    return None if clip_shares is None else tuple(clip_shares[number] for number in numbers)


def _micro_batch(rows: list[int], units: UnitRows) -> MicroBatch:
    return MicroBatch(indices=tuple(rows), weights=(1.0,) * len(rows), units=units)


def _most_rows(physical_batch_size: int | None, otherwise: int) -> int:
    if physical_batch_size is None:
        return otherwise
    return whole_number(
        "physical_batch_size",
        physical_batch_size,
        at_least=1,
        cost="rows that were drawn and accounted for, and never used",
        remedy="pass the number of rows that fit into memory at once",
    )
