"""Attack figures against scikit-learn and against what chance does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional import (
    membership_advantage,
    membership_auroc,
    tpr_at_fpr,
    user_inference_auroc,
)
from lightning_privacy.metrics.functional.membership import _best_threshold
from lightning_privacy.metrics.functional.scores import split_scores


def drawn(count: int, shift: float, seed: int, digits: int = 2) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    member = rng.random(count) < 0.5
    return torch.tensor((rng.normal(size=count) + shift * member).round(digits)), torch.tensor(
        member
    )


@pytest.mark.parametrize("seed", range(3))
def test_auroc_and_tpr_agree_with_scikit_learn(seed: int) -> None:
    scores, member = drawn(500, 0.7, seed, digits=1)  # with many ties
    assert float(membership_auroc(scores, member)) == pytest.approx(roc_auc_score(member, scores))
    fpr, tpr, _ = roc_curve(member, scores, drop_intermediate=False)
    for limit in (0.0, 0.01, 0.1, 1.0):
        assert float(tpr_at_fpr(scores, member, limit)) == pytest.approx(tpr[fpr <= limit].max())


def test_large_scores_keep_their_order() -> None:
    # A sigmoid in float32 would make them all equal.
    scores = torch.tensor([101.0, 100.0, 99.0, 98.0])
    assert float(membership_auroc(scores, torch.tensor([1, 1, 0, 0]))) == 1


@pytest.mark.parametrize(("count", "in_sample"), [(50, 0.121), (100, 0.084), (500, 0.039)])
def test_crossing_the_halves_takes_the_bias_out(count: int, in_sample: float) -> None:
    member = torch.arange(2 * count) < count
    rng, crossed, best = np.random.default_rng(0), [], []
    for seed in range(200):
        scores = torch.tensor(rng.normal(size=2 * count))
        crossed.append(float(membership_advantage(scores, member, seed=seed).advantage))
        fpr, tpr, _ = roc_curve(member, scores)
        best.append((tpr - fpr).max())
    assert np.mean(best) == pytest.approx(in_sample, abs=0.012)
    assert abs(np.mean(crossed)) < 4 * np.std(crossed) / np.sqrt(200) + 1e-3


def test_the_interval_holds_the_advantage_of_the_thresholds_used() -> None:
    member = torch.arange(400) < 200
    rng, held = np.random.default_rng(1), 0
    for seed in range(200):
        scores = torch.tensor(rng.normal(size=400)) + member
        found = membership_advantage(scores, member, seed=seed)
        assert found.lower <= found.advantage <= found.upper
        halves = split_scores(scores, member).divided(0.5, seed)
        cuts = np.array([_best_threshold(half) for half in halves])
        true = (norm.cdf(cuts) - norm.cdf(cuts - 1)).mean()
        held += bool(found.lower <= true <= found.upper)
    assert 184 <= held < 200  # 190 on average


def test_users_are_scored_by_their_mean() -> None:
    scores = torch.tensor([0.0, 4.0, 1.0, 1.0, 3.0])
    user = torch.tensor([7, 7, 9, 9, 4])
    assert float(user_inference_auroc(scores, user, torch.tensor([1, 1, 0, 0, 1]))) == 1
    assert float(user_inference_auroc(scores, user, torch.tensor([1, 1, 0, 0, 0]))) == 0.5


def test_a_user_is_inside_or_outside() -> None:
    with pytest.raises(ConfigurationError, match="both inside and outside"):
        user_inference_auroc(torch.ones(2), torch.tensor([1, 1]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("scores", "member"),
    [
        ([1.0, 2.0], [1, 1]),
        ([1.0, 2.0], [0, 0]),
        ([1.0, float("nan")], [0, 1]),
        ([1.0, 2.0], [0, 2]),
        ([1.0, 2.0, 3.0], [0, 1]),
    ],
)
def test_what_makes_no_attack_is_refused(scores: list[float], member: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="not NaN"):
        membership_auroc(torch.tensor(scores), torch.tensor(member))


def test_one_member_cannot_be_divided() -> None:
    with pytest.raises(ConfigurationError, match="divided"):
        membership_advantage(torch.arange(3.0), torch.tensor([1, 0, 0]))
