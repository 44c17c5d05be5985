"""Units and their clipped sum: what one unit, whatever it holds, can add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping.contributions import Contribution, Dense, Lookup, Outer
from lightning_privacy.clipping.norms import clipping_rule
from lightning_privacy.clipping.units import ClippedSum, Units, clipped_sum
from tests.clipping.reference import by_unit, difference, norm, numbers, tokens

B, POSITIONS = 6, 30
SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "table": (50, 8)}
KINDS = ["flat", "per_layer", "automatic"]
CLIP_NORM = 0.7


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def contributions(scale: float | Tensor = 1.0) -> dict[str, list[Contribution]]:
    """One parameter in each of the three forms; ``scale`` may be one number for each row."""
    factor = torch.as_tensor(scale).expand(B)
    left, right = numbers(B, POSITIONS, 40), numbers(B, POSITIONS, 30, seed=2)
    values = numbers(B, POSITIONS, 8, seed=4) * factor[:, None, None]
    return {
        "a.weight": [Outer(left * factor[:, None, None], right)],
        "a.bias": [Dense(numbers(B, 40, seed=3) * factor[:, None])],
        "table": [Lookup(tokens(B, POSITIONS, below=50), values)],
    }


def dense(found: dict[str, list[Contribution]]) -> dict[str, Tensor]:
    return {name: item.dense(torch.Size(SHAPES[name])) for name, (item,) in found.items()}


def summed(
    found: dict[str, list[Contribution]], units: Units, kind: str = "flat", clip: float = CLIP_NORM
) -> ClippedSum:
    return clipped_sum(dict(found), parameters(), units, clipping_rule(kind, clip, SHAPES))


def all_rows(reduction_scale: float = 1.0) -> Units:
    return Units.rows(torch.ones(B), reduction_scale)


def without(row: int) -> Units:
    weights = torch.ones(B)
    weights[row] = 0
    return Units.rows(weights, 1.0)


# ---------------------------------------------------------------------- the bound
HOSTILE = {
    "ordinary": 1.0,
    "huge": 1e6,
    "tiny": 1e-6,
    "beyond float32 squares": 1e25,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "zero": 0.0,
}


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_one_unit_changes_the_sum_by_at_most_the_clip_norm(kind: str, content: str) -> None:
    scale = torch.ones(B)
    scale[2] = HOSTILE[content]
    whole = summed(contributions(scale), all_rows(), kind)
    rest = summed(contributions(scale), without(2), kind)
    assert all(torch.isfinite(g).all() for g in whole.gradients.values())
    change = difference(whole.gradients, rest.gradients)
    assert change <= CLIP_NORM * (1 + 1e-4)
    # And the bound is used: an ordinary or huge gradient does add about as much as it may.
    if content in ("ordinary", "huge"):
        assert change >= 0.95 * CLIP_NORM * (1 if kind != "per_layer" else 0.5)


@pytest.mark.parametrize("content", ["infinite", "not a number", "beyond float32 squares"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_is_not_finite_contributes_exactly_zero_and_is_counted(
    kind: str, content: str
) -> None:
    scale = torch.ones(B)
    scale[2] = HOSTILE[content]
    whole = summed(contributions(scale), all_rows(), kind)
    clean = summed(contributions(), without(2), kind)
    for name, gradient in clean.gradients.items():
        assert torch.equal(whole.gradients[name], gradient)
    assert whole.nonfinite.tolist() == [i == 2 for i in range(B)]
    assert whole.norms[2] == 0
    assert whole.factors[2] == 0
    assert whole.members.all()


@pytest.mark.parametrize("name", SHAPES)
def test_one_entry_that_is_not_finite_excludes_the_unit_from_every_parameter(name: str) -> None:
    found = contributions()
    item = found[name][0]
    tensor = {"a.weight": "right", "a.bias": "gradients", "table": "values"}[name]
    getattr(item, tensor)[4].view(-1)[0] = float("nan")
    for kind in KINDS:
        whole = summed(found, all_rows(), kind)
        assert whole.nonfinite.tolist() == [i == 4 for i in range(B)]
        clean = summed(contributions(), without(4), kind)
        for other, gradient in clean.gradients.items():
            assert torch.equal(whole.gradients[other], gradient)


@pytest.mark.parametrize("content", HOSTILE)
def test_filling_rows_contribute_exactly_zero_whatever_they_hold(content: str) -> None:
    scale = torch.ones(B)
    scale[1] = HOSTILE[content]
    filled = summed(contributions(scale), without(1))
    clean = summed(contributions(), without(1))
    for name, gradient in clean.gradients.items():
        assert torch.equal(filled.gradients[name], gradient)
    assert not filled.nonfinite.any()
    assert filled.members.tolist() == [i != 1 for i in range(B)]
    assert filled.norms[1] == 0


def test_only_filling_rows() -> None:
    result = summed(contributions(float("nan")), Units.rows(torch.zeros(B), 1.0))
    assert norm(result.gradients) == 0
    assert not result.members.any()
    assert not result.nonfinite.any()


def test_nothing_was_captured() -> None:
    result = summed({}, all_rows())
    assert result.gradients == {}
    assert result.norms.tolist() == [0.0] * B
    assert not result.nonfinite.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_many_equal_units_do_not_blur_the_bound(kind: str, dtype: torch.dtype) -> None:
    # A sum kept in bfloat16 would move by 0.4 % of all 256 units together when one leaves.
    rows = 256
    values = numbers(1, 40).to(dtype).expand(rows, 40) * 100
    rule = clipping_rule(kind, CLIP_NORM, SHAPES)
    sums = []
    for last in (1.0, 0.0):
        weights = torch.ones(rows)
        weights[-1] = last
        found: dict[str, list[Contribution]] = {"a.bias": [Dense(values.clone())]}
        sums.append(clipped_sum(found, parameters(), Units.rows(weights, 1.0), rule).gradients)
    assert sums[0]["a.bias"].dtype == torch.float32
    excess = 1e-3 if dtype == torch.float32 else 2e-2
    assert difference(*sums) <= CLIP_NORM * (1 + excess)


# ---------------------------------------------------------------------- equality with arithmetic
@pytest.mark.parametrize("reduction_scale", [1.0, 6.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_clipping_by_hand(kind: str, reduction_scale: float) -> None:
    rule = clipping_rule(kind, CLIP_NORM, SHAPES)
    gradients = {name: g * reduction_scale for name, g in dense(contributions()).items()}
    squares = torch.zeros(rule.groups, B)
    for name, gradient in gradients.items():
        squares[rule.group_of(name)] += gradient.flatten(1).square().sum(1)
    factors = rule.factors(squares)
    result = summed(contributions(), all_rows(reduction_scale), kind)
    for name, gradient in gradients.items():
        expected = torch.tensordot(factors[rule.group_of(name)], gradient, 1)
        torch.testing.assert_close(result.gradients[name], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.norms, squares.sum(0).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.factors, factors.amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("index", [[0, 0, 0, 1, 1, 2], [2, 1, 0, 0, 1, 2], [0] * B, list(range(B))])
def test_a_unit_is_the_mean_of_its_rows_wherever_they_stand(index: list[int]) -> None:
    units = Units.segments(torch.tensor(index), 1.0)
    means = by_unit(dense(contributions()), index)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in means.values()]).sum(0).sqrt()
    factors = (CLIP_NORM / norms).clamp(max=1.0)
    result = summed(contributions(), units)
    torch.testing.assert_close(result.norms.float(), norms, rtol=1e-4, atol=0)
    for name, mean in means.items():
        expected = torch.tensordot(factors, mean, 1)
        torch.testing.assert_close(result.gradients[name].float(), expected, rtol=1e-4, atol=1e-4)
    assert result.members.tolist() == [True] * units.count


@pytest.mark.parametrize("content", HOSTILE)
def test_a_unit_of_several_rows_is_bounded_as_a_whole(content: str) -> None:
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    scale = torch.ones(B)
    scale[1] = HOSTILE[content]
    whole = summed(contributions(scale), Units.segments(index, 1.0))
    kept = {
        name: [type(item)(*(getattr(item, field)[3:] for field in item.__slots__))]
        for name, (item,) in contributions(scale).items()
    }
    rest = summed(kept, Units.segments(index[3:] - 1, 1.0))
    assert difference(whole.gradients, rest.gradients) <= CLIP_NORM * (1 + 1e-4)
    assert whole.nonfinite.tolist() == [
        content in ("infinite", "not a number", "beyond float32 squares"),
        False,
        False,
    ]


def test_thirds_are_exact_in_float64() -> None:
    units = Units.segments(torch.tensor([0, 0, 0, 1, 1, 2]), 6.0)
    assert units.scale.dtype == torch.float64
    assert units.scale.tolist() == [2.0, 2.0, 2.0, 3.0, 3.0, 6.0]
    assert Units.segments(torch.tensor([0, 0, 0]), 1.0).scale[0] == 1 / 3


def test_contributions_are_let_go_while_working() -> None:
    found = contributions()
    clipped_sum(found, parameters(), all_rows(), clipping_rule("flat", CLIP_NORM, SHAPES))
    assert found == {}
