"""The two public functions: what they return, what they leave alone, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.errors import ConfigurationError
from tests.clipping.reference import (
    Sketch,
    assert_close,
    assert_gradients,
    assert_sums,
    assert_untouched,
    by_unit,
    clipped_by_hand,
    difference,
    loop_gradients,
    norms_of,
    numbers,
    plain_gradient,
    squares,
    trainable,
)

B = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def test_rows_are_the_gradients_of_each_example_s_own_loss() -> None:
    model = network()
    found = per_example_gradients(model, squares, numbers(B, 6))
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert found[name].shape == (B, *parameter.shape)
        assert found[name].dtype == parameter.dtype
        assert not found[name].requires_grad
    assert_close(found, loop_gradients(model, squares, numbers(B, 6)), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_reductions(reduction: str) -> None:
    model = network().double()
    batch = numbers(B, 6).double()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        each = module(x).square().sum(1)
        return each.mean() if reduction == "mean" else each.sum()

    expected = loop_gradients(model, loss, batch)
    assert_close(
        per_example_gradients(model, loss, batch, loss_reduction=reduction), expected, 1e-9
    )
    total, norms = clipped_gradient_sum(model, loss, batch, 1.0, loss_reduction=reduction)
    torch.testing.assert_close(norms, norms_of(expected), rtol=1e-9, atol=0)
    assert difference(total, clipped_by_hand(expected, 1.0)) < 1e-9


def test_the_mean_of_the_rows_is_autograd_s_gradient() -> None:
    model = network().double()
    batch = numbers(B, 6).double()
    found = per_example_gradients(model, squares, batch)
    assert_close(
        {n: g.mean(0) for n, g in found.items()}, plain_gradient(model, squares, batch), 1e-9
    )


def test_parameters_that_the_loss_does_not_use_have_zeros() -> None:
    model = Sketch(lambda m, x: m.used(x), used=nn.Linear(6, 2), unused=nn.Linear(6, 2))
    found = per_example_gradients(model, squares, numbers(B, 6))
    assert found["unused.weight"].shape == (B, 2, 6)
    assert (found["unused.weight"] == 0).all()
    total, _ = clipped_gradient_sum(model, squares, numbers(B, 6), 1.0)
    assert total["unused.bias"].tolist() == [0.0, 0.0]
    assert total["unused.bias"].dtype == torch.float32


def test_sums_of_low_precision_models_are_float32() -> None:
    model = Sketch(lambda m, x: m.used(x), used=nn.Linear(6, 2), unused=nn.Linear(6, 2)).bfloat16()
    total, norms = clipped_gradient_sum(model, squares, numbers(B, 6).bfloat16(), 1.0)
    assert {g.dtype for g in total.values()} == {torch.float32}
    assert norms.dtype == torch.float32


@pytest.mark.parametrize("units", [[0, 0, 1, 1, 1], (4, 3, 2, 1, 0), torch.tensor([1, 0, 1, 0, 1])])
def test_units_of_several_rows(units: Any) -> None:
    model = network().double()
    batch = numbers(B, 6).double()
    expected = loop_gradients(model, squares, batch)
    assert_sums(model, squares, batch, expected, list(map(int, units)))
    whole = [0] * B
    total, norms = clipped_gradient_sum(model, squares, batch, 1e9, whole)
    assert norms.shape == (1,)
    assert_close(total, {n: g[0] for n, g in by_unit(expected, whole).items()}, 1e-9)


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "nested"])
def test_containers_of_tensors(container: str) -> None:
    x, y = numbers(B, 6), numbers(B, 2, seed=2)
    batch: Any = {
        "tuple": (x, y),
        "list": [x, y],
        "dict": {"x": x, "y": y},
        "nested": ({"x": x}, [y]),
    }[container]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        if container == "nested":
            (first, (second,)) = batch
            return (module(first["x"]) - second).square().mean()
        first, second = batch.values() if container == "dict" else batch
        return (module(first) - second).square().mean()

    assert_gradients(network(), loss, batch, 1e-5)


def test_constants_in_the_batch_pass_through() -> None:
    batch = {"x": numbers(B, 6), "name": "train", "scale": 2.0, "offset": torch.tensor(1.0)}

    def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return squares(module, batch["x"] * batch["scale"] + batch["offset"])

    found = per_example_gradients(network(), loss, batch)
    expected = per_example_gradients(
        network(), lambda m, x: squares(m, x * 2.0 + 1.0), numbers(B, 6)
    )
    assert_close(found, expected, 1e-6)


# ---------------------------------------------------------------------- nothing else changes
class Busy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(nn.functional.dropout(x, 0.5, self.training))


def test_the_module_is_used_once_as_far_as_it_can_tell() -> None:
    model = Busy()
    torch.manual_seed(5)
    per_example_gradients(model, squares, numbers(B, 6))
    assert model.calls == 1
    after = torch.get_rng_state()
    torch.manual_seed(5)
    squares(model, numbers(B, 6))
    assert torch.equal(torch.get_rng_state(), after)


def test_gradients_that_are_there_stay() -> None:
    model = network()
    kept = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    per_example_gradients(model, squares, numbers(B, 6))
    clipped_gradient_sum(model, squares, numbers(B, 6), 1.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept[name]
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_works_within_no_grad() -> None:
    model = network()
    with torch.no_grad():
        found = per_example_gradients(model, squares, numbers(B, 6))
        assert not torch.is_grad_enabled()
    assert_close(found, loop_gradients(model, squares, numbers(B, 6)), 1e-5)


# ---------------------------------------------------------------------- bad input
BAD_BATCHES: dict[str, Any] = {
    "different sizes": (numbers(5, 6), numbers(4, 2)),
    "no tensor": ["a", 1],
    "no dimension": torch.tensor(1.0),
    "no row": numbers(0, 6),
}


@pytest.mark.parametrize("batch", BAD_BATCHES)
def test_batches_whose_rows_cannot_be_counted(batch: str) -> None:
    model = network()
    for call in (per_example_gradients, lambda *a: clipped_gradient_sum(*a, clip_norm=1.0)):
        with pytest.raises(ConfigurationError, match="led by the same number of examples"):
            call(model, squares, BAD_BATCHES[batch])
    assert_untouched(model)


@pytest.mark.parametrize(
    "units",
    [[0, 1], [1, 1, 1, 1, 1], [0, 0, 2, 2, 2], [[0]] * 5, [0, 0, 0, 0, -1], ["ann"] * 5, object()],
)
def test_units_that_are_not_numbered_from_zero(units: Any) -> None:
    with pytest.raises(ConfigurationError, match="numbered from 0 without gaps"):
        clipped_gradient_sum(network(), squares, numbers(B, 6), 1.0, units)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda model, x: model(x).square().mean(1), r"a loss of shape \(5,\)"),
        (lambda model, x: model(x).detach().mean(), "a loss without a gradient"),
        (lambda model, x: {"loss": model(x).mean()}, "Found: dict"),
        (lambda model, x: None, "Found: NoneType"),
    ],
    ids=["one for each row", "detached", "dictionary", "none"],
)
def test_losses_that_are_not_one_number_of_the_module(loss: Any, found: str) -> None:
    model = network()
    for call in (per_example_gradients, lambda *a: clipped_gradient_sum(*a, clip_norm=1.0)):
        with pytest.raises(ConfigurationError, match=found):
            call(model, loss, numbers(B, 6))
    assert_untouched(model)


def test_arguments_in_another_order() -> None:
    with pytest.raises(ConfigurationError, match="function for a module"):
        per_example_gradients(squares, network(), numbers(B, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_clip_norms_that_bound_nothing(clip_norm: float) -> None:
    with pytest.raises(ConfigurationError, match="clip_norm"):
        clipped_gradient_sum(network(), squares, numbers(B, 6), clip_norm)


def test_an_unknown_reduction() -> None:
    with pytest.raises(ConfigurationError, match="loss_reduction='none'"):
        per_example_gradients(network(), squares, numbers(B, 6), loss_reduction="none")


def test_a_module_without_trainable_parameters() -> None:
    model = network().requires_grad_(False)
    assert trainable(model) == {}
    with pytest.raises(ConfigurationError, match="Sequential has none"):
        per_example_gradients(model, squares, numbers(B, 6))
