"""Whether secrets can be read off a model: exposure and extraction.

Legend: ``N`` secrets, ``R`` candidates for each, ``T`` tokens of a target, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    NextLogProbabilities = Callable[[Sequence[tuple[int, ...]]], Tensor]

_WITHOUT_MEMORY = 1 / math.log(2)
"""Mean exposure of a secret that the model never saw: 1.4427 bits."""


def candidate_log_likelihoods(
    next_log_probabilities: NextLogProbabilities, candidates: Sequence[Sequence[int]]
) -> Tensor:
    """Exact log-likelihood of every candidate, by evaluating each common prefix once.

    Candidates form a trie: all 10^k numbers of k digits have only 1 + 10 + … + 10^(k−1) proper
    prefixes (111 for the 1000 numbers of three digits), and one evaluation at a prefix scores all
    its continuations.

    Args:
        next_log_probabilities: Takes ``P`` prefixes, as tuples of token ids of one length, and
            returns ``[P, V]`` log-probabilities of the next token after the fixed context and each
            prefix. Called once for each length; batching within is up to the function.
        candidates: ``R`` different candidates as token ids, of any lengths.

    Returns:
        ``[R]`` float64 sums over each candidate's own tokens, given the context before.

    Raises:
        ConfigurationError: There is no candidate, or one has no tokens.
    """
    tokens = [tuple(candidate) for candidate in candidates]
    if not tokens or not all(tokens):
        raise ConfigurationError(
            must="there are candidates, each of at least one token",
            found=f"{len(tokens)} candidates, {sum(not c for c in tokens)} of them empty",
            cost="a rank among nothing",
            remedy="tokenize every secret that could have been drawn",
        )
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for depth in range(max(map(len, tokens))):
        alive = [number for number, candidate in enumerate(tokens) if len(candidate) > depth]
        prefixes = list(dict.fromkeys(tokens[number][:depth] for number in alive))
        place = {prefix: row for row, prefix in enumerate(prefixes)}
        logs = next_log_probabilities(prefixes).detach().double().cpu()
        rows = torch.tensor([place[tokens[number][:depth]] for number in alive])
        columns = torch.tensor([tokens[number][depth] for number in alive])
        total[torch.tensor(alive)] += logs[rows, columns]
    return total


def exposure(log_likelihoods: Tensor, secret: Tensor) -> Tensor:
    """Exposure in bits: log2 R − log2 of the true secret's rank among all R candidates.

    A secret that was not memorised has a uniform rank, and a mean exposure of 1.44 bits (1 / ln 2);
    the largest value is log2 R. Ties count half, so that a model that finds all candidates equally
    likely exposes nothing. (Carlini et al. 2019, arXiv 1802.08232.)

    Args:
        log_likelihoods: ``[N, R]`` of every candidate, for each secret; see
            `candidate_log_likelihoods`.
        secret: ``[N]`` which candidate is the true one.

    Returns:
        ``[N]`` float64 exposures in bits.

    Raises:
        ConfigurationError: A log-likelihood is NaN, or the shapes do not fit.
    """
    table, index = torch.as_tensor(log_likelihoods).double(), torch.as_tensor(secret).long()
    if table.dim() != 2 or index.shape != table.shape[:1] or bool(table.isnan().any()):
        raise ConfigurationError(
            must="log_likelihoods is [N, R] without NaN, and secret [N]",
            found=f"shapes {tuple(table.shape)} and {tuple(index.shape)}, "
            f"{int(table.isnan().sum())} NaN",
            cost="a rank that says nothing",
            remedy="score every candidate of every secret",
        )
    own = table.gather(1, index[:, None].to(table.device))
    rank = 1 + (table > own).sum(1) + ((table == own).sum(1) - 1) / 2
    return math.log2(table.shape[1]) - rank.double().log2()


def normalized_exposure(mean_exposure: Tensor | float, candidates: int) -> Tensor:
    """A mean exposure on a scale from 0 (as if never seen) to 1 (every secret comes first).

    Args:
        mean_exposure: In bits.
        candidates: R, the size of the space, at least 3.

    Returns:
        A float64 tensor in [0, 1].
    """
    count = whole_number(
        "candidates",
        candidates,
        at_least=3,
        cost="a scale without room above chance",
        remedy="pass the number of secrets that could have been drawn",
    )
    bits = torch.as_tensor(mean_exposure, dtype=torch.float64)
    return ((bits - _WITHOUT_MEMORY) / (math.log2(count) - _WITHOUT_MEMORY)).clamp(0, 1)


def greedily_extracted(
    log_probabilities: Tensor, target: Tensor, ignore_index: int = -100
) -> Tensor:
    """Whether greedy decoding from the prefix would write the target, token by token.

    From one forward pass over prefix and target: as long as every token so far was the most likely
    one, the greedy continuation is the target itself, so that the pass saw what decoding would see.

    Args:
        log_probabilities: ``[N, T, V]`` logits or log-probabilities at the target's positions.
        target: ``[N, T]`` token ids; ``ignore_index`` where a target is shorter.
        ignore_index: Marks positions that do not count.

    Returns:
        ``[N]`` booleans; False for a target without tokens.
    """
    counts = target != ignore_index
    hit = log_probabilities.argmax(-1) == target
    return (hit | ~counts).all(1) & counts.any(1)


def probably_extracted(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    attempts: int = 1000,
    probability: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Whether the target appears with a given probability in a number of samples at temperature 1.

    (n, p)-discoverable extraction, 1 − (1 − exp(Σ log p_t))^n ≥ p, computed from the likelihood
    alone: nothing is sampled. (Hayes et al. 2024, arXiv 2410.19482.)

    Args:
        log_probabilities: ``[N, T, V]`` logits or log-probabilities at the target's positions.
        target: ``[N, T]`` token ids; ``ignore_index`` where a target is shorter.
        attempts: n ≥ 1 samples.
        probability: p in (0, 1].
        ignore_index: Marks positions that do not count.

    Returns:
        ``[N]`` booleans; False for a target without tokens.

    Raises:
        ConfigurationError: An argument is outside its range.
    """
    remedy = "pass for instance attempts=1000, probability=0.5"
    cost = "a rate of nothing"
    n = whole_number("attempts", attempts, at_least=1, cost=cost, remedy=remedy)
    p = real_number("probability", probability, "(0, 1]", cost=cost, remedy=remedy)
    counts = target != ignore_index
    logs = log_probabilities.double().log_softmax(-1)
    own = logs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    once = own.where(counts, 0.0).sum(1).exp()
    never = torch.log1p(-once.clamp(max=1.0)) * n
    return (-torch.expm1(never) >= p) & counts.any(1)
