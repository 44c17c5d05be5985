"""A draw over several ranks: every row once, users whole, as many passes everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_privacy.sampling import PoissonSampler, ShardedSampler, UserIndex, UserSampler

SECRET = b"s" * 32
IDS = [0] * 30 + [1] * 7 + [2] * 7 + list(range(3, 60))


def of_examples(rate: float = 0.3) -> PoissonSampler:
    return PoissonSampler(size=50, sample_rate=rate, secret=SECRET)


def of_users() -> UserSampler:
    return UserSampler(
        index=UserIndex(IDS), group_size=40, sample_rate=0.4, secret=SECRET,
        clip_shares=[1 / (1 + user % 3) for user in range(60)],
    )  # fmt: skip


def plans(sampler, size: int, cursor: int, physical: int | None = 4):
    return [
        ShardedSampler(sampler, rank=rank, size=size).plan(cursor, physical) for rank in range(size)
    ]


def rows(plan) -> list[int]:
    pairs = [pair for micro in plan for pair in zip(micro.indices, micro.weights, strict=True)]
    return [row for row, weight in pairs if weight]


@pytest.mark.parametrize("sampler", [of_examples(), of_examples(0.02), of_users()])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_drawn_row_is_on_one_rank(sampler, size) -> None:
    for cursor in range(30):
        (whole,) = sampler.plan(cursor, None)
        drawn = sorted(rows([whole]))
        parts = plans(sampler, size, cursor)
        assert sorted(itertools.chain(*map(rows, parts))) == drawn
        assert len({len(part) for part in parts}) == 1
        assert all(len(micro.indices) <= 4 for part in parts for micro in part)


def test_examples_are_spread_evenly() -> None:
    for cursor in range(20):
        loads = [len(rows(part)) for part in plans(of_examples(), 3, cursor)]
        assert max(loads) - min(loads) <= 1


def test_users_stay_whole_with_their_own_clip_share() -> None:
    sampler, index, found = of_users(), UserIndex(IDS), set()
    for cursor in range(20):
        for part in plans(sampler, 2, cursor):
            units = [micro for micro in part if micro.units is not None]
            for micro in units:
                for row, unit in zip(micro.indices, micro.units.index, strict=True):
                    user = IDS[row]
                    assert micro.units.sizes[unit] == len(index.rows(user))
                    assert micro.units.clip_shares[unit] == 1 / (1 + user % 3)
                    found.add(user)
            open_units = [micro.units.unfinished for micro in units]
            assert not open_units or not open_units[-1]
        owners = [{IDS[row] for row in rows(part)} for part in plans(sampler, 2, cursor)]
        assert not owners[0] & owners[1]
    assert {0, 1, 2} <= found


def test_users_are_spread_by_load() -> None:
    loads = np.array([[len(rows(p)) for p in plans(of_users(), 2, c, None)] for c in range(60)])
    assert np.abs(loads[:, 0] - loads[:, 1]).mean() < 8  # one user has 30 rows
    small = np.array([max(load) < 25 for load in loads])
    assert np.abs(loads[small, 0] - loads[small, 1]).max() <= 1


def test_an_empty_draw_is_a_row_of_weight_zero_on_each_rank() -> None:
    parts = plans(of_examples(1e-9), 3, 0)
    assert parts[0] == parts[1] == parts[2]
    assert parts[0][0].weights == (0.0,)


def test_workers_of_different_ranks_have_different_seeds() -> None:
    seeds = [ShardedSampler(of_examples(), rank=r, size=4).worker_seed(3) for r in range(4)]
    assert len(set(seeds)) == 4
    assert seeds[0] == of_examples().worker_seed(3)
    assert all(0 <= seed < 2**63 for seed in seeds)
