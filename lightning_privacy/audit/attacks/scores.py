"""Membership scores of texts from the log-probabilities of their tokens; higher says "member".

Legend: ``B`` texts, ``T`` positions, ``V`` vocabulary. Positions without a label do not count.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IGNORED_LABEL = -100
_SMALLEST_SPREAD = 1e-4


class TokenScores(NamedTuple):
    """What a model said of each token of some texts.

    Attributes:
        log_probabilities: ``[B, T]`` of the token that stands there; 0 where none counts.
        standardized: ``[B, T]`` the same, less its mean and over its standard deviation under the
            model's own distribution at that position.
        counts: ``[B, T]`` whether the position counts.
    """

    log_probabilities: Tensor
    standardized: Tensor
    counts: Tensor


def token_scores(logits: Tensor, labels: Tensor) -> TokenScores:
    """Score every token of a batch of texts.

    Args:
        logits: ``[B, T, V]``; position t predicts the token at t + 1.
        labels: ``[B, T]`` tokens, −100 where nothing is to be predicted.

    Returns:
        Scores of the positions 1 to T − 1, in float32.
    """
    targets = labels[:, 1:]
    counts = targets != IGNORED_LABEL
    logs = logits[:, :-1].float().log_softmax(-1)
    own = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    probabilities = logs.exp()
    # A token that the model excludes has probability 0 and log −inf: 0 · inf is not a number.
    finite = logs.masked_fill(probabilities == 0, 0)
    mean = (probabilities * finite).sum(-1)
    spread = ((probabilities * finite.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
    standardized = (own - mean) / spread.clamp(min=_SMALLEST_SPREAD)
    return TokenScores(own.where(counts, 0), standardized.where(counts, 0), counts)


def loss_score(tokens: TokenScores) -> Tensor:
    """``[B]`` mean log-probability of a text's tokens (Yeom et al. 2018, arXiv 1709.01604)."""
    return tokens.log_probabilities.sum(1) / tokens.counts.sum(1).clamp(min=1)


def zlib_score(tokens: TokenScores, texts: Sequence[str]) -> Tensor:
    """``[B]`` total log-probability over the text's size in bytes after compression.

    Texts that are easy for anyone compress well. (Carlini et al. 2021, arXiv 2012.07805.)

    Args:
        tokens: Scores of the texts' tokens.
        texts: The ``B`` texts themselves.

    Returns:
        ``[B]`` scores.

    Raises:
        ConfigurationError: There is not one text for each row.
    """
    total = tokens.log_probabilities.sum(1)
    if len(texts) != len(total):
        raise ConfigurationError(
            must="there is one text for each row of scores",
            found=f"{len(texts)} texts and {len(total)} rows",
            cost="scores divided by another text's size",
            remedy="pass the texts in the order of the batches",
        )
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return total / torch.tensor(sizes, dtype=total.dtype, device=total.device)


def min_k_score(tokens: TokenScores, fraction: float = 0.2) -> Tensor:
    """``[B]`` mean of the smallest log-probabilities: a member has few tokens that surprise.

    (Shi et al. 2024, arXiv 2310.16789.)

    Args:
        tokens: Scores of the texts' tokens.
        fraction: Share k of a text's tokens in (0, 1]; at least one token is taken.

    Returns:
        ``[B]`` scores; 0 for a text without tokens.

    Raises:
        ConfigurationError: The fraction is outside its range.
    """
    return _mean_of_smallest(tokens.log_probabilities, tokens.counts, fraction)


def min_k_plus_plus_score(tokens: TokenScores, fraction: float = 0.2) -> Tensor:
    """``[B]`` mean of the smallest standardized log-probabilities.

    Compares a token with what else the model thought possible there. (Zhang et al. 2025, arXiv
    2404.02936.)

    Args:
        tokens: Scores of the texts' tokens.
        fraction: Share k of a text's tokens in (0, 1]; at least one token is taken.

    Returns:
        ``[B]`` scores; 0 for a text without tokens.

    Raises:
        ConfigurationError: The fraction is outside its range.
    """
    return _mean_of_smallest(tokens.standardized, tokens.counts, fraction)


def ratio_score(scores: Tensor, reference: Tensor, included: Tensor | None = None) -> Tensor:
    """``[N]`` how much better a model knows an example than a reference does.

    The best default for fine-tuning, with the model before it as reference. (Carlini et al. 2021,
    arXiv 2012.07805; Mireshghallah et al. 2022, arXiv 2203.03929.)

    Args:
        scores: ``[N]`` log-probabilities (`loss_score`) of the model under attack.
        reference: ``[N]`` the same of a model that was not trained on these examples; or
            ``[K, N]`` of several, whose mean probability is taken: a mean of logarithms would
            follow the one reference that errs most.
        included: ``[K, N]`` which references were trained on the example: those are left out.

    Returns:
        The differences.
    """
    if reference.dim() == scores.dim():
        return scores - reference
    taken = torch.ones_like(reference, dtype=torch.bool) if included is None else ~included
    mean = reference.masked_fill(~taken, -torch.inf).logsumexp(0) - taken.sum(0).log()
    return scores - mean


def _mean_of_smallest(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    fraction = real_number(
        "fraction", fraction, "(0, 1]", cost="a mean of no token", remedy="pass for instance 0.2"
    )
    ordered = values.masked_fill(~counts, torch.inf).sort(dim=1).values
    lengths = counts.sum(1)
    # At least one: a fifth of four tokens would be none, and its mean not a number.
    sizes = (lengths * fraction).long().clamp(min=1).minimum(lengths)
    taken = torch.arange(values.shape[1], device=values.device) < sizes[:, None]
    return ordered.where(taken, 0).sum(1) / sizes.clamp(min=1)
