from __future__ import annotations

import gc
import math
import random
import time

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.sampling import PoissonSampler, PrivateLoader

SIZE = 40
SECRET = b"0123456789abcdef" * 2


class Rows(Dataset):
    """Row i as a tuple or a dictionary around the number i."""

    def __init__(self, size: int = SIZE, kind: str = "tuple") -> None:
        self.size = size
        self.kind = kind

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        row = torch.tensor(float(index)), index
        return {"x": row[0], "row": row[1]} if self.kind == "dict" else row


def numbers(batch) -> list[int]:
    return (batch["row"] if isinstance(batch, dict) else batch[1]).tolist()


def private(
    base: DataLoader | None = None, *, rate: float = 0.2, steps: int = 5, cursor=None, **options
) -> PrivateLoader:
    base = DataLoader(Rows(), batch_size=4) if base is None else base
    sampler = PoissonSampler(size=len(base.dataset), sample_rate=rate, secret=SECRET)
    return PrivateLoader(base, sampler, steps, cursor or (lambda: 0), **options)


def draws(loader: PrivateLoader) -> list[tuple[int, list[list[int]]]]:
    """All draws of one pass: cursor and the rows of each micro-batch, as a step would ask."""
    found = []
    for batch in loader:
        parts = [numbers(batch)]
        parts += [numbers(loader.next_micro()) for _ in loader.current[1:]]
        assert parts == [list(micro.indices) for micro in loader.current]
        found.append((loader.cursor_of_current, parts))
    return found


def expected(rate: float, cursor: int, size: int = SIZE) -> list[int]:
    draw = PoissonSampler(size=size, sample_rate=rate, secret=SECRET).draw(cursor)
    return draw.tolist() or [0]


WORKERS = [0, 2]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_one_item_is_one_draw(workers, kind):
    loader = private(DataLoader(Rows(kind=kind), batch_size=4, num_workers=workers, shuffle=True))
    assert len(loader) == 5
    found = draws(loader)
    assert [cursor for cursor, _ in found] == [0, 1, 2, 3, 4]
    for cursor, parts in found:
        assert [row for part in parts for row in part] == expected(0.2, cursor)
        sizes = [len(part) for part in parts]
        assert len(sizes) == math.ceil(sum(sizes) / 4)
        assert max(sizes) - min(sizes) <= 1
    assert any(len(parts) > 1 for _, parts in found)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("persistent", [False, True])
def test_the_next_pass_goes_on_behind_the_last(workers, persistent):
    state = {"cursor": 0}
    base = DataLoader(
        Rows(), batch_size=4, num_workers=workers, persistent_workers=persistent and workers > 0
    )
    loader = private(base, steps=3, cursor=lambda: state["cursor"])
    seen = []
    for _ in range(3):
        found = draws(loader)
        seen += found
        state["cursor"] = found[-1][0] + 1
    assert [cursor for cursor, _ in seen] == list(range(9))
    for cursor, parts in seen:
        assert [row for part in parts for row in part] == expected(0.2, cursor)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_pass_can_begin_at_any_cursor(workers):
    base = DataLoader(Rows(), batch_size=4, num_workers=workers)
    whole = draws(private(base, steps=6))
    resumed = draws(private(base, steps=4, cursor=lambda: 2))
    assert resumed == whole[2:]


def test_the_cursor_is_read_with_the_first_item_and_not_before():
    state = {"cursor": 0}
    loader = private(cursor=lambda: state["cursor"])
    assert len(loader) == 5
    iterator = iter(loader)
    state["cursor"] = 7  # a checkpoint is restored after the loader was made
    next(iterator)
    assert loader.cursor_of_current == 7
    state["cursor"] = 3
    next(iterator)
    assert loader.cursor_of_current == 8


def test_a_length_needs_no_data():
    class Untouchable(Rows):
        def __getitem__(self, index):
            raise AssertionError("a row was read")

    loader = private(DataLoader(Untouchable(), batch_size=4))
    assert len(loader) == 5
    iter(loader)


def test_an_empty_draw_is_an_ordinary_batch_of_weight_zero():
    loader = private(rate=1e-9)
    for batch in loader:
        assert numbers(batch) == [0]
        assert [micro.weights for micro in loader.current] == [(0.0,)]


