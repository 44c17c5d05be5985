"""What can be told about membership without any model: it must be nothing."""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional import membership_auroc

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

_FOLDS = 2
_SUSPICIOUS = 0.55
_STANDARD_ERRORS = 3.0
# The solution is exact in the number of examples: beyond this a random part decides.
_MOST = 3000

_WARNING = (
    "Members and non-members can be told apart without any model (AUROC {:.2f}): an attack on the "
    "model will show this difference, not leakage. Split at random before training."
)


class BlindBaseline(NamedTuple):
    """What a classifier that never saw the model can tell.

    Attributes:
        auroc: Of members against non-members, on examples that it was not fitted to.
        suspicious: Whether the sides differ: more than 0.55, and more than chance allows.
    """

    auroc: float
    suspicious: bool


def blind_baseline(
    members: Sequence[str] | Tensor,
    non_members: Sequence[str] | Tensor,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> BlindBaseline:
    """Try to tell members from non-members by what they are, and warn if that works.

    An attack is only worth its figure if members and non-members come from one random split made
    before training. Splits made afterwards, by date for instance, are often told apart by their
    words alone (Das et al. 2024, arXiv 2406.16201; Meeus et al. 2024, arXiv 2406.17975). A linear
    classifier (ridge regression on the words of a text, or on the values of a tensor) is fitted to
    one half and judged on the other, both ways.

    Args:
        members: Texts, or ``[N, ...]`` values.
        non_members: The same of the other side.
        groups: The group of each member and then of each non-member, for instance its user. The
            classifier is judged on other groups than it was fitted to: two texts of one user share
            words, which says nothing about the split.
        seed: Divides the examples.

    Returns:
        The AUROC and whether it is suspicious.

    Raises:
        ConfigurationError: A side has fewer than four examples, or fewer than two groups.

    Warns:
        UserWarning: The sides differ.
    """
    sizes = len(members), len(non_members)
    if min(sizes) < 2 * _FOLDS:
        raise ConfigurationError(
            must=f"each side has at least {2 * _FOLDS} examples",
            found=f"{sizes[0]} members and {sizes[1]} non-members",
            cost="a comparison of nothing",
            remedy="give more examples",
        )
    rng = np.random.default_rng(seed)
    features = _features([*members], [*non_members])
    member = np.repeat([1.0, 0.0], sizes)
    order = rng.permutation(sum(sizes))[:_MOST]
    names = [*range(sum(sizes))] if groups is None else list(groups)
    features, member, names = features[order], member[order], [names[place] for place in order]
    fold = _folds(member, names)
    scores = np.empty(len(member))
    for held_out in range(_FOLDS):
        fitted, judged = fold != held_out, fold == held_out
        scores[judged] = _ridge(features[fitted], member[fitted], features[judged])
    parts = [(scores[fold == k], member[fold == k]) for k in range(_FOLDS)]
    value = float(np.mean([membership_auroc(*map(torch.from_numpy, part)) for part in parts]))
    inside = float(member.sum())
    outside = len(member) - inside
    # Of an AUROC without a difference (Mann and Whitney 1947).
    chance = math.sqrt((inside + outside + 1) / (12 * inside * outside))
    suspicious = value > max(_SUSPICIOUS, 0.5 + _STANDARD_ERRORS * chance)
    if suspicious:
        warnings.warn(_WARNING.format(value), UserWarning, stacklevel=2)
    return BlindBaseline(value, suspicious)


def _folds(member: np.ndarray, names: list[Hashable]) -> np.ndarray:
    """Halves with the same share of members and whole groups: the order is random already."""
    fold = np.empty(len(member), dtype=int)
    for side in (1, 0):
        rows = np.flatnonzero(member == side)
        place = {name: number for number, name in enumerate(dict.fromkeys(names[r] for r in rows))}
        if len(place) < _FOLDS:
            raise ConfigurationError(
                must=f"each side has at least {_FOLDS} groups",
                found=f"{len(place)}",
                cost="a classifier judged on what it was fitted to",
                remedy="give more groups, or none",
            )
        fold[rows] = [place[names[row]] % _FOLDS for row in rows]
    return fold


def _features(members: list[str | Tensor], non_members: list[str | Tensor]) -> np.ndarray:
    everything = [*members, *non_members]
    texts = [item for item in everything if isinstance(item, str)]
    if len(texts) != len(everything):
        rows = [torch.as_tensor(item).detach().cpu().double().flatten() for item in everything]
        return torch.stack(rows).numpy()
    words = [set(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    place = {word: number for number, word in enumerate(sorted(set().union(*words)))}
    table = np.zeros((len(texts), len(place) + 1))
    for row, present in enumerate(words):
        table[row, [place[word] for word in present]] = 1
        table[row, -1] = math.log1p(len(texts[row]))
    return table


def _ridge(fitted: np.ndarray, member: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Scores of ``judged`` by ridge regression in its dual form."""
    centre, spread = fitted.mean(0), fitted.std(0)
    spread[spread == 0] = np.inf
    left, right = (fitted - centre) / spread, (judged - centre) / spread
    kernel = left @ left.T
    strength = max(kernel.trace() / len(kernel), 1e-12)
    weights = np.linalg.solve(kernel + strength * np.eye(len(kernel)), member - member.mean())
    return right @ (left.T @ weights)
