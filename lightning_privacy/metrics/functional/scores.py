"""Attack scores of members and non-members, and how often a threshold separates them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


class Scores(NamedTuple):
    """Scores of the two sides, each in float64 and in the order in which they came.

    Attributes:
        inside: Scores of members, at least one.
        outside: Scores of non-members, at least one.
    """

    inside: np.ndarray
    outside: np.ndarray

    def counts(self, threshold: float) -> Counts:
        """What the rule "member if the score is at least ``threshold``" gets right and wrong."""
        return Counts(
            int((self.inside >= threshold).sum()),
            len(self.inside),
            int((self.outside >= threshold).sum()),
            len(self.outside),
        )

    def divided(self, fraction: float, seed: int) -> tuple[Scores, Scores]:
        """A random part of both sides, and the rest; the generator is its own.

        Raises:
            ConfigurationError: One of the four parts would be empty.
        """
        rng = np.random.default_rng(seed)
        parts: list[list[np.ndarray]] = [[], []]
        for side in self:
            order = rng.permutation(len(side))
            size = max(1, round(fraction * len(side)))
            if size >= len(side):
                raise ConfigurationError(
                    must="both members and non-members can be divided into two parts",
                    found=f"{len(self.inside)} members and {len(self.outside)} non-members",
                    cost="a threshold chosen on the scores that it is judged by: a biased figure",
                    remedy="give more scores, or a threshold that was fixed before",
                )
            parts[0].append(side[order[:size]])
            parts[1].append(side[order[size:]])
        return Scores(*parts[0]), Scores(*parts[1])


class Counts(NamedTuple):
    """What one decision rule did.

    Attributes:
        true_positives: Members that were called members.
        members: Number of members.
        false_positives: Non-members that were called members.
        non_members: Number of non-members.
    """

    true_positives: int
    members: int
    false_positives: int
    non_members: int


def split_scores(scores: Tensor, member: Tensor) -> Scores:
    """Sort scores by membership.

    Args:
        scores: ``[N]`` attack scores; higher says "more likely a member".
        member: ``[N]`` whether each was in the training set, as booleans or 0 and 1.

    Returns:
        The two sides.

    Raises:
        ConfigurationError: The shapes differ, a score is NaN, a membership is neither 0 nor 1, or
            one side is empty.
    """
    values = torch.as_tensor(scores).detach().cpu().double().flatten().numpy()
    inclusion = torch.as_tensor(member).detach().cpu().flatten().numpy()
    sound = (
        len(values) == len(inclusion)
        and not np.isnan(values).any()
        and bool(np.isin(inclusion, (0, 1)).all())
    )
    inside = inclusion.astype(bool)
    if not sound or inside.all() or not inside.any():
        raise ConfigurationError(
            must="there is one score, not NaN, for each of some members (1) and non-members (0)",
            found=f"{len(values)} scores, {int(np.isnan(values).sum())} of them NaN, and "
            f"{len(inclusion)} memberships, of which {int((inclusion == 1).sum())} are 1 and "
            f"{int((inclusion == 0).sum())} are 0",
            cost="a leakage figure that says nothing",
            remedy="score members and non-members of one random split made before training",
        )
    return Scores(values[inside], values[~inside])


def thresholds(scores: Scores) -> np.ndarray:
    """Every threshold that makes a difference, descending; the last one calls all members."""
    return np.unique(np.concatenate(scores))[::-1]


def rates(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Counts of true and of false positives at each of `thresholds`."""
    cuts = thresholds(scores)
    hits, alarms = (
        len(side) - np.searchsorted(np.sort(side), cuts, side="left") for side in scores
    )
    return hits, alarms


def hull(scores: Scores) -> np.ndarray:
    """The thresholds at the corners of the ROC's convex hull, descending, with one above all."""
    cuts = np.concatenate([[np.inf], thresholds(scores)])
    hits, alarms = (np.concatenate([[0], counts]) for counts in rates(scores))
    corners: list[int] = []
    for new in range(len(cuts)):
        while len(corners) > 1:
            first, second = corners[-2:]
            turn = (alarms[second] - alarms[first]) * (hits[new] - hits[first]) - (
                hits[second] - hits[first]
            ) * (alarms[new] - alarms[first])
            if turn < 0:
                break
            corners.pop()
        corners.append(new)
    return np.asarray(cuts[corners])
