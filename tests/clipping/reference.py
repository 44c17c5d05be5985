"""What captured gradients are compared with: one example at a time, clipped by hand.

The models in the tests are used as they are. `in_double` undoes the conversions to float32 inside
them, so that a comparison in float64 is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.noise import GaussianNoise, secret_from_seed
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.step import PrivateStep
from lightning_privacy.types import LossReduction

LossFunction = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor]

DOUBLE, SINGLE = 1e-9, 1e-5
CLIP_NORM = 0.5


@contextmanager
def in_double() -> Iterator[None]:
    """Context in which a conversion of numbers to float32 is one to float64.

    Torch's own functions are replaced: a mode would not reach what checkpointing computes again.
    """
    convert, softmax = Tensor.to, F.softmax

    def to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if tensor.is_floating_point():
            arguments = tuple(map(_doubled, arguments))
            named = {name: _doubled(value) for name, value in named.items()}
        return convert(tensor, *arguments, **named)

    def doubled_softmax(*arguments: Any, dtype: torch.dtype | None = None, **named: Any) -> Tensor:
        return softmax(*arguments, dtype=_doubled(dtype), **named)

    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(Tensor, "to", to),
        mock.patch.object(F, "softmax", doubled_softmax),
    ):
        yield


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Sketch(nn.Module):
    """A module from its forward and its parts: shapes become parameters, modules stay modules."""

    def __init__(
        self, forward: Callable[[Any, Any], Tensor], **parts: nn.Module | tuple[int, ...]
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, part in parts.items():
            made = torch.randn(part, generator=generator) if isinstance(part, tuple) else part
            setattr(self, name, nn.Parameter(made) if isinstance(part, tuple) else made)
        self.function = forward

    def forward(self, batch: Any) -> Tensor:
        return self.function(self, batch)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, below: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def size_of(batch: Any) -> int:
    return next(t.shape[0] for t in tree_flatten(batch)[0] if isinstance(t, Tensor))


def rows_of(batch: Any, rows: Sequence[int]) -> Any:
    return tree_map_only(Tensor, lambda t: t[list(rows)], batch)


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def plain_gradient(module: nn.Module, loss_fn: LossFunction, batch: Any) -> Gradients:
    """Autograd's own gradient of the whole batch."""
    module.zero_grad(set_to_none=True)
    loss_fn(module, batch).backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
        for name, p in trainable(module).items()
    }
    module.zero_grad(set_to_none=True)
    return found