def test_a_whole_draw_can_be_one_batch():
    found = draws(private(rate=0.6, whole_draws=True))
    assert all(len(parts) == 1 for _, parts in found)
    assert max(len(parts[0]) for _, parts in found) > 4


@pytest.mark.parametrize("workers", WORKERS)
def test_micro_batches_left_behind_do_not_reach_the_next_draw(workers):
    # Merged into the next draw they would put a row into two steps that count as one.
    loader = private(DataLoader(Rows(), batch_size=4, num_workers=workers), rate=0.5)
    for batch in loader:
        assert numbers(batch) == list(loader.current[0].indices)
        first = loader.current[0].indices
        assert list(first) == expected(0.5, loader.cursor_of_current)[: len(first)]
        assert len(loader.current) > 1


def test_no_more_micro_batches_than_the_draw_has():
    loader = private()
    iterator = iter(loader)
    next(iterator)
    for _ in loader.current[1:]:
        loader.next_micro()
    with pytest.raises(GuaranteeError, match="ask for each micro-batch of its draw once"):
        loader.next_micro()
    next(iterator)  # which does no harm


def test_nothing_is_current_before_the_first_item():
    loader = private()
    for ask in (loader.next_micro, lambda: loader.current, lambda: loader.cursor_of_current):
        with pytest.raises(GuaranteeError, match="a draw must have been handed out"):
            ask()
    iter(loader)
    with pytest.raises(GuaranteeError, match="a draw must have been handed out"):
        loader.next_micro()


def test_two_passes_at_once_are_refused():
    loader = private()
    first, second = iter(loader), iter(loader)
    next(first)
    next(second)
    with pytest.raises(GuaranteeError, match="one pass at a time"):
        next(first)


def test_asking_for_a_pass_and_not_beginning_it_does_no_harm():
    # Trainers check in this way whether a loader can be iterated.
    loader = private()
    running = iter(loader)
    next(running)
    iter(loader)
    next(running)
    assert loader.cursor_of_current == 1


