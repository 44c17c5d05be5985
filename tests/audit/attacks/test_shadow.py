"""LiRA and RMIA against their formulas, and models trained at once against models trained alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.audit.attacks import (
    lira_offline,
    lira_online,
    logit_confidence,
    rmia,
    train_shadows,
)
from lightning_privacy.errors import ConfigurationError

DRAW = torch.Generator().manual_seed(0)
K, N = 9, 6
SHADOWS = torch.randn(K, N, generator=DRAW, dtype=torch.float64) * 2
INCLUDED = torch.tensor([[(k + n) % 3 == 0 for n in range(N)] for k in range(K)])
OWN = torch.randn(N, generator=DRAW, dtype=torch.float64)


@pytest.mark.parametrize("example", range(N))
def test_lira_is_its_formula(example: int) -> None:
    inside, outside = (SHADOWS[side[:, example], example] for side in (INCLUDED, ~INCLUDED))
    phi = float(OWN[example])
    spread = [float(side.std()) for side in (inside, outside)]
    expected = norm.logpdf(phi, float(inside.median()), spread[0])
    expected -= norm.logpdf(phi, float(outside.median()), spread[1])
    found = lira_online(OWN, SHADOWS, INCLUDED, fixed_variance=False)
    assert float(found[example]) == pytest.approx(expected)
    found = lira_offline(OWN, SHADOWS, INCLUDED, fixed_variance=False)
    expected = (phi - float(outside.median())) / spread[1]
    assert float(found[example]) == pytest.approx(expected)


def test_the_fixed_variance_is_pooled_over_examples() -> None:
    squares = [(SHADOWS[~INCLUDED[:, n], n].std() ** 2 * 5) for n in range(N)]
    pooled = math.sqrt(float(sum(squares)) / (5 * N))
    found = lira_offline(OWN, SHADOWS, INCLUDED)
    medians = torch.stack([SHADOWS[~INCLUDED[:, n], n].median() for n in range(N)])
    torch.testing.assert_close(found, (OWN - medians) / pooled)


def test_rmia_is_its_formula() -> None:
    draw = torch.Generator().manual_seed(2)
    p, z = torch.rand(N, generator=draw), torch.rand(5, generator=draw)
    p_ref, z_ref = torch.rand(K, N, generator=draw), torch.rand(K, 5, generator=draw)
    found = rmia(p, p_ref, INCLUDED, z, z_ref, gamma=1.2)
    for x in range(N):
        outside = float(p_ref[~INCLUDED[:, x], x].double().mean())
        ratio = float(p[x]) / ((1.3 * outside + 0.7) / 2)
        others = [
            float(z[k]) / ((1.3 * float(z_ref[:, k].double().mean()) + 0.7) / 2) for k in range(5)
        ]
        assert float(found[x]) == pytest.approx(sum(ratio / o > 1.2 for o in others) / 5)


def test_the_confidence_is_a_logit_that_never_overflows() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [400.0, 0.0, 0.0]])
    targets = torch.tensor([0, 0])
    p = float(logits[0].softmax(0)[0])
    found = logit_confidence(logits, targets)
    assert float(found[0]) == pytest.approx(math.log(p / (1 - p)), rel=1e-6)
    assert float(found[1]) == pytest.approx(400 - math.log(2))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def trained_alone(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_models_trained_at_once_are_models_trained_alone() -> None:
    draw = torch.Generator().manual_seed(4)
    x, y = torch.randn(20, 3, generator=draw), torch.randint(2, (20,), generator=draw)
    included = torch.rand(3, 20, generator=draw) < 0.5
    before = torch.random.get_rng_state()
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(small())
        return made[-1]

    shadows = train_shadows(make, x, y, included, steps=15)
    assert torch.equal(torch.random.get_rng_state(), before)
    outputs = shadows.outputs(x)
    assert outputs.shape == (3, 20, 2)
    for number, model in enumerate(made):
        alone = trained_alone(model, x[included[number]], y[included[number]], 15)
        torch.testing.assert_close(outputs[number], alone(x), rtol=1e-4, atol=1e-5)


def test_too_few_shadows_are_refused() -> None:
    none = torch.zeros_like(INCLUDED)
    with pytest.raises(ConfigurationError, match="at least 2"):
        lira_online(OWN, SHADOWS, none)
    with pytest.raises(ConfigurationError, match="at least 1"):
        rmia(OWN, SHADOWS, ~none, OWN, SHADOWS)
    with pytest.raises(ConfigurationError, match="included"):
        train_shadows(small, torch.ones(4, 3), torch.zeros(4).long(), none[:, :4], steps=1)
