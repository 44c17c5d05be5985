"""Draws of users and of bounded examples: rates, independence, bounds, and how they are packed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.sampling import (
    BoundedSampler,
    MicroBatch,
    UnitRows,
    UserIndex,
    UserSampler,
    packed,
)

SECRET = b"0123456789abcdef" * 2
SEED = b"fedcba9876543210"
COUNTS = [1, 2, 3, 7, 30]
IDS = np.repeat(np.arange(len(COUNTS)), COUNTS).tolist()
INDEX = UserIndex(IDS)


def users(rate: float = 0.3, size: int = 4, **options) -> UserSampler:
    return UserSampler(index=INDEX, group_size=size, sample_rate=rate, secret=SECRET, **options)


def bounded(rate: float = 0.3, size: int = 4, seed: bytes = SEED) -> BoundedSampler:
    return BoundedSampler(index=INDEX, group_size=size, sample_rate=rate, secret=SECRET, seed=seed)


def binomial(successes: int, trials: int, rate: float) -> bool:
    return stats.binomtest(successes, trials, rate).pvalue > 1e-4


# ---------------------------------------------------------------------- whole users
def test_each_user_is_drawn_at_the_rate_and_independently_of_the_others():
    drawn = np.zeros((3000, len(COUNTS)))
    for cursor in range(3000):
        for rows in users().draw(cursor):
            drawn[cursor, IDS[rows[0]]] += 1
    assert drawn.max() == 1
    assert all(binomial(int(column.sum()), 3000, 0.3) for column in drawn.T)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(len(COUNTS))).max() < 0.08


def test_a_drawn_user_gives_at_most_so_many_rows_each_equally_often():
    seen = np.zeros(len(IDS))
    for cursor in range(2000):
        for rows in users(rate=1.0).draw(cursor):
            assert len(set(rows.tolist())) == len(rows) == min(4, COUNTS[IDS[rows[0]]])
            assert len({IDS[row] for row in rows}) == 1
            seen[rows] += 1
    assert (seen[:6] == 2000).all()
    for start, count in ((6, 7), (13, 30)):
        times = seen[start : start + count].astype(int)
        assert all(binomial(int(time), 2000, 4 / count) for time in times)


def test_a_draw_is_a_function_of_secret_and_cursor():
    first = [rows.tolist() for rows in users(rate=1.0).draw(17)]
    assert [rows.tolist() for rows in users(rate=1.0).draw(17)] == first
    assert [rows.tolist() for rows in users(rate=1.0).draw(18)] != first
    assert users().worker_seed(3) == users().worker_seed(3) != users().worker_seed(4)
    with pytest.raises(GuaranteeError, match="secret of the sampling"):
        users()._users.__reduce__()


def test_shares_lower_the_rate_of_some_users_and_nobody_elses():
    shares = [1.0, 0.5, 1.0, 0.25, 1.0]
    drawn = np.zeros(len(COUNTS), int)
    for cursor in range(4000):
        for rows in users(rate=0.4, rate_shares=shares).draw(cursor):
            drawn[IDS[rows[0]]] += 1
    for number, share in zip(drawn, shares, strict=True):
        assert binomial(int(number), 4000, 0.4 * share)


# ---------------------------------------------------------------------- bounded examples
def test_examples_are_drawn_at_the_rate_out_of_a_fixed_choice():
    sampler = bounded()
    assert sampler.bounded_size == 1 + 2 + 3 + 4 + 4
    assert sampler.size == len(IDS)
    seen = np.zeros(len(IDS), int)
    for cursor in range(2000):
        seen[sampler.draw(cursor)] += 1
    chosen = np.flatnonzero(seen)
    assert len(chosen) == sampler.bounded_size
    assert all(binomial(int(time), 2000, 0.3) for time in seen[chosen])
    assert bounded(rate=1.0).draw(0).tolist() == chosen.tolist()


def test_another_secret_has_the_same_choice():
    other = BoundedSampler(
        index=INDEX, group_size=4, sample_rate=1.0, secret=SECRET[::-1], seed=SEED
    )
    assert other.draw(0).tolist() == bounded(rate=1.0).draw(0).tolist()
    assert bounded(rate=1.0, seed=SEED[::-1]).draw(0).tolist() != other.draw(0).tolist()


@pytest.mark.parametrize("seed", ["0123456789abcdef", b"short", None])
def test_the_seed_of_the_choice_is_bytes(seed):
    with pytest.raises(ConfigurationError, match="`seed` must be 16 to 64 bytes"):
        bounded(seed=seed)


# ---------------------------------------------------------------------- micro-batches
def arrays(*sizes: int) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def shapes(parts) -> list[tuple[list[int], bool]]:
    return [(np.bincount(part.units.index).tolist(), part.units.unfinished) for part in parts]


def test_units_that_fit_are_never_cut():
    parts = packed(arrays(3, 4, 1, 2, 4), 5)
    assert shapes(parts) == [([4], False), ([4], False), ([3, 2], False), ([1], False)]
    assert all(part.units.sizes == tuple(np.bincount(part.units.index)) for part in parts)


def test_a_unit_that_does_not_fit_has_micro_batches_for_itself():
    parts = packed(arrays(2, 11, 1), 4)
    assert shapes(parts) == [([3], True), ([4], True), ([4], False), ([2, 1], False)]
    assert [part.units.sizes for part in parts] == [(11,), (11,), (11,), (2, 1)]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 50, None])
def test_every_row_comes_once(most):
    units = arrays(5, 1, 9, 2, 2, 14, 3)
    parts = packed(units, most)
    rows = [row for part in parts for row in part.indices]
    assert sorted(rows) == list(range(36))
    assert most is None or max(map(len, (part.indices for part in parts))) <= most


def test_an_empty_draw_is_one_row_that_does_not_count():
    (part,) = packed([], 4)
    assert (part.drawn, part.units) == (0, None)


def test_the_samplers_plan_what_they_draw():
    parts = users(rate=1.0).plan(0, 3)
    assert sorted(r for p in parts for r in p.indices) == sorted(
        r for rows in users(rate=1.0).draw(0) for r in rows.tolist()
    )
    assert [part.units for part in bounded().plan(0, 3)] == [None] * len(bounded().plan(0, 3))


@pytest.mark.parametrize(
    ("index", "sizes", "unfinished"),
    [((0, 2), (1, 1), False), ((0, 1), (1,), False), ((0, 1), (1, 1), True), ((), (1,), False)],
)
def test_units_that_do_not_add_up_are_refused(index, sizes, unfinished):
    with pytest.raises(GuaranteeError, match="units are numbered from 0"):
        UnitRows(index=index, sizes=sizes, unfinished=unfinished)


def test_units_must_name_every_row():
    with pytest.raises(GuaranteeError, match="a micro-batch must have"):
        MicroBatch(indices=(1, 2), weights=(1.0, 1.0), units=UnitRows(index=(0,), sizes=(1,)))


# ---------------------------------------------------------------------- scale
@pytest.mark.slow
def test_a_hundred_thousand_skewed_users_with_known_secrets_are_drawn_in_moments():
    import time

    from lightning_privacy.data import SecretsCorpus

    corpus = SecretsCorpus(n_users=100_000, docs_per_user=500, document_skew=0.7)
    people = corpus.users()
    assert len({person.secret for person in people}) == 1000
    counts = np.array([len(person.documents) for person in people])
    assert counts.max() == 500
    assert np.median(counts) == 1
    index = UserIndex(np.repeat([person.name for person in people], counts).tolist())
    assert index.count == 100_000
    start = time.perf_counter()
    by_users = UserSampler(index=index, group_size=8, sample_rate=0.01, secret=SECRET)
    sizes = [sum(map(len, by_users.draw(cursor))) for cursor in range(10)]
    parts = by_users.plan(0, 64)
    by_examples = BoundedSampler(
        index=index, group_size=8, sample_rate=0.01, secret=SECRET, seed=SEED
    )
    by_examples.draw(0)
    assert time.perf_counter() - start < 20
    assert 900 < np.mean(sizes) < 1300
    assert len(parts) < 1.3 * sizes[0] / 64 + 2
    assert by_examples.bounded_size == np.minimum(counts, 8).sum()
