"""The loader of a private run: one item is one draw, of which it hands out the first micro-batch.

The others are pulled, in order, while the step runs. So whoever counts the loader's items counts
private steps, and user code only ever sees ordinary batches.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.sampling.batch_rows import BatchRows
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.utils.data import Dataset

    from lightning_privacy.sampling.base import MicroBatch, Sampler

_PLAIN_SAMPLERS = (RandomSampler, SequentialSampler, DistributedSampler)


class PrivateLoader:
    """Poisson draws over the data set of an ordinary `DataLoader`.

    Keeps that loader's data set, collate function and workers; its batch size becomes the largest
    physical micro-batch, its order and ``drop_last`` are replaced by Poisson sampling.

    Guarantees: every row of a draw is handed out exactly once and together with that draw, also
    when a step leaves micro-batches behind; nothing is loaded before the first item is asked for,
    and the first draw is the cursor's value at that moment.

    Args:
        base: The loader that the user made.
        sampler: The draws; its size must be the data set's length.
        steps_per_epoch: Number of draws in one pass, >= 1; this is the loader's length.
        cursor: Returns the number of the next draw that was never handed out.
        whole_draws: Put each draw into a single batch, whatever its size.

    Attributes:
        rows: Knows, once it has learnt it, where a batch shows how many rows it has.

    Raises:
        ConfigurationError: ``steps_per_epoch`` is not >= 1, or the sampler is of another size.
        UnsupportedOperationError: The base loader cannot be sampled by Poisson draws.
    """

    def __init__(
        self,
        base: DataLoader[Any],
        sampler: Sampler,
        steps_per_epoch: int,
        cursor: Callable[[], int],
        *,
        whole_draws: bool = False,
    ) -> None:
        check_loader(base)
        self._steps = whole_number(
            "steps_per_epoch",
            steps_per_epoch,
            at_least=1,
            cost="an epoch without a private step",
            remedy="pass round(1 / sample_rate)",
        )
        if sampler.size != len(base.dataset):  # type: ignore[arg-type]
            raise ConfigurationError(
                must="the sampler must draw from all units of the data set",
                found=f"a sampler over {sampler.size} rows and a data set of another length",
                cost="units that are never drawn, or draws that do not exist",
                remedy="make the sampler with size=len(dataset)",
            )
        self._cursor = cursor
        batch_size = base.batch_sampler.batch_size  # type: ignore[union-attr]
        self._batches = _BatchIndices(sampler, None if whole_draws else batch_size)
        self._generator = torch.Generator()
        self.rows = BatchRows()
        self._loader = rebuilt(
            base, base.dataset, {"batch_sampler": self._batches, "generator": self._generator}
        )
        # Weakly: a cycle of references would leave workers to the garbage collector, which lets
        # each of them run into a timeout of five seconds.
        self._epoch: weakref.ref[_Epoch] | None = None
        # What Lightning and user code read off an ordinary loader.
        self.dataset = base.dataset
        self.batch_size = batch_size
        self.collate_fn = base.collate_fn
        self.num_workers = base.num_workers
        self.sampler = None
        self.batch_sampler = None

    def __len__(self) -> int:
        """The number of private steps in one pass."""
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        """Starts a pass; nothing is read, not even the cursor, before the first item."""
        return _Epoch(self)

    @property
    def current(self) -> tuple[MicroBatch, ...]:
        """The micro-batches of the draw handed out last, the first one included."""
        return self._running().micro

    @property
    def cursor_of_current(self) -> int:
        """The number of the draw handed out last."""
        return self._running().cursor

    def next_micro(self) -> Any:
        """Returns the next micro-batch of the current draw, as an ordinary batch.

        Returns:
            What the data set's collate function makes of the rows.

        Raises:
            GuaranteeError: Every micro-batch of the draw was handed out already, or the collate
                function dropped or repeated rows of this one.
        """
        return self._running().next_micro()

    @property
    def _iterator(self) -> Any:
        """Where a DataLoader keeps its persistent workers; a trainer that ends them looks here."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def after(self, earlier: PrivateLoader | None) -> PrivateLoader:
        """Takes over what an earlier loader of the same fit has learnt of batches.

        Args:
            earlier: That loader; None for none.

        Returns:
            This loader.
        """
        if earlier is not None:
            self.rows = earlier.rows
        return self

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the position belongs to the run's privacy state, not to the loader.

        Returns:
            An empty dictionary.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Ignores what it is given, for the same reason.

        Args:
            state_dict: Anything.
        """

    def _begin(self, epoch: _Epoch) -> tuple[int, Iterator[Any]]:
        """Makes a pass the current one, with its first item; only now is the cursor read."""
        self._epoch = weakref.ref(epoch)
        cursor = self._cursor()
        self._batches.start, self._batches.stop = cursor, cursor + self._steps
        # Workers' seeds come from a generator of our own: torch would take them from its global
        # one, and so change the user's random numbers.
        self._generator.manual_seed(self._batches.sampler.worker_seed(cursor))
        return cursor, iter(self._loader)

    def _is_current(self, epoch: _Epoch) -> bool:
        return self._epoch is not None and self._epoch() is epoch

    def _running(self) -> _Epoch:
        epoch = None if self._epoch is None else self._epoch()
        if epoch is None:
            raise GuaranteeError(
                must="a draw must have been handed out",
                found="a PrivateLoader of which no pass has handed out an item, or none is left",
                cost="a step on rows that were not drawn for it",
                remedy="iterate over the loader, and ask for micro-batches inside the step",
            )
        return epoch


class _Epoch:
    """One pass over a `PrivateLoader`."""

    def __init__(self, owner: PrivateLoader) -> None:
        self._owner = owner
        self._rows: Iterator[Any] | None = None
        self._first = 0
        self._done = 0
        self._pulled = 0
        self.cursor = -1
        self.micro: tuple[MicroBatch, ...] = ()

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        if self._rows is not None and not self._owner._is_current(self):
            raise GuaranteeError(
                must="a PrivateLoader must be iterated by one pass at a time",
                found="a pass that goes on after another one has begun",
                cost="a draw that is used twice and accounted for once",
                remedy="finish or drop the first pass before beginning the second",
            )
        if self._done == len(self._owner):
            raise StopIteration
        if self._rows is None:
            self._first, self._rows = self._owner._begin(self)
        # A step that left micro-batches behind must not pass them on to the next draw.
        while self._pulled < len(self.micro):
            self.next_micro()
        self.cursor = self._first + self._done
        self.micro = self._owner._batches.plan(self.cursor)
        self._done += 1
        self._pulled = 0
        return self.next_micro()

    def next_micro(self) -> Any:
        if self._pulled == len(self.micro) or self._rows is None:
            raise GuaranteeError(
                must="a step must ask for each micro-batch of its draw once",
                found=f"a request for one more than the {len(self.micro)} of draw {self.cursor}",
                cost="rows of the next draw in this step",
                remedy="ask len(loader.current) - 1 times after the first",
            )
        self._pulled += 1
        batch = next(self._rows)
        self._owner.rows.require(batch, len(self.micro[self._pulled - 1].indices))
        return batch


class _BatchIndices:
    """The batch sampler of the rebuilt loader: all micro-batches of a range of draws, in order."""

    def __init__(self, sampler: Sampler, physical_batch_size: int | None) -> None:
        self.sampler = sampler
        self.physical_batch_size = physical_batch_size
        self.start = 0
        self.stop = 0

    def plan(self, cursor: int) -> tuple[MicroBatch, ...]:
        return self.sampler.plan(cursor, self.physical_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for cursor in range(self.start, self.stop):
            for micro in self.plan(cursor):
                yield list(micro.indices)


def check_loader(base: object) -> None:
    """Refuses loaders whose order or content Poisson sampling cannot replace.

    Args:
        base: The loader that the user made.

    Raises:
        UnsupportedOperationError: It is no plain map-style `DataLoader` with automatic batching
            and one of torch's own samplers.
    """
    if not isinstance(base, DataLoader):
        raise _refused(
            "a torch DataLoader",
            f"a {type(base).__name__}",
            "return a DataLoader over a map-style data set",
        )
    if isinstance(base.dataset, IterableDataset):
        raise _refused(
            "a map-style data set, with __getitem__ and __len__",
            f"the IterableDataset {type(base.dataset).__name__}",
            "load the records into a list, or index them, so that any of them can be drawn",
        )
    if not hasattr(base.dataset, "__len__") or len(base.dataset) == 0:
        raise _refused(
            "a data set with a length of at least 1",
            f"a {type(base.dataset).__name__} without a length or without rows",
            "give the data set a __len__, and at least one row",
        )
    if type(base).__iter__ is not DataLoader.__iter__:
        raise _refused(
            "a DataLoader that iterates as torch's does",
            f"{type(base).__name__}, which overrides __iter__",
            "return a plain DataLoader; move per-batch work into collate_fn or the module",
        )
    _check_samplers(base)


def _check_samplers(base: DataLoader[Any]) -> None:
    if base.batch_sampler is None:
        raise _refused(
            "a batch_size",
            "batch_size=None",
            "pass the number of rows that fit into memory at once",
        )
    if type(base.batch_sampler) is not BatchSampler:
        raise _refused(
            "no batch sampler of its own",
            f"the batch sampler {type(base.batch_sampler).__name__}",
            "pass batch_size=; private steps draw their own batches",
        )
    sampler = base.batch_sampler.sampler
    if type(sampler) not in _PLAIN_SAMPLERS:
        raise _refused(
            "no sampler of its own",
            f"the sampler {type(sampler).__name__}",
            "leave sampler= out; to weight units, duplicate or drop them in public preprocessing",
        )
    if isinstance(sampler, RandomSampler) and (
        sampler.replacement or sampler.num_samples != len(sampler.data_source)
    ):
        raise _refused(
            "a sampler that visits every unit once",
            "RandomSampler with replacement or with num_samples",
            "pass shuffle=True instead; the expected batch size sets how many units are drawn",
        )


def rebuilt(
    base: DataLoader[Any], dataset: Dataset[Any], batching: Mapping[str, Any]
) -> DataLoader[Any]:
    """A loader that differs from another one in its data and in how it batches.

    Args:
        base: The other one.
        dataset: The data.
        batching: What `DataLoader` is to be told about batches and their order.

    Returns:
        The loader, with workers, collate function and the rest of ``base``.
    """
    return DataLoader(
        dataset,
        **batching,
        num_workers=base.num_workers,
        collate_fn=base.collate_fn,
        pin_memory=base.pin_memory,
        timeout=base.timeout,
        worker_init_fn=base.worker_init_fn,
        multiprocessing_context=base.multiprocessing_context,
        prefetch_factor=base.prefetch_factor,
        persistent_workers=base.persistent_workers,
    )


def _refused(must: str, found: str, remedy: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        must=f"private training needs {must}",
        found=found,
        cost="batches that are not Poisson draws, for which the printed ε does not hold",
        remedy=remedy,
    )
