from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_privacy.accounting import GaussianRelease, epsilon, max_steps, noise_multiplier_for
from lightning_privacy.accounting.cache import recall, remember
from tests.accounting.goldens import golden

BUDGET = {"epsilon": 4.0, "delta": 1e-6, "sample_rate": 0.01, "steps": 200, "group_size": 4}
GOLDEN = golden("user_level")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PRIVACY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spent(noise_multiplier):
    release = GaussianRelease(
        noise_multiplier=noise_multiplier, sample_rate=0.01, count=200, group_size=4
    )
    return epsilon([release], 1e-6)


def tried(**changes):
    trials = []
    value = noise_multiplier_for(**{**BUDGET, **changes}, progress=lambda *at: trials.append(at))
    return value, trials


def test_a_search_for_groups_is_remembered_and_checked_again(place):
    found, trials = tried()
    assert len(trials) > 3
    assert 3.99 < spent(found) <= 4.0
    again, trials = tried()
    assert again == found
    assert trials == [(found, spent(found))]


@pytest.mark.parametrize("change", [{"epsilon": 3.0}, {"steps": 100}, {"group_size": 3}])
def test_another_question_has_another_answer(place, change):
    found, _ = tried()
    assert tried(**change)[0] != found


def test_an_answer_with_too_little_noise_is_not_believed(place):
    found, _ = tried()
    (file,) = place.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "noise_multiplier": 0.5}))
    assert tried()[0] == found


@pytest.mark.parametrize("text", ["", "{}", '{"noise_multiplier": NaN}', '{"noise_multiplier": 2}'])
def test_a_damaged_file_is_searched_anew(place, text):
    found, _ = tried()
    (file,) = place.iterdir()
    file.write_text(text)
    value, trials = tried()
    assert value == found
    assert len(trials) > 1


def test_without_groups_or_a_place_nothing_is_written(place, tmp_path, monkeypatch):
    tried(group_size=1)
    assert not place.exists()
    monkeypatch.setenv("LIGHTNING_PRIVACY_CACHE", "off")
    remember({"epsilon": 1.0}, 2.0)
    assert recall({"epsilon": 1.0}) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_PRIVACY_CACHE", str(tmp_path / "file" / "below"))
    remember({"epsilon": 1.0}, 2.0)
    assert recall({"epsilon": 1.0}) is None


def test_the_usual_place_is_the_users_cache_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_PRIVACY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember({"epsilon": 1.0}, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_privacy"]
    assert recall({"epsilon": 1.0}) == 2.0


def test_steps_that_fit_are_exact_for_groups():
    arguments = {"delta": 1e-6, "sample_rate": 0.01, "noise_multiplier": 4.0, "group_size": 8}
    steps = max_steps(epsilon=1.0, **arguments)

    def at(count):
        release = GaussianRelease(noise_multiplier=4.0, sample_rate=0.01, count=count, group_size=8)
        return epsilon([release], 1e-6)

    assert at(steps) <= 1.0 < at(steps + 1)


@pytest.mark.parametrize("case", GOLDEN["homogeneous"])
def test_where_all_users_have_enough_examples_noise_hardly_grows(case):
    size = case["group_size"]
    value = noise_multiplier_for(
        epsilon=4.0, delta=1e-6, sample_rate=512 / (10_000 * size), steps=1000, group_size=size
    )
    assert value == pytest.approx(case["noise_multiplier"], abs=2e-3)


def test_where_users_are_skewed_the_noise_grows_with_the_group():
    generator = np.random.default_rng(0)
    counts = np.minimum((generator.pareto(1.1, 20_000) * 3 + 1).astype(int), 2000)
    assert np.median(counts) == 3
    for case in GOLDEN["skewed"]:
        size, budget = case["group_size"], {"epsilon": 4.0, "delta": 1e-6, "steps": 1000}
        rate = 1024 / int(np.minimum(counts, size).sum())
        examples = noise_multiplier_for(sample_rate=rate, group_size=size, **budget)
        users = noise_multiplier_for(sample_rate=1024 / size / 20_000, **budget)
        # The goldens were found to one per cent.
        assert examples == pytest.approx(case["examples"], rel=0.012)
        assert users == pytest.approx(case["users"], rel=0.012)


def test_users_drawn_whole_are_ordinary_units():
    case = GOLDEN["users"]
    release = GaussianRelease(
        noise_multiplier=case["noise_multiplier"],
        sample_rate=case["sample_rate"],
        count=case["steps"],
    )
    assert epsilon([release], 1e-6) == pytest.approx(case["epsilon"], abs=0.01)
