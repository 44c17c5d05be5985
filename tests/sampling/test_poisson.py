from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.sampling import PoissonSampler, poisson

# A correct sampler fails a statistical test below once in a million; and the secret is fixed.
ALPHA = 1e-6
SECRET = b"0123456789abcdef" * 2


def sampler(size: int = 1000, rate: float = 0.1, secret: bytes = SECRET) -> PoissonSampler:
    return PoissonSampler(size=size, sample_rate=rate, secret=secret)


def inclusion(size: int, rate: float, draws: int) -> np.ndarray:
    """Matrix [draw, unit] of who was drawn."""
    source = sampler(size, rate)
    table = np.zeros((draws, size), dtype=bool)
    for cursor in range(draws):
        table[cursor, source.draw(cursor)] = True
    return table


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
def test_every_unit_is_drawn_with_the_probability_promised(rate):
    table = inclusion(200, rate, 2000)
    total = stats.binomtest(int(table.sum()), table.size, rate)
    assert total.pvalue > ALPHA
    each = [stats.binomtest(int(count), len(table), rate).pvalue for count in table.sum(0)]
    assert min(each) > ALPHA / len(each)


def test_the_probability_test_notices_a_wrong_rate():
    table = inclusion(200, 0.105, 2000)
    assert stats.binomtest(int(table.sum()), table.size, 0.1).pvalue < ALPHA


def test_units_are_drawn_independently_of_each_other():
    table = inclusion(60, 0.3, 3000).astype(float)
    correlation = np.corrcoef(table.T)[np.triu_indices(60, 1)] * math.sqrt(len(table))
    assert np.abs(correlation).max() < stats.norm.isf(ALPHA / 2 / len(correlation))


def test_draws_are_independent_of_each_other():
    table = inclusion(3000, 0.3, 60).astype(float)
    correlation = np.corrcoef(table)[np.triu_indices(60, 1)] * math.sqrt(table.shape[1])
    assert np.abs(correlation).max() < stats.norm.isf(ALPHA / 2 / len(correlation))


def test_sizes_of_draws_are_binomial():
    sizes = inclusion(200, 0.1, 2000).sum(1)
    # A fixed batch size, as of a shuffled loader, would have no variance.
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], len(sizes))
    assert low < ((sizes - 20) ** 2).sum() / 18 < high


def test_a_draw_is_a_pure_function_of_the_cursor():
    source = sampler()
    cursors = [5, 0, 3, 5, 2**40, 3]
    first = [source.draw(cursor) for cursor in cursors]
    again = [sampler().draw(cursor) for cursor in cursors]
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert np.array_equal(first[0], first[3])
    distinct = {tuple(draw) for draw in first}
    assert len(distinct) == 4


def test_a_draw_is_sorted_and_without_repetition():
    draw = sampler().draw(0)
    assert draw.dtype == np.int64
    assert np.array_equal(draw, np.unique(draw))
    assert draw.min() >= 0
    assert draw.max() < 1000


def test_empty_draws_happen():
    source = sampler(10, 0.01)
    draws = [source.draw(cursor) for cursor in range(50)]
    assert any(len(draw) == 0 for draw in draws)
    assert all(draw.dtype == np.int64 for draw in draws)


def test_a_rate_of_one_draws_everybody():
    assert np.array_equal(sampler(50, 1.0).draw(3), np.arange(50))


@pytest.mark.parametrize("bit", [0, 31, 32, 33, 63, 64, 65, 200])
def test_every_bit_of_the_cursor_counts(bit):
    source = sampler()
    assert not np.array_equal(source.draw(7), source.draw(7 + 2**bit))


def test_every_secret_has_its_own_draws():
    draws = [sampler(secret=bytes([i]) * 32).draw(0) for i in range(5)]
    for left, right in itertools.combinations(draws, 2):
        assert not np.array_equal(left, right)


def test_a_large_data_set_is_drawn_in_pieces(monkeypatch):
    whole = sampler(1000, 0.3).draw(1)
    monkeypatch.setattr(poisson, "_CHUNK", 64)
    assert np.array_equal(sampler(1000, 0.3).draw(1), whole)


def test_nothing_outside_influences_a_draw_and_nothing_is_influenced():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = sampler().draw(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert np.array_equal(sampler().draw(0), first)


def test_the_seed_of_workers_is_not_the_key_of_a_draw():
    source = sampler()
    seeds = {source.worker_seed(cursor) for cursor in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert source.worker_seed(3) != source._key(b"draw", 3) >> 65


def test_the_secret_stays_in_the_process():
    source = sampler()
    for escape in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(GuaranteeError, match="must stay in the process"):
            escape(source)
    assert SECRET.decode() not in repr(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "`size` must be a whole number >= 1"),
        ({"size": 10.0}, "`size` = 10.0"),
        ({"size": True}, "`size` = True"),
        ({"sample_rate": 0}, r"`sample_rate` must be a finite number in \(0, 1\]"),
        ({"sample_rate": 1.1}, "`sample_rate` = 1.1"),
        ({"sample_rate": math.nan}, "`sample_rate` = nan"),
        ({"sample_rate": True}, "`sample_rate` = True"),
        ({"secret": b"short"}, "`secret` must be 16 to 64 bytes\nFound: 5 bytes"),
        ({"secret": "x" * 32}, "`secret` must be 16 to 64 bytes\nFound: str"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        PoissonSampler(**{"size": 10, "sample_rate": 0.1, "secret": SECRET, **change})


@pytest.mark.parametrize("bad", [-1, 1.0, True, None])
def test_the_cursor_must_be_a_whole_number(bad):
    with pytest.raises(ConfigurationError, match="`cursor` must be a whole number >= 0"):
        sampler().draw(bad)
