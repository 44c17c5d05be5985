"""How well an attacker tells members from non-members."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional.scores import Scores, rates, split_scores, thresholds
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from torch import Tensor


class Advantage(NamedTuple):
    """A membership advantage with its confidence interval, as tensors without dimensions.

    Attributes:
        advantage: TPR − FPR. Without leakage it scatters around 0, and can be negative.
        lower: Lower end of the interval.
        upper: Upper end.
    """

    advantage: Tensor
    lower: Tensor
    upper: Tensor


def membership_auroc(scores: Tensor, member: Tensor) -> Tensor:
    """Chance that a member's score is above a non-member's; ties count half.

    Args:
        scores: ``[N]`` attack scores; higher says "more likely a member".
        member: ``[N]`` booleans, or 0 and 1.

    Returns:
        A float64 tensor without dimensions, in [0, 1]; 0.5 is a guess.

    Raises:
        ConfigurationError: Scores and memberships do not fit, or one side is empty.

    Example:
        >>> membership_auroc(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    return torch.tensor(_auroc(split_scores(scores, member)), dtype=torch.float64)


def _auroc(scores: Scores) -> float:
    from scipy.stats import rankdata

    n = len(scores.inside)
    ranks = rankdata(np.concatenate(scores))[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(scores.outside)))


def tpr_at_fpr(scores: Tensor, member: Tensor, fpr: float = 0.01) -> Tensor:
    """Largest true-positive rate of a threshold whose false-positive rate is at most ``fpr``.

    An average hides an exposed minority: this figure shows it (Carlini et al. 2022, arXiv
    2112.03570). The threshold is chosen on the same scores, so that few non-members (fewer than
    some 10 / fpr) make it scatter.

    Args:
        scores: ``[N]`` attack scores; higher says "more likely a member".
        member: ``[N]`` booleans, or 0 and 1.
        fpr: False-positive rate in [0, 1].

    Returns:
        A float64 tensor without dimensions, in [0, 1].

    Raises:
        ConfigurationError: An argument is not legal, or one side is empty.
    """
    fpr = real_number("fpr", fpr, "[0, 1]", cost="no rate", remedy="pass for instance 0.01")
    split = split_scores(scores, member)
    hits, alarms = rates(split)
    allowed = hits[alarms <= fpr * len(split.outside) + 1e-9]
    return torch.tensor(max(allowed, default=0) / len(split.inside), dtype=torch.float64)


def membership_advantage(
    scores: Tensor, member: Tensor, *, confidence: float = 0.95, seed: int = 0
) -> Advantage:
    """TPR − FPR of the best threshold, chosen on one half and judged on the other, both ways.

    Choosing and judging on the same scores finds an advantage where there is none: 0.084 on
    average with 100 scores on each side. Crossing the halves does not. The figure can be compared
    with the guarantee: no attack on an (ε, δ)-private model has a true advantage above δ(0) of
    the mechanism (the total variation distance), see `lightning_privacy.audit.advantage_ceiling`.

    The interval is Newcombe's (1998, method 10) for the difference of two rates, given the two
    thresholds.

    Args:
        scores: ``[N]`` attack scores; higher says "more likely a member".
        member: ``[N]`` booleans, or 0 and 1; at least two of each.
        confidence: Of the interval, in (0, 1).
        seed: Divides the scores into halves.

    Returns:
        The advantage, in [−1, 1], and its interval.

    Raises:
        ConfigurationError: An argument is not legal, or a side cannot be divided.
    """
    confidence = real_number(
        "confidence", confidence, "(0, 1)", cost="no interval", remedy="pass for instance 0.95"
    )
    split = split_scores(scores, member)
    first, second = split.divided(0.5, seed)
    caught = np.zeros(2, dtype=int)
    for chosen_on, judged_on in ((first, second), (second, first)):
        counts = judged_on.counts(_best_threshold(chosen_on))
        caught += (counts.true_positives, counts.false_positives)
    hits = _wilson(int(caught[0]), len(split.inside), confidence)
    alarms = _wilson(int(caught[1]), len(split.outside), confidence)
    value = hits.rate - alarms.rate
    down = math.hypot(hits.rate - hits.lower, alarms.upper - alarms.rate)
    up = math.hypot(hits.upper - hits.rate, alarms.rate - alarms.lower)
    return Advantage(
        *(torch.tensor(v, dtype=torch.float64) for v in (value, value - down, value + up))
    )


def _best_threshold(scores: Scores) -> float:
    hits, alarms = rates(scores)
    gain = hits / len(scores.inside) - alarms / len(scores.outside)
    return float(thresholds(scores)[int(gain.argmax())])


class _Rate(NamedTuple):
    rate: float
    lower: float
    upper: float


def _wilson(count: int, trials: int, confidence: float) -> _Rate:
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    rate, weight = count / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    return _Rate(rate, max(0.0, centre - half), min(1.0, centre + half))


def user_inference_auroc(scores: Tensor, user: Tensor, member: Tensor) -> Tensor:
    """AUROC of "was this user's data trained on?", from scores of several texts of each user.

    A user's score is the mean over the user's texts, which need not have been trained on
    themselves (Kandpal et al. 2024, arXiv 2310.09266). 2 AUROC − 1 is the leakage of users.

    Args:
        scores: ``[N]`` one for each text; the log ratio to the model before fine-tuning is best.
        user: ``[N]`` whole numbers that name the text's user.
        member: ``[N]`` whether that user was trained on; the same for all texts of a user.

    Returns:
        A float64 tensor without dimensions, in [0, 1].

    Raises:
        ConfigurationError: The arguments do not fit, or a user is both inside and outside.
    """
    names, place = np.unique(torch.as_tensor(user).cpu().numpy().ravel(), return_inverse=True)
    inclusion = torch.as_tensor(member).cpu().double().numpy().ravel()
    values = torch.as_tensor(scores).detach().cpu().double().numpy().ravel()
    if not len(place) == len(inclusion) == len(values):
        raise ConfigurationError(
            must="each text has a score, a user and a membership",
            found=f"{len(values)} scores, {len(place)} users, {len(inclusion)} memberships",
            cost="texts scored for another user",
            remedy="pass three tensors of the same length",
        )
    size = np.bincount(place)
    inside = np.bincount(place, inclusion) / size
    mixed = names[(inside != 0) & (inside != 1)]
    if len(mixed):
        raise ConfigurationError(
            must="all texts of a user have the same membership",
            found=f"users that are both inside and outside, for instance {mixed[0]}",
            cost="an attack on examples that is reported as one on users",
            remedy="split by user before training",
        )
    means = np.bincount(place, values) / size
    return membership_auroc(torch.from_numpy(means), torch.from_numpy(inside))
