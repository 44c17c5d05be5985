"""Where the sample rate and the public normaliser come from, and what is public because of it."""

from __future__ import annotations

import sys
from typing import NamedTuple

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import NeighbouringRelation, real_number, whole_number


class ResolvedSampling(NamedTuple):
    """What `resolve_sampling` decided.

    Attributes:
        sample_rate: Probability q of each unit, in (0, 1].
        expected_batch_size: The public constant by which a noised sum is divided.
        relation: Which neighbours the guarantee speaks about.
        steps_per_epoch: Private steps in one epoch, round(1/q), at least 1.
        note: One sentence that says where these come from, for logs and reports.
    """

    sample_rate: float
    expected_batch_size: float
    relation: NeighbouringRelation
    steps_per_epoch: int
    note: str


def resolve_sampling(
    *,
    sample_rate: float | None,
    expected_batch_size: float | None,
    dataset_size: int | None,
    actual_size: int,
    loader_batch_size: int,
    world_size: int = 1,
    counted: str = "the data set's length",
) -> ResolvedSampling:
    """Decides the sample rate q and the public normaliser from what the user declared.

    The rate is configuration. Nothing is computed from the data set's own length unless there is
    no other way; then that length is public, and the neighbouring relation is zero-out.

    Args:
        sample_rate: Declared q in (0, 1], or None.
        expected_batch_size: Declared logical batch size > 0, or None.
        dataset_size: Declared (public) number of units >= 1, or None.
        actual_size: The data set's own length, >= 1.
        loader_batch_size: The loader's (physical) batch size, >= 1.
        world_size: Number of processes, >= 1.
        counted: What ``actual_size`` is, in words.

    Returns:
        The rate, the normaliser, the relation, the steps of an epoch and a note.

    Raises:
        ConfigurationError: A value is outside its range, they contradict each other, or the
            batch is larger than the data set.
    """
    declared = _checked(sample_rate, expected_batch_size, dataset_size)
    rate, batch, size = declared
    actual = _count("actual_size", actual_size, "give a data set with at least one unit")
    loader = _count("loader_batch_size", loader_batch_size, "give the DataLoader a batch_size")
    world = _count("world_size", world_size, "pass the number of processes")
    _refuse_contradiction(rate, batch, size)
    if rate is not None and batch is None and size is not None:
        batch, note = rate * size, "normaliser = sample_rate x dataset_size, both declared"
    elif rate is not None and batch is not None:
        note = "sample_rate and expected_batch_size as declared"
    elif rate is not None:
        batch, note = rate * actual, f"normaliser = sample_rate x {counted}"
    else:
        where = (
            "declared" if batch is not None else f"the loader's batch size x {world} process(es)"
        )
        batch = float(loader * world) if batch is None else batch
        source = counted if size is None else "the declared dataset_size"
        rate = _rate(batch, actual if size is None else size, source)
        note = f"sample rate = expected batch size ({where}) / {source}"
    public_length = size is None and (sample_rate is None or expected_batch_size is None)
    if public_length:
        relation = NeighbouringRelation.ZERO_OUT
        note += "; that number is taken as public, so a neighbour has one unit zeroed out"
    else:
        relation = NeighbouringRelation.ADD_OR_REMOVE
        note += "; a neighbour has one unit more or less"
    return ResolvedSampling(rate, batch, relation, _epoch(rate), note)


def _checked(
    sample_rate: float | None, expected_batch_size: float | None, dataset_size: int | None
) -> tuple[float | None, float | None, int | None]:
    cost = "another sampling than the accounted one"
    if sample_rate is not None:
        sample_rate = real_number(
            "sample_rate",
            sample_rate,
            "(0, 1]",
            cost=cost,
            remedy="pass the probability with which each unit is drawn, or expected_batch_size",
        )
    if expected_batch_size is not None:
        expected_batch_size = real_number(
            "expected_batch_size",
            expected_batch_size,
            "(0, inf)",
            cost="a gradient divided by something other than the public constant",
            remedy="pass the logical batch size, for instance 512",
        )
    if dataset_size is not None:
        dataset_size = whole_number(
            "dataset_size",
            dataset_size,
            at_least=1,
            cost=cost,
            remedy="pass a publicly known number of units, or leave it out",
        )
    return sample_rate, expected_batch_size, dataset_size


def _count(name: str, value: object, remedy: str) -> int:
    return whole_number(name, value, at_least=1, cost="no private step could run", remedy=remedy)


def _refuse_contradiction(rate: float | None, batch: float | None, size: int | None) -> None:
    if rate is None or batch is None or size is None:
        return
    if abs(rate * size - batch) > 0.01 * batch:
        raise ConfigurationError(
            must="`expected_batch_size` must be `sample_rate` x `dataset_size`",
            found=f"{batch:g}, where {rate:g} x {size} = {rate * size:g}",
            cost="a gradient divided by something other than the expected batch",
            remedy="pass two of the three",
        )


def _epoch(rate: float) -> int:
    # A tiny rate may have no reciprocal at all.
    if rate * sys.maxsize < 2:
        raise ConfigurationError(
            must=f"one over the sample rate, an epoch, is at most {sys.maxsize // 2} steps",
            found=f"a sample rate of {rate:g}",
            cost="a loader whose length is no number of this machine's",
            remedy="pass the probability with which each unit is drawn in a step",
        )
    return max(1, round(1 / rate))


def _rate(batch: float, size: int, source: str) -> float:
    if batch > size:
        raise ConfigurationError(
            must="the expected batch size must be at most the number of units",
            found=f"an expected batch size of {batch:g} and {source}, {size}",
            cost="a sample rate above 1, which no sampling has",
            remedy="lower `expected_batch_size` (or the DataLoader's batch_size)",
        )
    return batch / size
