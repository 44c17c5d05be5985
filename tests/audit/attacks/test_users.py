"""User inference: a planted signal is found, nothing is found where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_privacy.audit.attacks import infer_users, user_scores
from lightning_privacy.audit.users import users_by_their_rows
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics import MembershipAUROC, UserInferenceAUROC

USERS, TEXTS, LENGTH, VOCABULARY = 40, 3, 6, 16


class Bigrams(nn.Module):
    """Has seen some users' favourite words: that is all it knows."""

    def __init__(self, favourites: list[int]) -> None:
        super().__init__()
        table = torch.zeros(VOCABULARY)
        table[favourites] = 1.0
        self.table = nn.Parameter(table)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.table.expand(*batch["input_ids"].shape, -1)


def corpus() -> tuple[list[dict[str, torch.Tensor]], list[str], torch.Tensor]:
    """Members like words below 8, others those from 8 on; no text is seen twice."""
    draw = torch.Generator().manual_seed(0)
    member = torch.arange(USERS) % 2 == 0
    words = torch.randint(0, VOCABULARY, (USERS, TEXTS, LENGTH), generator=draw)
    liked = torch.randint(0, 8, words.shape, generator=draw) + 8 * (~member)[:, None, None]
    ids = torch.where(torch.rand(words.shape, generator=draw) < 0.4, liked, words).flatten(0, 1)
    names = [f"user {number // TEXTS:02}" for number in range(len(ids))]
    return [{"input_ids": part} for part in ids.split(7)], names, member


def test_users_are_found_better_than_their_texts() -> None:
    batches, names, member = corpus()
    seen, before = Bigrams(list(range(8))), Bigrams([])
    found = infer_users(seen, batches, names, reference=before)
    assert found.users == tuple(sorted(set(names)))
    assert found.examples.tolist() == [TEXTS] * USERS
    users = MembershipAUROC()(found.scores, member)
    single = infer_users(
        seen, batches, [str(n).zfill(3) for n in range(len(names))], reference=before
    )
    texts = MembershipAUROC()(single.scores, member.repeat_interleave(TEXTS))
    assert users > texts > 0.6
    assert users > 0.85
    # The statistic is the mean log ratio, and the metric joins texts of users in the same way.
    torch.testing.assert_close(found.scores, single.scores.reshape(USERS, TEXTS).mean(1))
    metric = UserInferenceAUROC()
    number = torch.arange(USERS).repeat_interleave(TEXTS)
    metric.update(single.scores, number, member.repeat_interleave(TEXTS))
    assert metric.compute() == pytest.approx(float(users))
    planted = infer_users(before, batches, names, reference=Bigrams([]))
    assert MembershipAUROC()(planted.scores, member) == pytest.approx(0.5)


def test_without_a_reference_the_loss_is_all_there_is() -> None:
    batches, names, _ = corpus()
    found = infer_users(Bigrams([3]), batches, names)
    assert len(found.users) == USERS
    assert (found.scores < 0).all()


def test_a_score_without_a_user_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a score and a user"):
        user_scores(torch.zeros(3), ["a", "b"])


def rows(level: float, users: int = 12) -> tuple[torch.Tensor, list[str]]:
    draw = torch.Generator().manual_seed(int(level * 10))
    return torch.randn(4 * users, generator=draw) + level, [
        f"{level} {n // 4}" for n in range(4 * users)
    ]


def test_users_of_a_table_are_attacked_by_their_rows() -> None:
    (inside, members), (outside, others) = rows(1.0), rows(0.0)
    found = users_by_their_rows([inside, outside], [members, others])
    assert found is not None
    assert not found.fresh
    assert found.figures.auroc > 0.85
    assert int(found.member.sum()) == 12
    assert len(found.scores) == 24


def test_users_on_both_sides_or_with_one_row_each_are_left_out() -> None:
    (inside, members), (outside, others) = rows(1.0), rows(0.0)
    mixed = [*members[:4], *others[4:]]
    found = users_by_their_rows([inside, outside], [members, mixed])
    assert found is not None
    assert len(found.scores) == 11 + 11
    assert users_by_their_rows([inside, outside], [members, members]) is None
    single = [f"{side} {n}" for side in "ab" for n in range(48)]
    assert users_by_their_rows([inside, outside], [single[:48], single[48:]]) is None
    assert users_by_their_rows([inside[:8], outside], [members[:8], others]) is None
