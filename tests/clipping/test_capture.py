"""The tag on a parameter: what it sees, what it leaves alone, and that it always comes off."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.tagging import RowTensor, TaggedParameter
from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from tests.clipping.reference import (
    Sketch,
    assert_exact,
    assert_untouched,
    loop_gradients,
    numbers,
    squares,
)

B = 3


def capture_of(module: nn.Module, rows: int = B) -> Capture:
    return Capture(dict(module.named_parameters()), rows=rows)


# ---------------------------------------------------------------------- the tag comes off
def test_the_class_is_switched_while_open_and_back_afterwards() -> None:
    layer = nn.Linear(3, 2)
    with capture_of(layer).opened():
        assert type(layer.weight) is TaggedParameter
        assert isinstance(layer.weight, nn.Parameter)
        assert list(layer.state_dict()) == ["weight", "bias"]
    assert_untouched(layer)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [per_example_gradients, clipped_gradient_sum])
def test_restored_after_any_exception(call: Callable[..., Any], kind: type[BaseException]) -> None:
    layer = nn.Linear(3, 2)
    calls = 0

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0 or len(x) == B:
            raise kind
        return squares(module, x)

    options = {"clip_norm": 1.0} if call is clipped_gradient_sum else {}
    with pytest.raises(kind):
        call(layer, loss, numbers(B, 3), **options)
    assert_untouched(layer)
    assert_exact(layer, squares, numbers(B, 3))


def test_restored_after_an_exception_in_backward() -> None:
    layer = nn.Linear(3, 2)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        output = module(x)
        output.register_hook(_interrupt)
        return output.sum(1).mean()

    with pytest.raises(KeyboardInterrupt):
        per_example_gradients(layer, loss, numbers(1, 3))
    assert_untouched(layer)


def _interrupt(gradient: Tensor) -> None:
    raise KeyboardInterrupt


def test_closing_twice_and_never_opening() -> None:
    layer = nn.Linear(3, 2)
    first, second = capture_of(layer), capture_of(layer)
    second.close()
    first.open()
    second.close()  # not the one that is open: it must not take the tags off
    assert type(layer.weight) is TaggedParameter
    first.close()
    first.close()
    assert_untouched(layer)


def test_one_capture_at_a_time() -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    inner = capture_of(other)
    with capture_of(layer).opened():
        with pytest.raises(GuaranteeError, match="second capture"):
            inner.open()
        assert type(layer.weight) is TaggedParameter
    assert_untouched(layer)
    assert_untouched(other)


@pytest.mark.parametrize("lazy", [True, False])
def test_parameters_that_are_not_plain_are_refused(lazy: bool) -> None:
    module: nn.Module = nn.LazyLinear(2) if lazy else nn.Linear(3, 2)
    if not lazy:
        module.weight.__class__ = type("Quantised", (nn.Parameter,), {})
    with pytest.raises(ConfigurationError, match="weight is a"):
        Capture(dict(module.named_parameters()), rows=B)


def test_complex_parameters_are_refused_and_their_parts_are_exact() -> None:
    def spectrum(module: Any, x: Tensor) -> Tensor:
        return (torch.fft.fft(x) * torch.view_as_complex(module.filter)).abs()

    batch = numbers(B, 4).double()
    assert_exact(Sketch(spectrum, filter=(4, 2)), squares, batch)
    whole = Sketch(lambda module, x: (torch.fft.fft(x) * module.filter).abs(), filter=(4,))
    whole.filter = nn.Parameter(whole.filter.to(torch.complex128))
    with pytest.raises(ConfigurationError, match="complex128"):
        per_example_gradients(whole, squares, batch)


# ---------------------------------------------------------------------- copies while it is open
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_made_while_open_are_plain(how: str) -> None:
    layer = nn.Linear(3, 2)
    with capture_of(layer).opened():
        copied = _copied(layer, how)
        assert type(layer.weight) is TaggedParameter
    assert_exact(layer, squares, numbers(B, 3))
    layer.float()
    if isinstance(copied, nn.Module):
        assert copied.weight.requires_grad
        assert_untouched(copied)
        assert torch.equal(copied.weight, layer.weight)
        assert_exact(copied, squares, numbers(B, 3))
    else:
        assert all(type(value) is Tensor for value in copied.values())


def _copied(layer: nn.Module, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    stream = io.BytesIO()
    torch.save(layer if how == "torch.save" else layer.state_dict(), stream)
    stream.seek(0)
    return torch.load(stream, weights_only=how == "state_dict")


# ---------------------------------------------------------------------- questions
QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda p: (p.shape, p.size(), p.size(0), p.dim(), p.numel(), len(p), p.stride()),
    "type": lambda p: (p.dtype, p.device, p.type(), p.is_cuda, p.layout, p.is_floating_point()),
    "graph": lambda p: (p.requires_grad, p.grad, p.grad_fn, p.is_leaf),
    "text": lambda p: (len(repr(p)) > 5, f"{p.detach().sum():.2f}"),
    "values": lambda p: (float(p.detach()[0]), p.detach().tolist(), p.detach().numpy().shape),
    "truth": lambda p: (
        bool((p == p).all()),
        bool(torch.isfinite(p).all()),
        p[0].item() == p[0].item(),
    ),
    "equality": lambda p: (torch.equal(p, p), torch.allclose(p, p)),
    "like": lambda p: (torch.zeros_like(p).shape, p.new_zeros(2).dtype, torch.empty_like(p).shape),
    "data": lambda p: p.data.shape,
    "hash": lambda p: {p: 1}[p],
    "no gradient": lambda p: _norm_without_gradient(p),
}


def _norm_without_gradient(p: Tensor) -> float:
    with torch.no_grad():
        return round(float((p * 2).norm()), 6)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("expression", [False, True])
def test_questions_get_the_ordinary_answer(question: str, expression: bool) -> None:
    expected: list[Any] = []
    found: list[Any] = []

    def forward(m: Sketch, x: Tensor) -> Tensor:
        about = (m.p + 1)[1:] if expression else m.p
        answers = expected if type(m.p) is nn.Parameter else found
        if question != "graph" or not expression:
            answers.append(QUESTIONS[question](about))
        return x * m.p

    model = Sketch(forward, p=(3,))
    squares(model, numbers(B, 3))
    per_example_gradients(model, squares, numbers(B, 3))
    assert all(answer == expected[0] for answer in found)
    assert len(found) >= 3 or (question == "graph" and expression)


def test_conversion_by_type_is_not_a_question() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        converted = m.p.type(torch.float64).to(x.dtype)
        return x * converted.to(x.device) + m.p.type_as(x) * m.p.to(x)

    assert_exact(Sketch(forward, p=(3,)), squares, numbers(B, 3))


def test_data_and_detached_values_carry_no_gradient() -> None:
    model = Sketch(lambda m, x: x * m.p * m.p.data + m.p.detach().sum() * x, p=(3,))
    assert_exact(model, squares, numbers(B, 3))


# ---------------------------------------------------------------------- what cannot be kept apart
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


def test_a_custom_function_on_a_parameter_raises_and_names_it() -> None:
    model = Sketch(lambda m, x: _Product.apply(x * m.scale, m.hidden), hidden=(3, 2), scale=(3,))
    with pytest.raises(GuaranteeError, match=r"raw gradient to hidden") as caught:
        per_example_gradients(model, squares, numbers(B, 3))
    assert "custom autograd.Function" in str(caught.value)
    assert_untouched(model)


def test_a_custom_function_on_an_expression_raises_and_names_its_parameters() -> None:
    model = Sketch(
        lambda m, x: _Product.apply(x, (m.left * m.right).t()), left=(2, 3), right=(2, 3)
    )
    with pytest.raises(GuaranteeError, match="expression of left, right"):
        per_example_gradients(model, squares, numbers(B, 3))
    assert_untouched(model)


def test_a_custom_function_on_activations_alone_is_exact() -> None:
    model = Sketch(
        lambda m, x: _Product.apply(m.layer(x), torch.ones(2, 2, dtype=x.dtype)),
        layer=nn.Linear(3, 2),
    )
    assert_exact(model, squares, numbers(B, 3))


def test_an_inner_gradient_of_a_parameter_is_refused() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        inner = m.layer(x).square().mean()
        gradient = torch.autograd.grad(inner, m.layer.weight, create_graph=True)[0]
        return F.linear(x, m.layer.weight - 0.1 * gradient)

    with pytest.raises(UnsupportedOperationError, match=r"grad on layer\.weight"):
        per_example_gradients(Sketch(forward, layer=nn.Linear(3, 2)), squares, numbers(B, 3))


def test_an_inner_gradient_of_the_input_is_refused() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        penalty = torch.autograd.grad(m.layer(x).square().sum(), x, create_graph=True)[0]
        return m.layer(x) + penalty.square().sum(1, keepdim=True)

    model = Sketch(forward, layer=nn.Linear(3, 2))
    with pytest.raises(
        UnsupportedOperationError, match=r"backward inside the forward reached layer"
    ):
        per_example_gradients(model, squares, numbers(B, 3))
    assert_untouched(model)


def test_a_backward_in_the_forward_is_refused() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        m.layer(x).sum().backward()
        return m.layer(x)

    with pytest.raises(UnsupportedOperationError, match="own backward only"):
        per_example_gradients(Sketch(forward, layer=nn.Linear(3, 2)), squares, numbers(B, 3))


def test_compiled_code_cannot_swallow_an_expression() -> None:
    layer = nn.Linear(3, 2)
    with capture_of(layer).opened():
        turned = layer.weight.t()
        assert isinstance(turned, RowTensor)
        with pytest.raises(UnsupportedOperationError, match="reached a parameter expression"):
            with torch._C.DisableTorchFunctionSubclass():
                torch.mm(numbers(B, 3), turned)


# ---------------------------------------------------------------------- the loss
def test_a_loss_without_any_data() -> None:
    model = Sketch(lambda m, x: m.p, p=(3,))
    found = per_example_gradients(model, lambda m, x: m.p.square().sum(), numbers(B, 3))
    torch.testing.assert_close(found["p"], 2 * model.p.detach().expand(B, -1))


@pytest.mark.parametrize("how", ["method", "function"])
def test_a_loss_with_a_penalty_on_the_weights(how: str) -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in m.parameters())
        return squares(m, x) + 0.1 * penalty

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if how == "method":
        assert_exact(model, loss, numbers(B, 3))
        return
    capture = capture_of(model)
    expected = loop_gradients(model, loss, numbers(B, 3))
    with capture.opened():
        value = loss(model, numbers(B, 3))
        capture.armed = True
        torch.autograd.backward(capture.collapse(value))
    for name, items in capture.collect().items():
        shape = expected[name].shape[1:]
        found = sum(item.dense(shape) for item in items)
        torch.testing.assert_close(found * B, expected[name], rtol=1e-4, atol=1e-6)


def test_a_parameter_that_no_row_reaches() -> None:
    model = Sketch(lambda m, x: m.used(x), used=nn.Linear(3, 2), unused=nn.Linear(3, 2))
    capture = capture_of(model)
    with capture.opened():
        loss = squares(model, numbers(B, 3))
        capture.armed = True
        loss.backward()
    assert set(capture.collect()) == {"used.weight", "used.bias"}
    assert capture.collect() == {}


def test_frozen_parameters_are_never_tagged() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda m, *_: seen.append(type(m.weight)))
    assert_exact(model, squares, numbers(B, 3))
    assert set(seen) == {nn.Parameter}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_penalty_beside_checkpointed_blocks(reentrant: bool) -> None:
    # The loss is an expression of parameters then, and its backward must not switch the tags off.
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        hidden = checkpoint(m, x.clone().requires_grad_(), use_reentrant=reentrant)
        return hidden.square().mean() + 0.1 * sum(p.square().sum() for p in m.parameters())

    assert_exact(model, loss, numbers(B, 3))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("length", [2, B, 2 * B])
def test_time_comes_first_in_checkpointed_blocks(length: int, reentrant: bool) -> None:
    block = Sketch(
        lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1) * m.scale + m.table[:length],
        layer=nn.Linear(3, 3),
        scale=(3,),
        table=(9, 3),
    )

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        hidden = checkpoint(m, x.clone().requires_grad_(), use_reentrant=reentrant)
        return hidden.square().mean() + hidden.sin().mean()

    assert_exact(block, loss, numbers(B, length, 3))
