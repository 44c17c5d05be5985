"""The blind baseline warns of a bad split, and keeps quiet at a good one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_privacy.audit.attacks import blind_baseline
from lightning_privacy.errors import ConfigurationError

WORDS = [f"word{k}" for k in range(60)]


def texts(count: int, seed: int, *extra: str) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, 12), *extra]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_is_not_suspicious(seed: int) -> None:
    found = blind_baseline(texts(150, 2 * seed), texts(150, 2 * seed + 1))
    assert not found.suspicious
    assert found.auroc < 0.62


def test_texts_of_another_year_are_told_apart() -> None:
    later = [f"{text} 2024" if k % 3 else text for k, text in enumerate(texts(150, 1))]
    with pytest.warns(UserWarning, match="without any model"):
        found = blind_baseline(texts(150, 0), later)
    assert found.auroc > 0.7


def test_longer_texts_are_told_apart() -> None:
    with pytest.warns(UserWarning, match="without any model"):
        blind_baseline(
            texts(100, 0), [f"{a} {b}" for a, b in zip(texts(100, 1), texts(100, 2), strict=True)]
        )


def test_tensors_are_compared_by_value() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 200, 3, 4, generator=draw)
    assert not blind_baseline(first, second).suspicious
    with pytest.warns(UserWarning, match="without any model"):
        assert blind_baseline(first, second + 0.5).suspicious


def test_too_few_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 4"):
        blind_baseline(["a"], texts(5, 0))


def test_texts_of_one_user_are_kept_together() -> None:
    users = [f"user{number // 5}" for number in range(200)]
    named = [f"{user} {text}" for user, text in zip(users, texts(200, 0), strict=True)]
    with pytest.warns(UserWarning, match="without any model"):
        blind_baseline(named[:100], named[100:])
    assert not blind_baseline(named[:100], named[100:], groups=users).suspicious
    with pytest.raises(ConfigurationError, match="groups"):
        blind_baseline(named[:100], named[100:], groups=["all"] * 200)
