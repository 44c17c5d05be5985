"""Units of several rows: one clip for each user, however the rows are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.noise import GaussianNoise, secret_from_seed
from lightning_privacy.sampling import MicroBatch, UnitRows, packed
from lightning_privacy.step import PrivateStep
from tests.clipping.reference import (
    Gradients,
    Sketch,
    assert_close,
    by_unit,
    clipped_by_hand,
    difference,
    learn_from,
    loop_gradients,
    norm,
    numbers,
    rows_of,
    squares,
    step_of,
    tokens,
)

SIZES = [1, 7, 3, 12, 2]
ROWS = sum(SIZES)
CLIP_NORM = 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def tied_language_model() -> nn.Module:
    def forward(m: Sketch, batch: Tensor) -> Tensor:
        return nn.functional.linear(m.norm(m.words(batch)), m.words.weight)

    return Sketch(forward, words=nn.Embedding(11, 6), norm=nn.LayerNorm(6))


def users_of(sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def run(step: PrivateStep, module: nn.Module, batch: Any, parts: Sequence[MicroBatch]) -> None:
    for part in parts:
        step.begin(part.weights, part.units)
        loss = squares(module, rows_of(batch, part.indices))
        step.arm()
        loss.backward()
        step.end()


def user_sum(
    module: nn.Module, batch: Any, users: Sequence[np.ndarray], most: int | None, **changes: Any
) -> Gradients:
    """The clipped sum over users, in micro-batches of at most ``most`` rows."""
    step = step_of(module, **{"clip_norm": CLIP_NORM, **changes})
    try:
        learn_from(step, module, squares, batch)
        run(step, module, batch, packed(users, most))
        step.release(0)
        return {name: p.grad.clone() for name, p in step.parameters.items()}
    finally:
        step.close()
        module.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- equal to the definition
@pytest.mark.parametrize("clip_norm", [CLIP_NORM, 1e3])  # every user is clipped, and nobody
@pytest.mark.parametrize("most", [1, 2, 3, 5, 12, None])
@pytest.mark.parametrize("kind", ["network", "language model"])
def test_each_user_is_averaged_and_clipped_once(
    kind: str, most: int | None, clip_norm: float
) -> None:
    if kind == "network":
        module, batch = network().double(), numbers(ROWS, 4).double()
    else:
        module, batch = tied_language_model().double(), tokens(ROWS, 5)
    units = np.repeat(np.arange(len(SIZES)), SIZES).tolist()
    means = by_unit(loop_gradients(module, squares, batch), units)
    by_hand = clipped_by_hand(means, clip_norm)
    found = user_sum(module, batch, users_of(SIZES), most, clip_norm=clip_norm)
    assert_close(found, by_hand, 1e-9)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_every_rule_gives_the_same_for_any_micro_batch_size(clipping: str) -> None:
    module, batch = network().double(), numbers(ROWS, 4).double()
    whole = user_sum(module, batch, users_of(SIZES), None, clipping=clipping)
    for most in (1, 4, 7):
        parts = user_sum(module, batch, users_of(SIZES), most, clipping=clipping)
        assert_close(parts, whole, 1e-9)


def test_a_summed_loss_and_a_mean_loss_give_the_same() -> None:
    module, batch = network().double(), numbers(ROWS, 4).double()
    step = step_of(module, reduction="sum", clip_norm=CLIP_NORM)
    for part in packed(users_of(SIZES), 5):
        step.begin(part.weights, part.units)
        rows = rows_of(batch, part.indices)
        loss = squares(module, rows) * len(rows)
        step.arm()
        loss.backward()
        step.end()
    step.release(0)
    found = {name: p.grad.clone() for name, p in step.parameters.items()}
    step.close()
    module.zero_grad(set_to_none=True)
    assert_close(found, user_sum(module, batch, users_of(SIZES), 5), 1e-9)


# ---------------------------------------------------------------------- the guarantee
CONTENTS = {
    "ordinary": 1.0,
    "huge": 1e6,
    "zero": 0.0,
    "not a number": float("nan"),
    "infinite": float("inf"),
}


def neighbours(size: int, content: str, all_rows: bool = True) -> tuple[Tensor, list[np.ndarray]]:
    """A batch whose last user has ``size`` rows of some content."""
    batch = torch.cat([numbers(6, 4), 3 + numbers(size, 4, seed=2)])
    batch[slice(6, None) if all_rows else 6] *= CONTENTS[content]
    return batch, users_of([2, 1, 3, size])


def moved(size: int, content: str, most: int | None, all_rows: bool = True) -> float:
    module = network()
    batch, users = neighbours(size, content, all_rows)
    with_user = user_sum(module, batch, users, most)
    without = user_sum(module, batch, users[:-1], most)
    assert all(torch.isfinite(gradient).all() for gradient in with_user.values())
    return difference(with_user, without)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("size", "most"), [(1, 4), (7, 4), (7, None), (500, 64)])
def test_one_user_moves_the_sum_by_at_most_the_clip_norm(
    size: int, content: str, most: int | None
) -> None:
    assert moved(size, content, most) <= CLIP_NORM * (1 + 1e-4)


@pytest.mark.parametrize("content", ["not a number", "infinite"])
@pytest.mark.parametrize("most", [2, 4, None])
def test_one_bad_row_takes_its_user_out_and_nobody_else(content: str, most: int | None) -> None:
    assert moved(7, content, most, all_rows=False) < 1e-6  # rounding of other batch shapes


def test_the_bound_is_reached() -> None:
    assert moved(7, "huge", 4) == pytest.approx(CLIP_NORM, rel=1e-3)


def test_clipping_each_example_alone_would_not_bound_a_user() -> None:
    """The check has power: a trainer that clips per example fails it by the number of rows."""
    module = network()
    batch, users = neighbours(7, "ordinary")

    def per_example(of: Sequence[np.ndarray]) -> Gradients:
        rows = rows_of(batch, np.concatenate(of).tolist())
        return clipped_by_hand(loop_gradients(module, squares, rows), CLIP_NORM)

    assert difference(per_example(users), per_example(users[:-1])) > 3 * CLIP_NORM


@pytest.mark.parametrize("content", ["ordinary", "huge", "not a number"])
@pytest.mark.parametrize("group_size", [1, 7])
def test_bounded_examples_move_the_sum_by_one_clip_norm_each(group_size: int, content: str) -> None:
    """ELS: of 500 rows of a user ``group_size`` take part, each clipped on its own."""
    module = network()
    batch, _ = neighbours(500, content)
    rows = [np.array([row]) for row in range(6 + group_size)]
    with_user = user_sum(module, batch, rows, 4)
    without = user_sum(module, batch, rows[:6], 4)
    assert difference(with_user, without) <= group_size * CLIP_NORM * (1 + 1e-4)


# ---------------------------------------------------------------------- memory and order
def test_a_large_user_keeps_one_gradient_in_memory() -> None:
    module, batch = network(), numbers(64, 4)
    step = step_of(module)
    learn_from(step, module, squares, batch)
    parts = packed(users_of([60, 4]), 8)
    for number, part in enumerate(parts[:7], start=1):
        run(step, module, batch, [part])
        sums = step._open._sums
        assert {name: total.shape for name, total in sums.items()} == {
            name: p.shape for name, p in module.named_parameters()
        }
        assert not step.pending, number
    run(step, module, batch, parts[7:])
    assert step.pending
    assert not step._open
    assert step.release(0).units == 2
    step.close()


def test_an_incomplete_user_is_never_released_or_mixed_with_another() -> None:
    module, batch = network(), numbers(16, 4)
    step = step_of(module)
    learn_from(step, module, squares, batch)
    parts = packed(users_of([10, 3]), 4)
    run(step, module, batch, parts[:1])
    with pytest.raises(GuaranteeError, match="a unit is complete"):
        step.release(0)
    with pytest.raises(GuaranteeError, match="a unit is complete"):
        step.begin([1.0])
    with pytest.raises(GuaranteeError, match="a unit is complete"):
        step.begin([1.0] * 3, UnitRows(index=(0, 0, 0), sizes=(3,)))
    step.discard()
    run(step, module, batch, parts)
    assert step.release(1).units == 2
    found = {name: p.grad.clone() for name, p in step.parameters.items()}
    step.close()
    module.zero_grad(set_to_none=True)
    assert_close(found, user_sum(module, batch, users_of([10, 3]), 4, clip_norm=1.0), 1e-5)


def test_a_micro_batch_without_a_loss_counts_as_zero() -> None:
    module, batch = network().double(), numbers(16, 4).double()
    step = step_of(module)
    learn_from(step, module, squares, batch)
    parts = packed(users_of([10, 3]), 4)
    run(step, module, batch, parts[:2])
    step.begin(parts[2].weights, parts[2].units)  # its loss is None, so nothing ends it
    run(step, module, batch, parts[3:])
    assert step.release(0).units == 2
    step.close()


def test_statistics_count_users() -> None:
    module = network()
    batch, users = neighbours(500, "not a number")
    step = step_of(module, clip_norm=1e-3)
    learn_from(step, module, squares, batch[:6])
    run(step, module, batch, packed(users, 64))
    statistics = step.release(0)
    assert (statistics.units, statistics.nonfinite) == (4, 1)
    assert statistics.clipped_share == 0.75
    assert norm({n: p.grad for n, p in step.parameters.items()}) <= 3e-3 * (1 + 1e-4)
    step.close()


# ---------------------------------------------------------------------- local steps (DP-FedAvg)
def along_local_steps(
    module: nn.Module, batch: Tensor, parts: Sequence[Sequence[int]], rate: float
) -> Gradients:
    """The mean over rows of gradients along steps of plain SGD, from a copy of the module."""
    import copy

    local = copy.deepcopy(module)
    total = {name: torch.zeros_like(p) for name, p in local.named_parameters()}
    count = sum(map(len, parts))
    for part in parts:
        loss = squares(local, batch[list(part)])
        gradients = torch.autograd.grad(loss, list(local.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(local.named_parameters(), gradients, strict=True):
                total[name] += gradient * len(part) / count
                p.sub_(rate * gradient)
    return total


@pytest.mark.parametrize("clip_norm", [0.05, 1e3])
def test_local_steps_are_those_of_each_user_alone(clip_norm: float) -> None:
    module, batch = network().double(), numbers(ROWS, 4).double()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    step = PrivateStep(
        parameters=dict(module.named_parameters()),
        plan=step_of(module, clip_norm=clip_norm)._plan,
        noise=GaussianNoise(secret_from_seed(1)),
        local_rate=0.3,
    )
    learn_from(step, module, squares, batch)
    parts = packed(users_of(SIZES), 5)
    run(step, module, batch, parts)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
    step.release(0)
    found = {name: p.grad.clone() for name, p in step.parameters.items()}
    step.close()
    module.zero_grad(set_to_none=True)
    updates = []
    for user in users_of(SIZES):
        own = [part.indices for part in parts if set(part.indices) <= set(user.tolist())]
        cut = own if sum(map(len, own)) == len(user) else [user.tolist()]
        updates.append(along_local_steps(module, batch, cut, 0.3))
    stacked = {name: torch.stack([one[name] for one in updates]) for name in updates[0]}
    assert_close(found, clipped_by_hand(stacked, clip_norm), 1e-9)
    plain = user_sum(module, batch, users_of(SIZES), 5, clip_norm=clip_norm)
    assert difference(found, plain) > 1e-3 * norm(plain)


def test_parameters_are_put_back_whatever_happens() -> None:
    module, batch = network(), numbers(16, 4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    step = PrivateStep(
        parameters=dict(module.named_parameters()),
        plan=step_of(module)._plan,
        noise=GaussianNoise(secret_from_seed(1)),
        local_rate=0.3,
    )
    learn_from(step, module, squares, batch)
    run(step, module, batch, packed(users_of([10, 3]), 4)[:2])
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    step.abort()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    step.close()
