"""Views of an example are read together and form one unit."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling import PoissonSampler, ViewSampler

SETTINGS = {"size": 50, "sample_rate": 0.2, "secret": b"0123456789abcdef"}


@pytest.mark.parametrize("physical", [2, 7, None])
def test_a_draw_is_the_same_and_each_example_is_one_unit(physical):
    sampler, plain = ViewSampler(**SETTINGS, views=3), PoissonSampler(**SETTINGS)
    for cursor in range(20):
        seen: list[int] = []
        for micro in sampler.plan(cursor, physical):
            assert physical is None or len(micro.indices) <= physical
            rows, units = np.array(micro.indices), np.array(micro.units.index)
            for unit, size in enumerate(micro.units.sizes):
                assert size == 3
                (example,) = set(rows[units == unit].tolist())
                seen += [example] * int((units == unit).sum())
        assert sorted(seen) == sorted(plain.draw(cursor).tolist() * 3)


def test_one_view_is_an_ordinary_draw():
    sampler, plain = ViewSampler(**SETTINGS, views=1), PoissonSampler(**SETTINGS)
    assert sampler.plan(4, 8) == plain.plan(4, 8)


def test_an_empty_draw_is_still_a_step():
    sampler = ViewSampler(size=3, sample_rate=1e-9, secret=SETTINGS["secret"], views=4)
    (micro,) = sampler.plan(0, 8)
    assert micro.weights == (0.0,)


def test_no_view_is_refused():
    with pytest.raises(ConfigurationError, match="views"):
        ViewSampler(**SETTINGS, views=0)
