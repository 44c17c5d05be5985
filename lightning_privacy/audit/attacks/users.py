"""Was this user's data trained on? Asked of all of a user's texts together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from lightning_privacy.audit.attacks.texts import model_logits, score_texts
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from lightning_privacy.audit.attacks.texts import LogitsFunction


class UserScores(NamedTuple):
    """One score for each user; higher for one who was trained on.

    Attributes:
        users: Their names, each once, sorted.
        scores: ``[U]`` float64.
        examples: ``[U]`` of how many examples each is the mean. A mean of few varies more: compare
            users with about as many.
    """

    users: tuple[str, ...]
    scores: Tensor
    examples: Tensor


def user_scores(scores: Tensor, users: Sequence[str]) -> UserScores:
    """Join the scores of examples to scores of their users: the mean.

    With the log ratio to the model before fine-tuning as score this is the statistic
    T(u) = 1/m Σ log(p(x) / p₀(x)) of Kandpal et al. 2024 (arXiv 2310.09266, section 3).

    Args:
        scores: ``[N]`` of examples, which need not have been trained on themselves.
        users: Whose each is.

    Returns:
        A score for each user.

    Raises:
        ConfigurationError: There is not one user for each score.
    """
    if len(scores) != len(users):
        raise ConfigurationError(
            must="each example has a score and a user",
            found=f"{len(scores)} scores and {len(users)} users",
            cost="examples scored for another user",
            remedy="give the users in the order of the examples",
        )
    names, place = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    size = np.bincount(place, minlength=len(names))
    total = np.bincount(place, scores.detach().cpu().double().numpy(), minlength=len(names))
    return UserScores(tuple(names.tolist()), torch.from_numpy(total / size), torch.from_numpy(size))


def infer_users(
    module: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    users: Sequence[str],
    *,
    reference: nn.Module | Literal["adapters"] | None = "adapters",
    logits: LogitsFunction = model_logits,
) -> UserScores:
    """Attack a causal language model with several texts of each user.

    The texts are best *fresh*: of users who may have been trained on, but not trained on
    themselves. What is found then is what the model learned about the users.

    Args:
        module: The model under attack.
        batches: As for `score_texts`.
        users: Whose text each is, in the order of the batches.
        reference: As for `score_texts`; without one the mean log-probability takes the place of
            the ratio, which is much weaker.
        logits: As for `score_texts`.

    Returns:
        A score for each user, for `lightning_privacy.metrics.MembershipAUROC` and all others.

    Raises:
        ConfigurationError: There is not one user for each text.
    """
    found = score_texts(module, batches, reference=reference, logits=logits)
    return user_scores(found.get("ratio", found["loss"]), users)
