"""User inference on a model and its data, where the data say whose each example is.

None of these figures is covered by ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_privacy.audit.attacks.users import UserScores, infer_users, user_scores
from lightning_privacy.audit.membership import MembershipFigures, membership_figures
from lightning_privacy.data.base import Document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_privacy.data.synthetic import SyntheticUser

# With fewer users of a side nothing can be said.
_FEWEST = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class UserInference:
    """How well members were told from other users. Not covered by ε.

    Attributes:
        figures: The figures of the attack, over users.
        scores: ``[U]`` one for each user.
        member: ``[U]`` whether each was trained on.
        fresh: Whether by texts that were not trained on themselves.
    """

    figures: MembershipFigures
    scores: Tensor
    member: Tensor
    fresh: bool


def users_by_fresh_texts(
    module: Any, data: Any, reference: Any, users: Sequence[SyntheticUser], most: int
) -> UserInference | None:
    """Infer the users of an embedded corpus from texts of theirs that nobody trains on.

    Args:
        module: The model under attack.
        data: The corpus' data module.
        reference: The model before training, as for `score_texts`.
        users: The users of the corpus.
        most: Most users of each side.

    Returns:
        What was found; None if there are no fresh texts, or too few users.
    """
    sides = [
        [user for user in users if user.member is inside and user.fresh_documents][:most]
        for inside in (True, False)
    ]
    if min(map(len, sides)) < _FEWEST:
        return None
    both = []
    loader = data.val_dataloader()
    for side in sides:
        texts = [Document(user.name, text) for user in side for text in user.fresh_documents]
        rows = data.items(texts, data.tokenizer, data.max_length)
        size = loader.batch_size
        batches = (
            loader.collate_fn([rows[at] for at in range(start, min(start + size, len(rows)))])
            for start in range(0, len(rows), size)
        )
        both.append(infer_users(module, batches, rows.users, reference=reference))
    return _found(both, fresh=True)


def users_by_their_rows(
    scores: Sequence[Tensor], users: Sequence[Sequence[str]]
) -> UserInference | None:
    """Infer users from the very examples that members were trained on.

    Args:
        scores: ``[N]`` of members' examples, and of the others'.
        users: Whose each is, for both sides.

    Returns:
        What was found; None if no user has several examples, or there are too few users who are on
        one side only.
    """
    shared = set(users[0]) & set(users[1])
    both = []
    for values, names in zip(scores, users, strict=True):
        kept = [at for at, name in enumerate(names) if name not in shared]
        both.append(user_scores(values[kept], [names[at] for at in kept]))
    if min(len(side.users) for side in both) < _FEWEST:
        return None
    several = any(int(side.examples.max()) > 1 for side in both)
    return _found(both, fresh=False) if several else None


def _found(sides: Sequence[UserScores], *, fresh: bool) -> UserInference:
    scores = torch.cat([side.scores for side in sides])
    member = torch.arange(len(scores)) < len(sides[0].users)
    name = "user inference, fresh texts" if fresh else "user inference"
    return UserInference(
        figures=membership_figures(name, scores, member), scores=scores, member=member, fresh=fresh
    )