def test_a_pass_ends_after_its_steps():
    iterator = iter(private(steps=1))
    next(iterator)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_the_loader_has_no_state_of_its_own():
    loader = private()
    assert loader.state_dict() == {}
    loader.load_state_dict({"anything": 3})
    assert draws(loader)[0][0] == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_loading_leaves_the_global_random_numbers_alone(workers):
    base = DataLoader(Rows(), batch_size=4, num_workers=workers, shuffle=True)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    draws(private(base, steps=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_the_user_s_generator_is_left_alone():
    generator = torch.Generator()
    before = generator.get_state()
    draws(private(DataLoader(Rows(), batch_size=4, shuffle=True, generator=generator)))
    assert torch.equal(generator.get_state(), before)


def collate_with_mark(rows):
    return {"row": torch.tensor([row[1] for row in rows]), "mark": "own"}


def mark_worker(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.kind = "dict"


def test_the_user_s_loader_is_kept_in_everything_but_the_order():
    base = DataLoader(Rows(), batch_size=4, collate_fn=collate_with_mark, drop_last=True)
    loader = private(base)
    assert next(iter(loader))["mark"] == "own"
    assert loader.dataset is base.dataset
    assert loader.batch_size == 4
    assert loader.collate_fn is collate_with_mark


def test_workers_are_set_up_as_the_user_wished():
    base = DataLoader(
        Rows(),
        batch_size=4,
        num_workers=1,
        prefetch_factor=3,
        timeout=30,
        worker_init_fn=mark_worker,
        multiprocessing_context="fork",
    )
    loader = private(base, steps=2)
    assert isinstance(next(iter(loader)), dict)
    inner = loader._loader
    assert (inner.num_workers, inner.prefetch_factor, inner.timeout) == (1, 3, 30)
    assert inner.multiprocessing_context.get_start_method() == "fork"


@pytest.mark.slow
def test_spawned_workers_see_no_secret():
    base = DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert draws(private(base, steps=2)) == draws(private(steps=2))


@pytest.mark.parametrize("persistent", [False, True])
def test_dropping_a_loader_ends_its_workers_at_once(persistent):
    # In a cycle of references each worker would run into a timeout of five seconds.
    others = set(torch.multiprocessing.active_children())
    base = DataLoader(Rows(), batch_size=4, num_workers=2, persistent_workers=persistent)
    loader = private(base)
    iterator = iter(loader)
    next(iterator)
    workers = set(torch.multiprocessing.active_children()) - others
    assert len(workers) == 2
    gc.disable()
    try:
        start = time.monotonic()
        del iterator, loader, base
        assert time.monotonic() - start < 4
    finally:
        gc.enable()
    assert not any(worker.is_alive() for worker in workers)


def test_a_trainer_can_end_persistent_workers():
    others = set(torch.multiprocessing.active_children())
    base = DataLoader(Rows(), batch_size=4, num_workers=1, persistent_workers=True)
    loader = private(base)
    draws(loader)
    (worker,) = set(torch.multiprocessing.active_children()) - others
    loader._iterator._shutdown_workers()
    loader._iterator = None
    assert not worker.is_alive()
    assert len(draws(loader)) == 5


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Lengthless(Dataset):
    def __getitem__(self, index):
        return index


class Mover(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


def wrong(kind: str) -> object:
    rows = Rows()
    return {
        "no loader": [1, 2, 3],
        "iterable": DataLoader(Stream(), batch_size=4),
        "without length": DataLoader(Lengthless(), batch_size=4, sampler=SequentialSampler(rows)),
        "empty": DataLoader(Rows(0), batch_size=4),
        "no batch size": DataLoader(rows, batch_size=None),
        "batch sampler": DataLoader(rows, batch_sampler=[[0, 1], [2]]),
        "own sampler": DataLoader(rows, batch_size=4, sampler=range(10)),
        "own sampler inside": DataLoader(rows, batch_sampler=BatchSampler(range(10), 4, True)),
        "weighted": DataLoader(rows, batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40)),
        "replacement": DataLoader(
            rows, batch_size=4, sampler=RandomSampler(rows, replacement=True)
        ),
        "part": DataLoader(rows, batch_size=4, sampler=RandomSampler(rows, num_samples=10)),
        "own iteration": Mover(rows, batch_size=4),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no loader", "needs a torch DataLoader\nFound: a list"),
        ("iterable", "needs a map-style data set.*\nFound: the IterableDataset Stream"),
        ("without length", "data set with a length of at least 1\nFound: a Lengthless without"),
        ("empty", "data set with a length of at least 1\nFound: a Rows without"),
        ("no batch size", "needs a batch_size\nFound: batch_size=None"),
        ("batch sampler", "no batch sampler of its own\nFound: the batch sampler list"),
        ("own sampler", "no sampler of its own\nFound: the sampler range"),
        ("own sampler inside", "no sampler of its own\nFound: the sampler range"),
        ("weighted", "no sampler of its own\nFound: the sampler WeightedRandomSampler"),
        ("replacement", "visits every unit once\nFound: RandomSampler with replacement"),
        ("part", "visits every unit once\nFound: RandomSampler with replacement"),
        ("own iteration", "iterates as torch's does\nFound: Mover, which overrides __iter__"),
    ],
)
def test_loaders_that_poisson_draws_cannot_replace_are_refused(kind, message):
    with pytest.raises(UnsupportedOperationError, match=message):
        PrivateLoader(
            wrong(kind),
            PoissonSampler(size=SIZE, sample_rate=0.1, secret=SECRET),
            5,
            lambda: 0,
        )


def test_ordinary_samplers_are_replaced_without_complaint():
    rows = Rows()
    for options in (
        {"shuffle": True},
        {"drop_last": True},
        {"sampler": RandomSampler(rows)},
        {"sampler": SequentialSampler(rows)},
        {"sampler": torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=0)},
        {"batch_sampler": BatchSampler(SequentialSampler(rows), 4, drop_last=False)},
    ):
        size = {} if "batch_sampler" in options else {"batch_size": 4}
        base = DataLoader(rows, **size, **options)
        assert draws(private(base)) == draws(private())


def test_the_sampler_must_fit_the_data_set():
    sampler = PoissonSampler(size=SIZE - 1, sample_rate=0.1, secret=SECRET)
    with pytest.raises(ConfigurationError, match="must draw from all units of the data set"):
        PrivateLoader(DataLoader(Rows(), batch_size=4), sampler, 5, lambda: 0)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_a_pass_must_have_steps(bad):
    with pytest.raises(ConfigurationError, match="`steps_per_epoch` must be a whole number >= 1"):
        private(steps=bad)
