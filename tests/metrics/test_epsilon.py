"""The bounds agree with published vectors, lie as seldom as they say, and have ceilings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics import EpsilonLowerBound
from lightning_privacy.metrics.functional import (
    BOUND_METHODS,
    clopper_pearson_epsilon,
    epsilon_lower_bound,
    gaussian_epsilon,
    gdp_epsilon,
    one_run_epsilon,
    one_run_fdp_epsilon,
)
from lightning_privacy.metrics.functional.scores import Counts, Scores, hull


def even(shift: float, count: int = 10_000) -> tuple[Tensor, Tensor]:
    """Normal scores without chance: the quantiles, members shifted."""
    quantiles = stats.norm.ppf((np.arange(count) + 0.5) / count)
    return torch.tensor(np.r_[quantiles + shift, quantiles]), torch.arange(2 * count) < count


# Of 10,000 members and as many others, α = 0.05, δ = 1e-6, every corner of the hull tried.
@pytest.mark.parametrize(
    ("shift", "one_run", "one_run_fdp", "exact"),
    [
        (0, 0, 0, 0),
        (1, 1.133460, 2.164749, 4.887),
        (2, 2.311945, 4.721807, 10.997),
        (4, 4.395568, 9.133752, 26.357),
    ],
)
def test_published_vectors(shift: float, one_run: float, one_run_fdp: float, exact: float) -> None:
    scores, member = even(shift)
    found = {
        method: float(
            epsilon_lower_bound(scores, member, delta=1e-6, method=method, threshold="bonferroni")
        )
        for method in BOUND_METHODS
    }
    assert found["one_run"] == pytest.approx(one_run, abs=1e-6)
    assert found["one_run_fdp"] == pytest.approx(one_run_fdp, abs=1e-6)
    assert gaussian_epsilon(shift, 1e-6) == pytest.approx(exact, abs=1e-3)
    assert all(value <= exact for value in found.values())


@pytest.mark.parametrize(
    ("count", "ceiling"), [(100, 3.28), (500, 4.91), (1000, 5.60), (5000, 7.21), (10_000, 7.90)]
)
def test_the_ceiling_of_a_perfect_attack(count: int, ceiling: float) -> None:
    counts = Counts(count, count, 0, count)
    assert clopper_pearson_epsilon(counts, delta=1e-5) == pytest.approx(ceiling, abs=0.01)


@pytest.mark.parametrize(("right", "ceiling"), [(10, 1.05), (100, 3.49), (1000, 5.81)])
def test_the_ceiling_of_right_guesses(right: int, ceiling: float) -> None:
    assert one_run_epsilon(right, right, right, delta=0) == pytest.approx(ceiling, abs=0.005)


def test_one_run_is_the_formula_of_the_paper() -> None:
    m, r, v, delta = 1000, 200, 170, 1e-4

    def p_value(epsilon: float) -> float:
        guess = stats.binom(r, 1 / (1 + math.exp(-epsilon)))
        reached = guess.sf(v - 1)
        most = max((guess.sf(v - i - 1) - reached) / i for i in range(1, v + 1))
        return reached + 2 * m * delta * most

    found = one_run_epsilon(m, r, v, delta=delta)
    assert p_value(found) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("method", BOUND_METHODS)
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_the_bound_exceeds_the_truth_as_seldom_as_promised(method: str, epsilon: float) -> None:
    delta, rng = 1e-5, np.random.default_rng(7)
    mu = next(mu for mu in np.arange(0.01, 9, 0.01) if gaussian_epsilon(mu, delta) > epsilon)
    wrong = 0
    for trial in range(60):
        member = torch.tensor(rng.random(400) < 0.5)
        scores = torch.tensor(rng.normal(size=400)) + mu * member
        bound = epsilon_lower_bound(scores, member, delta=delta, method=method, seed=trial)
        wrong += float(bound) > gaussian_epsilon(mu, delta)
    assert wrong <= 8  # 5 per cent of 60 is 3; the chance of 9 is 0.3 per cent


def test_an_attack_that_is_worse_than_guessing_proves_no_gaussian() -> None:
    # The size of μ alone would read FPR + FNR above 1 as a strong attack.
    assert gdp_epsilon(Counts(1, 10, 9, 10), delta=1e-5) == 0
    scores, member = even(0, 20)
    assert float(epsilon_lower_bound(scores, member, delta=1e-5, method="gdp", threshold=0.0)) == 0


def test_both_directions_count() -> None:
    rejecting = Counts(500, 500, 300, 500)
    assert clopper_pearson_epsilon(rejecting, delta=1e-5) > 3


def test_a_nearly_perfect_attack_beats_the_f_dp_bound_of_one_run() -> None:
    plain = one_run_epsilon(1000, 500, 490, delta=1e-5)
    assert 0 < plain < one_run_fdp_epsilon(1000, 500, 490, delta=1e-5)


def test_no_guess_proves_nothing() -> None:
    assert one_run_epsilon(10, 0, 0, delta=1e-5) == 0
    assert one_run_fdp_epsilon(10, 0, 0, delta=1e-5) == 0


def test_the_hull_has_the_corners() -> None:
    scores = Scores(np.array([1.5, 2.5, 0.5, 3.5]), np.array([0.0, 3, 2, 1]))
    assert hull(scores).tolist() == [math.inf, 3.5, 0.5, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"delta": 0.0},
        {"significance": 0.5},
        {"method": "rdp"},
        {"threshold": float("nan")},
    ],
)
def test_arguments_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    scores, member = even(1, 50)
    with pytest.raises(ConfigurationError):
        epsilon_lower_bound(scores, member, **{"delta": 1e-5, **wrong})  # type: ignore[arg-type]


def test_more_right_guesses_than_guesses_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="correct"):
        one_run_epsilon(10, 5, 6, delta=0)


@pytest.mark.parametrize("wrong", [{"delta": 2}, {"delta": 0.1, "method": "x"}])
def test_the_class_refuses_when_it_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        EpsilonLowerBound(**wrong)  # type: ignore[arg-type]
