"""One draw over several ranks: the same draw everywhere, each rank its part, no unit divided."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from lightning_privacy.sampling.base import MicroBatch, micro_batches, packed

if TYPE_CHECKING:
    from lightning_privacy.sampling.base import Sampler


class ShardedSampler:
    """One rank's part of the draws of a sampler.

    Guarantees: every drawn row is on exactly one rank, all rows of a unit on the same one; all
    ranks run the same number of micro-batches, which follows from the draw without communication.
    A rank with less to do gets one row of weight 0, as an empty draw does.

    Args:
        whole: The draws, the same on every rank.
        rank: Number of this rank.
        size: Number of ranks.

    Attributes:
        size: Number of rows of the data set.
    """

    def __init__(self, whole: Sampler, *, rank: int, size: int) -> None:
        self._whole, self._rank, self._ranks = whole, rank, size
        self.size = whole.size

    def plan(self, cursor: int, physical_batch_size: int | None) -> tuple[MicroBatch, ...]:
        """Cuts this rank's part of a draw into micro-batches.

        Args:
            cursor: Number of the draw, >= 0.
            physical_batch_size: Most rows in one pass of one rank, >= 1; None for no limit.

        Returns:
            As many micro-batches as every other rank has, at least one.
        """
        (draw,) = self._whole.plan(cursor, None)
        cut = _examples if draw.units is None else _users
        plans = cut(draw, self._ranks, physical_batch_size)
        own, most = plans[self._rank], max(map(len, plans))
        return own + micro_batches((), None) * (most - len(own))

    def worker_seed(self, cursor: int) -> int:
        """Returns a seed for data-loading workers, another one on each rank.

        Args:
            cursor: Number of the draw at which the workers start, >= 0.

        Returns:
            A number in [0, 2**63).
        """
        return (self._whole.worker_seed(cursor) + self._rank * _ODD) % 2**63


def _examples(
    draw: MicroBatch, ranks: int, physical_batch_size: int | None
) -> list[tuple[MicroBatch, ...]]:
    rows = draw.indices if draw.drawn else ()
    return [micro_batches(rows[rank::ranks], physical_batch_size) for rank in range(ranks)]


def _users(
    draw: MicroBatch, ranks: int, physical_batch_size: int | None
) -> list[tuple[MicroBatch, ...]]:
    """The largest user first, each to the rank with the fewest rows so far."""
    units = draw.units
    assert units is not None
    rows, index = np.asarray(draw.indices), np.asarray(units.index)
    ends = np.cumsum(np.bincount(index))[:-1]
    members = np.split(rows[np.argsort(index, kind="stable")], ends)
    loads = [(0, rank) for rank in range(ranks)]
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(range(len(members)), key=lambda unit: len(members[unit]), reverse=True):
        load, rank = heapq.heappop(loads)
        chosen[rank].append(unit)
        heapq.heappush(loads, (load + len(members[unit]), rank))
    shares = units.clip_shares
    return [
        packed(
            [members[unit] for unit in own],
            physical_batch_size,
            None if shares is None else [shares[unit] for unit in own],
        )
        for own in chosen
    ]


# Neighbouring ranks' seeds differ in many bits.
_ODD = 0x9E3779B97F4A7C15
