"""Clipping rules: factors, and the sensitivity each answers for."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from lightning_privacy.clipping.norms import (
    AutomaticClipping,
    FlatClipping,
    PerLayerClipping,
    clipping_rule,
)
from lightning_privacy.errors import ConfigurationError

NAMES = ["a.weight", "a.bias", "b.weight", "head"]
KINDS = ["flat", "per_layer", "automatic"]
NORMS = [0.0, 1e-30, 1e-6, 0.5, 1.0, 2.0, 1e6, 1e18]


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 250.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_combination_of_norms_exceeds_the_sensitivity(kind: str, clip_norm: float) -> None:
    rule = clipping_rule(kind, clip_norm, NAMES)
    assert rule.sensitivity == clip_norm
    grid = torch.tensor(NORMS, dtype=torch.float64)
    norms = torch.cartesian_prod(*[grid] * rule.groups).reshape(-1, rule.groups).t()
    factors = rule.factors(norms.square())
    assert factors.shape == norms.shape
    assert torch.isfinite(factors).all()
    assert (factors >= 0).all()
    total = (factors * norms).square().sum(0).sqrt()
    assert (total <= clip_norm * (1 + 1e-12)).all()


def test_flat_clipping_leaves_small_gradients_alone() -> None:
    rule = FlatClipping(clip_norm=2.0)
    factors = rule.factors(torch.tensor([[0.0, 1.0, 4.0, 16.0]]))
    assert factors.tolist() == [[1.0, 1.0, 1.0, 0.5]]
    assert rule.groups == 1
    assert {rule.group_of(name) for name in NAMES} == {0}


def test_per_layer_clipping_groups_by_the_module_that_owns_the_parameter() -> None:
    rule = clipping_rule("per_layer", 3.0, NAMES)
    assert isinstance(rule, PerLayerClipping)
    assert rule.groups == 3
    assert [rule.group_of(name) for name in NAMES] == [0, 0, 1, 2]
    bound = 3.0 / math.sqrt(3)
    factors = rule.factors(torch.tensor([[1.0], [100.0], [0.0]]).square())
    torch.testing.assert_close(factors, torch.tensor([[1.0], [bound / 100], [1.0]]))


def test_automatic_clipping_normalises_small_gradients_too() -> None:
    rule = AutomaticClipping(clip_norm=2.0, stability=0.01)
    norms = torch.tensor([[0.0, 0.01, 100.0]], dtype=torch.float64)
    torch.testing.assert_close(
        rule.factors(norms.square()) * norms,
        torch.tensor([[0.0, 1.0, 2.0 * 100 / 100.01]], dtype=torch.float64),
    )


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, 1e-30, math.inf, math.nan, "1", None, 1j])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_norms_that_bound_nothing(kind: str, clip_norm: object) -> None:
    with pytest.raises(ConfigurationError, match="clip_norm is a positive, finite number"):
        clipping_rule(kind, clip_norm, NAMES)  # type: ignore[arg-type]


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigurationError, match="'adaptive'"):
        clipping_rule("adaptive", 1.0, NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_frozen_and_pickle(kind: str) -> None:
    rule = clipping_rule(kind, 1.0, NAMES)
    with pytest.raises(AttributeError):
        rule.clip_norm = 2.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(rule)) == rule