def loop_gradients(module: nn.Module, loss_fn: LossFunction, batch: Any) -> Gradients:
    """By parameter name ``[B, *shape]``: each example in a batch of its own."""
    alone = [plain_gradient(module, loss_fn, rows_of(batch, [i])) for i in range(size_of(batch))]
    return {name: torch.stack([one[name] for one in alone]) for name in alone[0]}


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """``[B]`` over all parameters."""
    squares = [g.double().reshape(len(g), -1).square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def norm(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(float(g.double().square().sum()) for g in gradients.values())) ** 0.5


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return norm({name: first[name].double() - second[name].double() for name in second})


def by_unit(gradients: Mapping[str, Tensor], units: Sequence[int]) -> Gradients:
    """Means over the rows of each unit."""
    index = torch.tensor(units)
    count = int(index.max()) + 1
    return {
        name: torch.stack([g[index == unit].mean(0) for unit in range(count)])
        for name, g in gradients.items()
    }


def clipped_by_hand(gradients: Mapping[str, Tensor], clip_norm: float) -> Gradients:
    factors = (clip_norm / norms_of(gradients)).clamp(max=1.0)
    return {name: torch.tensordot(factors.to(g.dtype), g, 1) for name, g in gradients.items()}


def relative_error(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    vanishing: Collection[str] = (),
) -> dict[str, float]:
    """By parameter, on the scale of its gradient or of a thousandth of the whole.

    What vanishes in exact arithmetic, such as a bias before a normalisation, is a difference of
    rounding errors of the others: it is compared on the scale of the whole.
    """
    whole = norm(expected)
    errors = {}
    for name, value in expected.items():
        least = 1.0 if name in vanishing else 1e-3
        size = max(float(value.double().norm()), least * whole, 1e-300)
        errors[name] = float((found[name].double() - value.double()).norm()) / size
    return errors


def assert_close(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    vanishing: Collection[str] = (),
) -> None:
    assert found.keys() == expected.keys()
    errors = relative_error(found, expected, vanishing)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative error above {tolerance}: {wrong}"


def assert_untouched(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert type(parameter) is nn.Parameter, name
        assert parameter.grad is None, name


def assert_gradients(
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    tolerance: float,
    vanishing: Collection[str] = (),
) -> Gradients:
    """Captured per-example gradients equal the loop's; returns the loop's."""
    expected = loop_gradients(module, loss_fn, batch)
    assert norm(expected) > 0
    found = per_example_gradients(module, loss_fn, batch)
    assert_close(found, expected, tolerance, vanishing)
    assert_untouched(module)
    return expected


def assert_sums(
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    expected: Gradients,
    units: Sequence[int] | None = None,
    tolerance: float = DOUBLE,
) -> None:
    """The clipped sum equals that of the loop's gradients, and so do the norms."""
    own = expected if units is None else by_unit(expected, units)
    clip_norm = CLIP_NORM * float(norms_of(own).median()) or 1.0
    total, norms = clipped_gradient_sum(module, loss_fn, batch, clip_norm, units)
    torch.testing.assert_close(norms.double(), norms_of(own), rtol=tolerance, atol=0.0)
    assert difference(total, clipped_by_hand(own, clip_norm)) <= tolerance * clip_norm * len(norms)
    assert_untouched(module)


def assert_exact(module: nn.Module, loss_fn: LossFunction, batch: Any) -> None:
    """In float32 and float64: gradients; in float64 the clipped sum, also of units of several rows.

    Leaves the module in float64.
    """
    single, batch = to_dtype(batch, torch.float32), to_dtype(batch, torch.float64)
    # Through float32 first, so that both passes see the same values.
    expected = assert_gradients(module.float().double(), loss_fn, batch, DOUBLE)
    least = 1e-12 * norm(expected)
    vanishing = {name for name, value in expected.items() if float(value.norm()) < least}
    assert_gradients(module.float(), loss_fn, single, SINGLE, vanishing)
    module = module.double()
    assert_sums(module, loss_fn, batch, expected)
    rows = size_of(batch)
    units = [*range(1, rows - 2), 0, 0, 0] if rows > 2 else list(range(rows))
    assert_sums(module, loss_fn, batch, expected, units)


def squares(module: nn.Module, batch: Any) -> Tensor:
    """A loss that no example shares: the mean over examples of a mean of squares and a sum."""
    output = module(batch).flatten(1)
    return (output.square().mean(1) + output.sin().mean(1)).mean()


def plan_of(**changes: Any) -> PrivacyPlan:
    """A plan for tests: no noise, clip norm 1, public constant 1, unless changed."""
    settings: dict[str, Any] = {
        "relation": "add_or_remove",
        "sample_rate": 0.1,
        "expected_batch_size": 1.0,
        "noise_multiplier": 0.0,
        "clip_norm": 1.0,
        "steps": 10,
        "delta": 1e-5,
        "deterministic": True,
    }
    return PrivacyPlan(**{**settings, **changes})


def step_of(module: nn.Module, *, reduction: LossReduction = "mean", **changes: Any) -> PrivateStep:
    """A private step over all trainable parameters, with known noise."""
    return PrivateStep(
        parameters=trainable(module),
        plan=plan_of(**changes),
        noise=GaussianNoise(secret_from_seed(1)),
        loss_reduction=reduction,
    )


def learn_from(step: PrivateStep, module: nn.Module, loss_fn: LossFunction, batch: Any) -> None:
    """Learn the layouts from copies of the first row."""
    step.learn_layouts(lambda rows: loss_fn(module, rows_of(batch, [0] * rows)))


def run_micro_batch(
    step: PrivateStep,
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    weights: Sequence[float] | None = None,
) -> None:
    """One micro-batch through a private step; ends with its sums pending."""
    step.begin([1.0] * size_of(batch) if weights is None else weights)
    loss = loss_fn(module, batch)
    step.arm()
    loss.backward()
    step.end()


def clipped_sum_of(
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    weights: Sequence[float] | None = None,
    **changes: Any,
) -> Gradients:
    """The clipped sum over one micro-batch, as the private step computes it."""
    step = step_of(module, **changes)
    try:
        learn_from(step, module, loss_fn, batch)
        run_micro_batch(step, module, loss_fn, batch, weights)
        step.release(0)
        return {name: p.grad.clone() for name, p in step.parameters.items()}
    finally:
        step.close()
        module.zero_grad(set_to_none=True)
