"""Token scores against the formulas, one text and one token at a time."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from lightning_privacy.audit.attacks import (
    TokenScores,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    token_scores,
    zlib_score,
)
from lightning_privacy.errors import ConfigurationError

LOGITS = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0)) * 2
LABELS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
LABELS[1, 4:] = -100  # a short text
LABELS[2, :3] = -100  # a prompt that is not trained on


def naive(row: int) -> tuple[list[float], list[float]]:
    plain, standardized = [], []
    for position in range(6):
        label = int(LABELS[row, position + 1])
        if label == -100:
            continue
        logs = LOGITS[row, position].double().log_softmax(0)
        chances = logs.exp()
        mean = float((chances * logs).sum())
        spread = math.sqrt(float((chances * logs.square()).sum()) - mean**2)
        plain.append(float(logs[label]))
        standardized.append((float(logs[label]) - mean) / spread)
    return plain, standardized


@pytest.fixture(scope="module")
def tokens() -> TokenScores:
    return token_scores(LOGITS, LABELS)


@pytest.mark.parametrize("row", range(3))
def test_every_score_is_its_formula(tokens: TokenScores, row: int) -> None:
    plain, standardized = naive(row)
    texts = ["a text", "another text, which is longer", "the third"]
    assert float(loss_score(tokens)[row]) == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    size = len(zlib.compress(texts[row].encode()))
    assert float(zlib_score(tokens, texts)[row]) == pytest.approx(sum(plain) / size, rel=1e-5)
    for fraction in (0.2, 0.5, 1.0):
        k = max(1, int(fraction * len(plain)))
        smallest = sum(sorted(plain)[:k]) / k
        assert float(min_k_score(tokens, fraction)[row]) == pytest.approx(smallest, rel=1e-5)
        smallest = sum(sorted(standardized)[:k]) / k
        found = float(min_k_plus_plus_score(tokens, fraction)[row])
        assert found == pytest.approx(smallest, rel=1e-4)


def test_a_text_without_labels_scores_zero_and_not_nan() -> None:
    tokens = token_scores(LOGITS[:1], torch.full((1, 7), -100))
    for score in (loss_score, min_k_score, min_k_plus_plus_score):
        assert score(tokens).tolist() == [0.0]


def test_excluded_tokens_make_no_nan() -> None:
    logits = LOGITS.clone()
    logits[:, :, 3] = -torch.inf
    labels = LABELS.masked_fill(LABELS == 3, 4)
    assert torch.isfinite(min_k_plus_plus_score(token_scores(logits, labels))).all()


def test_the_ratio_to_several_references_is_that_to_their_mean_probability() -> None:
    own, references = torch.tensor([-1.0, -1.0]), torch.tensor([[-1.0, -9.0], [-2.0, -1.0]])
    assert ratio_score(own, references[0]).tolist() == [0.0, 8.0]
    mean = references.exp().mean(0).log()
    torch.testing.assert_close(ratio_score(own, references), own - mean)
    included = torch.tensor([[False, True], [True, False]])
    torch.testing.assert_close(ratio_score(own, references, included), torch.zeros(2))


def test_wrong_arguments_are_refused(tokens: TokenScores) -> None:
    with pytest.raises(ConfigurationError, match="fraction"):
        min_k_score(tokens, 0.0)
    with pytest.raises(ConfigurationError, match="one text for each row"):
        zlib_score(tokens, ["only one"])
