"""Twenty thousand private steps: nothing grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.soak import slope, soak
from tests.callbacks.training import LIGHTNING_NOISE


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings(*LIGHTNING_NOISE, "ignore:Checkpoint directory", "ignore:.*num_workers")
def test_memory_files_and_time_do_not_grow(tmp_path: Path) -> None:
    samples = soak(20_000, tmp_path)
    assert len(samples) == 200
    late = samples[100:]
    assert {sample.files for sample in late} == {late[0].files}
    assert {sample.threads for sample in late} == {late[0].threads}
    # By 1,000 steps: two pages, five objects, one percent; or nothing that stands out.
    steady = {
        "rss_kib": 8.0,
        "objects": 5.0,
        "milliseconds": 0.01 * late[0].milliseconds,
    }
    for name, most in steady.items():
        growth, error = slope(samples, name)
        assert growth <= max(most, 3 * error), name


def test_a_slope_is_found_and_a_level_is_none() -> None:
    from tests.benchmarks.soak import Sample

    def sample(step: int, rss: float) -> Sample:
        return Sample(step=step, rss_kib=rss, files=6, threads=1, objects=9, milliseconds=5)

    level = [sample(100 * i, 1000 + i % 2) for i in range(1, 201)]
    growing = [sample(100 * i, 1000 + i + i % 2) for i in range(1, 201)]
    growth, error = slope(level, "rss_kib")
    assert abs(growth) <= 3 * error + 1e-9
    growth, error = slope(growing, "rss_kib")
    assert growth == pytest.approx(10, abs=0.1)
    assert growth > 3 * error
