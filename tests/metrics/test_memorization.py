"""Exposure by the trie is exposure by enumeration; extraction is what decoding would do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics import Exposure, ExtractionRate
from lightning_privacy.metrics.functional import (
    candidate_log_likelihoods,
    exposure,
    greedily_extracted,
    normalized_exposure,
    probably_extracted,
)

VOCABULARY = 12


class Model:
    """Next-token distributions that are a fixed function of the whole prefix."""

    def __init__(self) -> None:
        self.evaluated = 0

    def __call__(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        self.evaluated += len(prefixes)
        rows = []
        for prefix in prefixes:
            seed = sum((token + 1) * 31**place for place, token in enumerate(prefix))
            rows.append(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows).log_softmax(-1)


def test_the_trie_gives_every_likelihood_from_111_prefixes() -> None:
    numbers = list(itertools.product(range(10), repeat=3))
    model = Model()
    found = candidate_log_likelihoods(model, numbers)
    assert model.evaluated == 111
    for place in (0, 123, 999):
        number = numbers[place]
        own = sum(float(Model()([number[:k]])[0, number[k]]) for k in range(3))
        assert float(found[place]) == pytest.approx(own, rel=1e-6)


def test_candidates_may_differ_in_length() -> None:
    found = candidate_log_likelihoods(Model(), [(1,), (1, 2), (3,)])
    assert float(found[1]) < float(found[0])
    with pytest.raises(ConfigurationError, match="at least one token"):
        candidate_log_likelihoods(Model(), [(1,), ()])


def test_exposure_is_that_of_the_rank() -> None:
    table = torch.arange(8.0).flip(0).expand(3, 8)
    assert exposure(table, torch.tensor([0, 1, 7])).tolist() == [3.0, 2.0, 0.0]
    indifferent = exposure(torch.zeros(1, 1000), torch.tensor([5]))
    assert 0.9 < float(indifferent) < 1.1


def test_without_memory_the_mean_is_the_known_one() -> None:
    table = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0))
    mean = exposure(table, torch.zeros(4000, dtype=torch.long)).mean()
    assert float(mean) == pytest.approx(1 / math.log(2), abs=0.08)
    assert float(normalized_exposure(1 / math.log(2), 1000)) == pytest.approx(0)
    assert float(normalized_exposure(math.log2(1000), 1000)) == 1


def test_secrets_of_other_spaces_are_refused() -> None:
    metric = Exposure()
    metric.update(torch.randn(1, 10), torch.tensor([0]))
    with pytest.raises(ConfigurationError, match="one size"):
        metric.update(torch.randn(1, 100), torch.tensor([0]))
    with pytest.raises(ConfigurationError, match=r"\[N, R\]"):
        exposure(torch.randn(1, 10), torch.tensor([0, 1]))


def test_the_normalized_metric() -> None:
    metric = Exposure(normalized=True)
    metric.update(torch.eye(1000)[:5], torch.arange(5))
    assert float(metric.compute()) == 1


def decoded(model: Model, start: tuple[int, ...], length: int) -> tuple[int, ...]:
    text = start
    for _ in range(length):
        text = (*text, int(model([text])[0].argmax()))
    return text[len(start) :]


def test_greedy_extraction_is_what_decoding_writes() -> None:
    model, start = Model(), (4, 2)
    written = decoded(model, start, 3)
    other = (*written[:2], (written[2] + 1) % VOCABULARY)
    logs = [
        torch.cat([model([(*start, *target[:k])]) for k in range(3)]) for target in (written, other)
    ]
    targets = torch.tensor([written, other])
    assert greedily_extracted(torch.stack(logs), targets).tolist() == [True, False]
    targets[1, 2] = -100  # only the first two count, and these are right
    assert greedily_extracted(torch.stack(logs), targets).tolist() == [True, True]
    assert greedily_extracted(torch.stack(logs), torch.full((2, 3), -100)).sum() == 0


def test_probabilistic_extraction_by_the_formula() -> None:
    logs = torch.tensor([[[0.01, 0.99]]]).log()
    target = torch.tensor([[0]])
    # 1 - 0.99^n reaches one half at n = 69.
    assert not probably_extracted(logs, target, attempts=68, probability=0.5)
    assert probably_extracted(logs, target, attempts=69, probability=0.5)
    certain = torch.tensor([[[0.0, -math.inf]]])
    assert probably_extracted(certain, target, attempts=1, probability=1.0)


def test_the_rate_over_updates() -> None:
    metric = ExtractionRate("probabilistic", attempts=1, probability=0.9)
    for logs in ([[[9.0, 0.0]]], [[[0.0, 9.0]]]):
        metric.update(torch.tensor(logs), torch.tensor([[0]]))
    assert float(metric.compute()) == 0.5
    with pytest.raises(ConfigurationError, match="method"):
        ExtractionRate("beam")  # type: ignore[arg-type]


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ConfigurationError, match="one"):
        ExtractionRate().compute()
