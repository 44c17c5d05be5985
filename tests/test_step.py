"""The private step: micro-batches add up, noise comes once, the divisor is public."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping.statistics import StepStatistics
from lightning_privacy.clipping.tagging import TaggedParameter
from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.noise import GaussianNoise, bundles, secret_from_seed
from lightning_privacy.step import PrivateStep
from tests.clipping.reference import (
    Gradients,
    Sketch,
    assert_untouched,
    clipped_by_hand,
    difference,
    learn_from,
    loop_gradients,
    norm,
    norms_of,
    numbers,
    plan_of,
    rows_of,
    run_micro_batch,
    squares,
    step_of,
    trainable,
)

B = 6
X = numbers(B, 4)
KINDS = ["flat", "per_layer", "automatic"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def released(step: PrivateStep, number: int = 0) -> Gradients:
    step.release(number)
    return {name: p.grad.clone() for name, p in step.parameters.items()}


@pytest.fixture
def model() -> Iterator[nn.Sequential]:
    module = network()
    yield module
    for parameter in module.parameters():
        assert type(parameter) is nn.Parameter


def total(module: nn.Module, batch: Tensor, **changes: Any) -> Gradients:
    step = step_of(module, **changes)
    run_micro_batch(step, module, squares, batch)
    found = released(step)
    step.close()
    return found


# ---------------------------------------------------------------------- one release
@pytest.mark.parametrize("expected", [1.0, 6.0, 512.0])
@pytest.mark.parametrize("clip_norm", [0.01, 0.3, 1e4])
def test_without_noise_it_is_the_clipped_mean_by_hand(
    model: nn.Module, clip_norm: float, expected: float
) -> None:
    model.double()
    batch = X.double()
    by_hand = clipped_by_hand(loop_gradients(model, squares, batch), clip_norm)
    found = total(model, batch, clip_norm=clip_norm, expected_batch_size=expected)
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[name], gradient / expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_reductions_give_the_same_release(model: nn.Module, reduction: str) -> None:
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        each = module(x).square().sum(1)
        return each.mean() if reduction == "mean" else each.sum()

    by_hand = clipped_by_hand(loop_gradients(model, loss, X), 0.2)
    step = step_of(model, reduction=reduction, clip_norm=0.2)
    run_micro_batch(step, model, loss, X)
    assert difference(released(step), by_hand) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 3), (1,) * 6, (5, 1)], ids=str)
def test_micro_batches_add_up_to_the_whole_batch(
    model: nn.Module, sizes: tuple[int, ...], kind: str
) -> None:
    step = step_of(model, clipping=kind, clip_norm=0.2)
    start = 0
    for size in sizes:
        run_micro_batch(step, model, squares, X[start : start + size])
        start += size
        assert step.pending
    whole = total(network(), X, clipping=kind, clip_norm=0.2)
    assert difference(released(step), whole) < 1e-6
    assert not step.pending


def test_filling_rows_count_for_nothing(model: nn.Module) -> None:
    filled = X.clone()
    filled[[1, 4]] = float("nan")
    step = step_of(model)
    run_micro_batch(step, model, squares, filled, [1, 0, 1, 1, 0, 1])
    # The loss of a batch with NaN is NaN for all rows that share an operation's reduction, but each
    # row's own gradient is its own.
    kept = total(network(), X[[0, 2, 3, 5]])
    found = released(step)
    assert difference(found, kept) < 1e-6


def test_an_empty_draw_releases_noise_alone(model: nn.Module) -> None:
    sigma, public = 2.0, 8.0
    step = step_of(model, noise_multiplier=sigma, expected_batch_size=public, clip_norm=0.5)
    run_micro_batch(step, model, squares, X[:1] * float("nan"), [0.0])
    statistics = step.release(3)
    assert statistics.units == 0
    assert statistics.nonfinite == 0
    assert statistics.clipped_share == 0.0
    assert statistics.mean_norm == 0.0
    assert statistics.noise_to_signal == math.inf
    noise = GaussianNoise(secret_from_seed(1))
    like = torch.empty(sum(p.numel() for p in step.parameters.values()))
    expected = noise.sample("\n".join(step.parameters), like, 3, sigma * 0.5) / public
    found = torch.cat([p.grad.flatten() for p in step.parameters.values()])
    torch.testing.assert_close(found, expected)


def test_units_with_known_gradients_are_clipped_like_others(model: nn.Module) -> None:
    """One of five clip norms counts as one clip norm, one of a half as it is."""
    alone = total(model, X, clip_norm=2.0, expected_batch_size=4.0)
    step = step_of(model, clip_norm=2.0, expected_batch_size=4.0)
    run_micro_batch(step, model, squares, X)
    known = torch.zeros(2, 8, 4)
    known[0, 0, 0], known[1, 1, 2] = 10.0, 1.0
    step.contribute({"0.weight": known})
    found = released(step)
    step.close()
    change = {name: found[name] - alone[name] for name in found}
    assert all(float(change[name].abs().max()) == 0 for name in change if name != "0.weight")
    expected = torch.zeros(8, 4)
    expected[0, 0], expected[1, 2] = 2.0 / 4, 1.0 / 4
    torch.testing.assert_close(change["0.weight"], expected, atol=1e-4, rtol=0)


def test_a_draw_without_any_micro_batch_still_gets_noise(model: nn.Module) -> None:
    step = step_of(model, noise_multiplier=1.0)
    assert norm(released(step)) > 0


def test_parameters_that_no_row_reached_get_noise() -> None:
    model = Sketch(lambda m, x: m.used(x), used=nn.Linear(4, 2), unused=nn.Linear(50, 40))
    step = step_of(model, noise_multiplier=3.0, clip_norm=0.5)
    run_micro_batch(step, model, squares, X)
    found = released(step)
    assert found["unused.weight"].std() == pytest.approx(1.5, rel=0.1)
    assert (found["unused.bias"] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_of_the_rule_s_sensitivity_and_added_once(kind: str) -> None:
    model = nn.Linear(200, 100)
    sigma, clip_norm, public = 1.5, 0.2, 4.0
    changes: dict[str, Any] = {
        "clipping": kind,
        "clip_norm": clip_norm,
        "expected_batch_size": public,
    }
    batch = numbers(3, 200)
    step = step_of(model, noise_multiplier=sigma, **changes)
    for row in range(3):
        run_micro_batch(step, model, squares, batch[row : row + 1])
    noisy = released(step)
    clean = total(model, batch, **changes)
    noise = noisy["weight"] - clean["weight"]
    assert noise.std() == pytest.approx(sigma * clip_norm / public, rel=0.03)
    assert abs(float(noise.mean())) < 4 * sigma * clip_norm / public / math.sqrt(noise.numel())


def test_per_layer_clipping_of_one_small_parameter() -> None:
    # One group, so that its rows' gradients may lie in the buffer.
    model = nn.Linear(4, 3, bias=False)
    alone = total(model, X, clipping="per_layer")
    assert difference(alone, total(model, X)) == 0.0


@pytest.mark.parametrize(("most", "count"), [(20, 3), (40, 3), (1000, 2)])
def test_large_parameters_share_a_draw_where_launches_are_dear(
    model: nn.Module, most: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = total(model, X)
    for name, size in (("_SMALL", 8), ("_SMALL_ON_CPU", 1000), ("_BUNDLE", most)):
        monkeypatch.setattr(f"lightning_privacy.noise.bundling.{name}", size)
    assert len(bundles(dict(model.named_parameters()))) == count
    assert difference(total(model, X), alone) == 0.0


def test_every_release_has_noise_of_its_own(model: nn.Module) -> None:
    step = step_of(model, noise_multiplier=1.0)
    first, second = released(step, 0), released(step, 1)
    assert difference(first, second) > 1
    assert difference(first, released(step_of(model, noise_multiplier=1.0), 0)) == 0
    with pytest.raises(GuaranteeError, match="release 1 after release 1"):
        step.release(1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_gradients_have_the_parameters_type_and_sums_at_least_float32(
    model: nn.Module, dtype: torch.dtype, expected: torch.dtype
) -> None:
    model.to(dtype)
    step = step_of(model, noise_multiplier=1.0, precision_slack=2e-2)
    run_micro_batch(step, model, squares, X.to(dtype))
    assert {g.dtype for g in step._sums.values()} == {torch.promote_types(dtype, torch.float32)}
    assert {g.dtype for g in released(step).values()} == {expected}


def test_old_gradients_are_cleared_before_the_forward(model: nn.Module) -> None:
    step = step_of(model)
    model[0].weight.grad = torch.full_like(model[0].weight, 1e9)
    run_micro_batch(step, model, squares, X)
    assert_untouched(model)
    found = released(step)
    assert difference(found, total(network(), X)) < 1e-6


# ---------------------------------------------------------------------- several optimizers
def test_two_optimizers_release_their_own_parameters(model: nn.Sequential) -> None:
    whole = total(network(), X)
    for sigma in (0.0, 1.0):
        step = step_of(model, noise_multiplier=sigma)
        run_micro_batch(step, model, squares, X)
        step.release(0, model[0].parameters())
        assert model[2].weight.grad is None
        assert step.pending
        step.release(0, model[2].parameters())
        assert not step.pending
        found = {name: p.grad for name, p in model.named_parameters()}
        step.close()
        for name, gradient in found.items():
            assert (difference({name: gradient}, {name: whole[name]}) < 1e-6) == (sigma == 0)


def test_a_second_release_of_the_same_parameters_holds_no_data(model: nn.Sequential) -> None:
    step = step_of(model)
    run_micro_batch(step, model, squares, X)
    step.release(0, model[0].parameters())
    step.release(1, model[0].parameters())
    assert norm({"weight": model[0].weight.grad}) == 0


def test_an_optimizer_with_a_parameter_that_is_not_covered_is_refused(model: nn.Module) -> None:
    step = step_of(model)
    stranger = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(GuaranteeError, match=r"shape \(3, 2\)"):
        step.release(0, [*model.parameters(), stranger])
    step.release(0, [*model.parameters(), stranger.requires_grad_(False)])


# ---------------------------------------------------------------------- order of calls
def test_end_without_begin_is_refused(model: nn.Module) -> None:
    step = step_of(model)
    with pytest.raises(GuaranteeError, match="end without a micro-batch"):
        step.end()
    run_micro_batch(step, model, squares, X)
    with pytest.raises(GuaranteeError, match="end without a micro-batch"):
        step.end()


def test_a_backward_before_arm_is_refused(model: nn.Module) -> None:
    step = step_of(model)
    step.begin([1.0] * B)
    with pytest.raises(UnsupportedOperationError, match="own backward only"):
        squares(model, X).backward()
    step.abort()


def test_a_backward_outside_the_step_is_refused_until_it_is_closed(model: nn.Module) -> None:
    step = step_of(model)
    with pytest.raises(GuaranteeError, match="raw gradient"):
        squares(model, X).backward()
    assert_untouched(model)
    step.close()
    squares(model, X).backward()
    assert model[0].weight.grad is not None


def test_begin_again_drops_what_was_not_ended(model: nn.Module) -> None:
    step = step_of(model)
    step.begin([1.0] * B)
    squares(model, X)
    assert step.active
    run_micro_batch(step, model, squares, X)
    assert not step.active
    assert difference(released(step), total(network(), X)) < 1e-6


def test_a_micro_batch_without_a_loss_adds_nothing(model: nn.Module) -> None:
    step = step_of(model)
    step.begin([1.0] * B)
    step.end()
    assert step.pending
    assert norm(released(step)) == 0


def test_arm_without_a_micro_batch_does_nothing(model: nn.Module) -> None:
    step_of(model).arm()


def test_discard_drops_a_draw_that_is_never_stepped(model: nn.Module) -> None:
    step = step_of(model)
    run_micro_batch(step, model, squares, 100 * X)
    step.discard()
    assert not step.pending
    run_micro_batch(step, model, squares, X)
    assert difference(released(step), total(network(), X)) < 1e-6


@pytest.mark.parametrize("moment", ["before", "tagged", "after backward", "pending", "twice"])
@pytest.mark.parametrize("how", ["abort", "close"])
def test_abort_and_close_restore_everything_at_any_moment(
    model: nn.Module, how: str, moment: str
) -> None:
    step = step_of(model)
    if moment in ("tagged", "after backward", "twice"):
        step.begin([1.0] * B)
        loss = squares(model, X)
        assert type(model[0].weight) is TaggedParameter
        if moment == "after backward":
            step.arm()
            loss.backward()
    if moment == "pending":
        run_micro_batch(step, model, squares, X)
    for _ in range(2 if moment == "twice" else 1):
        getattr(step, how)()
    assert not step.active
    assert not step.pending
    assert_untouched(model)
    if how == "abort":
        run_micro_batch(step, model, squares, X)
        assert difference(released(step), total(network(), X)) < 1e-6


def test_two_steps_cannot_be_open_at_once(model: nn.Module) -> None:
    first, second = step_of(model), step_of(network())
    first.begin([1.0] * B)
    with pytest.raises(GuaranteeError, match="second capture"):
        second.begin([1.0] * B)
    assert not second.active
    first.abort()
    second.begin([1.0] * B)
    second.abort()


def test_no_trainable_parameter_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="trainable"):
        PrivateStep(parameters={}, plan=plan_of(), noise=GaussianNoise(secret_from_seed(1)))


# ---------------------------------------------------------------------- layouts
def test_layouts_are_learnt_from_copies_of_one_row() -> None:
    model = Sketch(
        lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=nn.Linear(4, 3)
    ).double()
    batch = numbers(B, B, 4).double()
    by_hand = clipped_by_hand(loop_gradients(model, squares, batch), 0.1)
    step = step_of(model, clip_norm=0.1)
    learn_from(step, model, squares, batch)
    assert_untouched(model)
    run_micro_batch(step, model, squares, batch)
    assert difference(released(step), by_hand) < 1e-9
    run_micro_batch(step, model, squares, rows_of(batch, [2]))
    alone = {name: g[2:3] for name, g in loop_gradients_of(step, model, batch).items()}
    assert difference(released(step), clipped_by_hand(alone, 0.1)) < 1e-9


def loop_gradients_of(step: PrivateStep, model: nn.Module, batch: Tensor) -> Gradients:
    step._guard.remove()
    return loop_gradients(model, squares, batch)


# ---------------------------------------------------------------------- statistics
def test_statistics(model: nn.Module) -> None:
    gradients = loop_gradients(model, squares, X)
    norms = norms_of(gradients)
    clip_norm = float(norms.sort().values[2:4].mean())
    broken = X.clone()
    broken[0] = float("inf")
    step = step_of(model, clip_norm=clip_norm, noise_multiplier=2.0)
    run_micro_batch(step, model, squares, broken[:4], [1, 1, 0, 1])
    run_micro_batch(step, model, squares, broken[4:])
    statistics = step.release(0)
    rows = [1, 3, 4, 5]
    kept = norms[rows]
    signal = norm(clipped_by_hand({n: g[rows] for n, g in gradients.items()}, clip_norm))
    assert statistics.units == 5
    assert statistics.nonfinite == 1
    assert statistics.mean_norm == pytest.approx(float(kept.mean()), rel=1e-5)
    assert statistics.clipped_share * 5 == pytest.approx(int((kept > clip_norm).sum()))
    size = sum(p.numel() for p in trainable(model).values())
    expected = 2.0 * clip_norm * math.sqrt(size) / signal
    assert statistics.noise_to_signal == pytest.approx(expected, rel=1e-4)


def test_statistics_survive_the_step(model: nn.Module) -> None:
    step = step_of(model)
    run_micro_batch(step, model, squares, X)
    statistics = step.release(0)
    assert isinstance(statistics, StepStatistics)
    run_micro_batch(step, model, squares, X[:2])
    step.close()
    assert statistics.units == B
