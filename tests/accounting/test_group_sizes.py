from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_privacy.accounting.group_sizes import (
    UserFacts,
    compare_group_sizes,
    recommended,
)
from lightning_privacy.accounting.quantile import private_quantile
from lightning_privacy.errors import ConfigurationError

FACTS = UserFacts(users=20_000, examples_per_user=8, similarity=0.1)
RUN = {"examples_per_step": 1024, "steps": 1000, "epsilon": 4.0, "delta": 1e-6}


def compared(sizes, facts=FACTS, **changes):
    return compare_group_sizes(facts, **{**RUN, **changes}, group_sizes=sizes)


def test_both_ways_cost_the_same_gradients_and_agree_for_one_example():
    one, four = compared([1, 4])
    assert one.example_noise == pytest.approx(one.user_noise, rel=1e-3)
    assert one.by_examples == pytest.approx(one.by_users, rel=1e-3)
    assert four.users_per_step * 4 == RUN["examples_per_step"]
    assert four.example_rate == 1024 / 80_000
    assert four.by_examples == four.example_noise / 1024
    ratio = math.sqrt(0.1 + 0.9 / 4)
    assert four.by_users == pytest.approx(four.user_noise / 256 * ratio)


def test_the_published_rules():
    rows = compared([1, 2, 4, 8, 16])
    examples, users = recommended(rows, median=8)
    assert examples.group_size == 8
    assert users.by_users == min(row.by_users for row in rows)
    assert users.group_size == 2
    # Where all examples of a user are alike, more of them only cost.
    alike = compared([1, 2, 4], UserFacts(users=20_000, examples_per_user=8, similarity=1.0))
    assert recommended(alike, 8)[1].group_size == 1
    # Beyond the median, examples of few heavy users cost everybody noise.
    assert rows[4].by_examples > 1.5 * rows[3].by_examples


def test_counts_of_a_heavy_tail_need_more_noise_than_equal_users():
    counts = np.minimum((np.random.default_rng(0).pareto(1.1, 20_000) * 3 + 1).astype(int), 2000)
    facts = UserFacts(users=20_000, examples_per_user=3, similarity=0.1)
    (row,) = compared([8], facts, examples=lambda size: float(np.minimum(counts, size).sum()))
    assert row.by_examples == pytest.approx(3.88e-3, rel=0.01)


def test_what_is_not_possible_is_left_out():
    small = UserFacts(users=10, examples_per_user=2, similarity=0.5)
    (row,) = compared([2], small, examples_per_step=100, steps=5)
    assert row.example_rate is None is row.users_per_step is row.by_users
    assert recommended([row], 2) == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 1}, "`users` must be a whole number >= 2"),
        ({"examples_per_user": 0.5}, "`examples_per_user` must be a finite number in"),
        ({"similarity": 1.1}, "`similarity` must be a finite number in"),
    ],
)
def test_facts_have_ranges(changes, message):
    fields = {"users": 10, "examples_per_user": 2, "similarity": 0.5}
    with pytest.raises(ConfigurationError, match=message):
        UserFacts(**{**fields, **changes})


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ([], {}, "`group_sizes` must name at least one"),
        ([0], {}, "`group_sizes` must be a whole number >= 1"),
        ([1], {"examples_per_step": 0}, "`examples_per_step` must be a finite number"),
        ([1], {"delta": 1.0}, "`delta` must be a finite number"),
    ],
)
def test_a_comparison_of_nothing_is_refused(sizes, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        compared(sizes, **changes)


# ---------------------------------------------------------------------- a private quantile
COUNTS = np.repeat([1, 2, 3, 5, 9, 200], [300, 200, 150, 200, 100, 50])


def answers(counts, epsilon, quantile=0.5, largest=12, times=400):
    return np.array(
        [
            private_quantile(
                counts, epsilon=epsilon, quantile=quantile, largest=largest, test_seed=seed
            )
            for seed in range(times)
        ]
    )


def test_with_enough_budget_it_is_the_quantile():
    assert set(answers(COUNTS, 5.0, quantile=0.4)) == {2}
    assert set(answers(COUNTS, 5.0, quantile=0.25)) == {1}
    assert set(answers(COUNTS, 5.0, quantile=0.97, largest=300)) == {200}


def test_with_no_budget_it_is_any_number():
    found = answers(COUNTS, 1e-9, times=2000)
    assert np.bincount(found, minlength=13)[1:].min() > 100


def weights_of(counts, epsilon, largest):
    """The exact probabilities, from the definition."""
    scores = []
    for candidate in range(1, largest + 1):
        below, above = (counts < candidate).sum(), (counts > candidate).sum()
        half = 0.5 * len(counts)
        scores.append(-max(below - half, above - half, 0))
    weights = np.exp(epsilon * np.array(scores))  # ε / (2 · ½)
    return weights / weights.sum()


@pytest.mark.parametrize("extra", [1, 4, 12])
def test_one_user_changes_every_probability_by_at_most_the_factor(extra):
    counts, epsilon = np.array([1, 2, 2, 3, 7, 7, 9]), 0.3
    without = weights_of(counts, epsilon, 12)
    with_user = weights_of(np.append(counts, extra), epsilon, 12)
    assert np.abs(np.log(with_user / without)).max() <= epsilon + 1e-12
    found = answers(counts, epsilon, times=8000)
    shares = np.bincount(found, minlength=13)[1:] / 8000
    assert np.abs(shares - without).max() < 0.02


def test_it_is_fresh_each_time_and_checks_its_arguments():
    found = {private_quantile(COUNTS, epsilon=1e-6, largest=10**6) for _ in range(4)}
    assert len(found) > 1
    for wrong in ({"epsilon": 0}, {"largest": 0}, {"quantile": 1}):
        with pytest.raises(ConfigurationError):
            private_quantile(COUNTS, **{"epsilon": 1.0, "largest": 5, **wrong})
