"""Raw gradients and changed state are noticed, named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping.guards import LeakGuard, StateGuard
from lightning_privacy.errors import GuaranteeError
from tests.clipping.reference import numbers, squares

B = 4


# ---------------------------------------------------------------------- raw gradients
def test_a_raw_gradient_raises_names_the_parameter_and_is_dropped() -> None:
    model = nn.Linear(3, 2)
    with LeakGuard.watching({"layer.weight": model.weight}):
        with pytest.raises(GuaranteeError, match=r"raw gradient to layer\.weight"):
            squares(model, numbers(B, 3)).backward()
        assert model.weight.grad is None
    squares(model, numbers(B, 3)).backward()
    assert model.weight.grad is not None


def test_the_guard_goes_with_the_block_also_when_it_fails() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(KeyboardInterrupt), LeakGuard.watching({"weight": model.weight}):
        raise KeyboardInterrupt
    squares(model, numbers(B, 3)).backward()
    assert model.weight.grad is not None


def test_unwatched_parameters_get_their_gradients() -> None:
    model = nn.Linear(3, 2)
    guard = LeakGuard({"bias": model.bias})
    model.bias.requires_grad_(False)
    squares(model, numbers(B, 3)).backward()
    guard.remove()
    guard.remove()
    assert model.weight.grad is not None


# ---------------------------------------------------------------------- state
class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.inner = nn.Module()
        self.inner.register_buffer("average", torch.tensor([1.0, 2.0, float("nan")]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("low", torch.ones(5, dtype=torch.bfloat16))
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("transient", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)


def _reassign(m: Stateful, name: str, value: Tensor) -> None:
    setattr(m, name, value)


CHANGES: dict[str, tuple[Callable[[Stateful], object], str]] = {
    "in place": (lambda m: m.inner.average.mul_(0.9), "inner.average"),
    "an integer": (lambda m: m.count.add_(1), "count"),
    "a flag": (lambda m: m.flag.logical_not_(), "flag"),
    "reassigned": (lambda m: _reassign(m, "count", m.count + 1), "count"),
    "reassigned twice": (lambda m: [_reassign(m, "low", m.low * 2) for _ in range(2)], "low"),
    "removed": (lambda m: delattr(m, "count"), "count"),
    "set to None": (lambda m: _reassign(m, "count", None), "count"),
    "added": (lambda m: m.register_buffer("later", torch.zeros(1)), "later"),
    "resized": (lambda m: _reassign(m, "low", torch.ones(6, dtype=torch.bfloat16)), "low"),
    "a parameter in place": (lambda m: _without_gradient(m.layer.weight.mul_, 2), "layer.weight"),
    "a parameter's data replaced": (
        lambda m: setattr(m.layer.bias, "data", torch.ones(2)),
        "layer.bias",
    ),
    "a parameter's data replaced twice": (
        lambda m: [setattr(m.layer.bias, "data", m.layer.bias.data * 2) for _ in range(4)],
        "layer.bias",
    ),
}
THROUGH_DATA: dict[str, tuple[Callable[[Stateful], object], str]] = {
    "a parameter": (lambda m: m.layer.weight.data.mul_(1.001), "layer.weight"),
    "two entries exchanged": (
        lambda m: m.layer.bias.data.copy_(m.layer.bias.data.flip(0)),
        "layer.bias",
    ),
    "a buffer that holds NaN": (lambda m: m.inner.average.data[0].add_(1), "inner.average"),
    "an integer": (lambda m: m.count.data.add_(1), "count"),
    "a flag": (lambda m: m.flag.data.logical_not_(), "flag"),
    "low precision": (lambda m: m.low.data[3].add_(1), "low"),
    "the sign of zero": (lambda m: m.wave.data.mul_(-1), "wave"),
}


def _without_gradient(function: Callable[..., Tensor], *arguments: object) -> None:
    with torch.no_grad():
        function(*arguments)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found_and_named(change: str, values: bool) -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot(values=values)
    guard.verify("before")
    act, name = CHANGES[change]
    act(module)
    with pytest.raises(GuaranteeError, match=f"changed during a test: {name}\n") as caught:
        guard.verify("during a test")
    assert name in caught.value.found.split(": ")[1].split(", ")
    assert "independent_buffers" in caught.value.remedy
    guard.snapshot(values=values)
    guard.verify("afterwards")


@pytest.mark.parametrize("change", THROUGH_DATA)
def test_writes_through_data_are_found_when_values_are_compared(change: str) -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot(values=True)
    act, name = THROUGH_DATA[change]
    act(module)
    with pytest.raises(GuaranteeError, match=name):
        guard.verify("during a test")


@pytest.mark.parametrize("change", THROUGH_DATA)
def test_writes_through_data_into_small_tensors_are_found_at_every_step(change: str) -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot()
    guard.verify("before")
    act, name = THROUGH_DATA[change]
    act(module)
    with pytest.raises(GuaranteeError, match=f"changed during a test: {name}\n"):
        guard.verify("during a test")
    guard.snapshot()
    guard.verify("afterwards")


def test_small_tensors_are_compared_with_what_was_declared_left_out() -> None:
    module = Stateful()
    module.large = nn.Parameter(torch.zeros(5000))
    guard = StateGuard(module, ["inner.*"])
    guard.snapshot()
    module.inner.average.data += 1
    module.large.data += 1
    guard.verify("in between")
    module.count = torch.tensor(0)
    guard.snapshot()
    module.count.data += 1
    with pytest.raises(GuaranteeError, match=": count\n"):
        guard.verify("after another tensor came")


def test_a_module_in_the_place_of_another_is_found_and_watched_from_then_on() -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot()
    module.layer = nn.Linear(3, 2)
    with pytest.raises(GuaranteeError, match=r": layer\.bias, layer\.weight\n"):
        guard.verify("during a test")
    guard.snapshot()
    guard.verify("afterwards")
    module.layer.register_buffer("queue", torch.zeros(2))
    with pytest.raises(GuaranteeError, match=r": layer\.queue\n"):
        guard.verify("during a test")


@pytest.mark.parametrize("values", [True, False])
def test_a_table_of_buffers_in_the_place_of_another_is_found(values: bool) -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot(values=values)
    module.inner._buffers = {"average": torch.zeros(3), "more": torch.zeros(1)}
    with pytest.raises(GuaranteeError, match=r": inner\.average, inner\.more\n"):
        guard.verify("during a test")
    guard.snapshot()
    with pytest.raises(GuaranteeError, match=r": inner\.more\n"):
        module.inner._buffers["more"] += 1
        guard.verify("during a test")


def test_what_is_held_is_what_the_module_holds_now() -> None:
    module = Stateful()
    guard = StateGuard(module)

    def same() -> bool:
        places = [*map(id, guard.held())], [*map(id, guard.held(anew=True))]
        tensors = [*module.parameters(), *module.buffers()]
        return all(sorted(found) == sorted(map(id, tensors)) for found in places)

    assert same()
    module.count = None
    module.inner.register_buffer("later", torch.zeros(1))
    assert same()
    module.inner.add_module("deeper", nn.Linear(2, 2))
    assert same()
    module.inner.deeper = None
    assert same()
    del module.layer
    assert same()


def test_one_look_serves_what_follows_it() -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot()
    guard.verify("at once", guard.held())
    module.count += 1
    with pytest.raises(GuaranteeError, match=": count\n"):
        guard.verify("during a test", guard.held())


def test_what_is_not_saved_is_watched_too() -> None:
    # A queue that later forwards read carries examples into the gradients of others.
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot()
    module.transient += 1
    with pytest.raises(GuaranteeError, match="transient"):
        guard.verify("during a test")


def test_what_is_no_state_is_ignored() -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot(values=True)
    module.train(False)
    squares(module.layer, numbers(B, 3)).backward()
    guard.verify("during a test")


@pytest.mark.parametrize("patterns", [["inner.average", "count"], ["*average", "cou*"], ["*"]])
def test_declared_independent_buffers_are_ignored(patterns: list[str]) -> None:
    module = Stateful()
    guard = StateGuard(module, patterns)
    guard.snapshot(values=True)
    module.inner.average += 1
    module.count = module.count + 1
    guard.verify("during a test")
    if patterns != ["*"]:
        module.low += 1
        with pytest.raises(GuaranteeError, match="low"):
            guard.verify("during a test")


def test_all_changes_are_named_at_once() -> None:
    module = Stateful()
    guard = StateGuard(module)
    guard.snapshot()
    module.count += 1
    module.low += 1
    with pytest.raises(GuaranteeError, match="count, low"):
        guard.verify("during a test")


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)],
    ids=["batch", "instance"],
)
def test_running_statistics_are_found(layer: nn.Module) -> None:
    guard = StateGuard(layer)
    guard.snapshot(values=True)
    layer(numbers(B, 3, 5))
    with pytest.raises(GuaranteeError, match="running_mean, running_var"):
        guard.verify("during a training step")
    layer.eval()
    guard.snapshot(values=True)
    layer(numbers(B, 3, 5))
    guard.verify("during a training step")


def test_spectral_normalisation_moves_its_vectors() -> None:
    # The guard believes a declaration. This one would be wrong: they move once for each
    # micro-batch, whose number depends on the draw. The check of independence refuses them.
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    for declared in ([], ["parametrizations.weight.*"]):
        guard = StateGuard(layer, declared)
        guard.snapshot()
        layer(numbers(B, 3))
        if declared:
            guard.verify("during a training step")
        else:
            with pytest.raises(GuaranteeError, match=r"parametrizations\.weight\.0\._u"):
                guard.verify("during a training step")
