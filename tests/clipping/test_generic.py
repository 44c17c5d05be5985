"""Operations without a rule: exact by mapping over the rows, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import Sketch, assert_exact, numbers, squares, tokens

B = 4
LENGTHS = [3, B, 2 * B]
Forward = Callable[[Any, Tensor], Tensor]

# What meets a batch [B, T, 6], with the parts that it needs.
SKETCHES: dict[str, tuple[Forward, dict[str, Any]]] = {
    "matmul": (lambda m, x: x @ m.w, {"w": (6, 3)}),
    "matmul from the left": (lambda m, x: m.w @ x.transpose(1, 2), {"w": (3, 6)}),
    "matmul with a vector": (lambda m, x: x @ m.v, {"v": (6,)}),
    "mixing of positions": (
        lambda m, x: m.w[: x.shape[1], : x.shape[1]].tril() @ x,
        {"w": (9, 9)},
    ),
    "bmm with an expanded weight": (
        lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)),
        {"w": (6, 3)},
    ),
    "einsum": (lambda m, x: torch.einsum("btd,kd->btk", x, m.w), {"w": (3, 6)}),
    "einsum of three": (
        lambda m, x: torch.einsum("btd,dke,bte->bk", x, m.w, x),
        {"w": (6, 3, 6)},
    ),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), {"w": (6, 3)}),
    "class token": (lambda m, x: torch.cat((m.c.expand(len(x), -1, -1), x), 1), {"c": (1, 1, 6)}),
    "class token by repeat": (
        lambda m, x: torch.cat((m.c.repeat(len(x), 1, 1), x), 1),
        {"c": (1, 6)},
    ),
    "class token as another": (
        lambda m, x: torch.cat((m.c.expand_as(x[:, :1]), x), 1),
        {"c": (1, 1, 6)},
    ),
    "expand to a shape": (lambda m, x: x * m.p.expand(x.shape), {"p": (6,)}),
    "broadcast_to": (lambda m, x: x * torch.broadcast_to(m.p, x.shape), {"p": (6,)}),
    "broadcast_tensors": (lambda m, x: torch.broadcast_tensors(x, m.p)[1] * x, {"p": (6,)}),
    "slices": (lambda m, x: x * m.p[..., 0, :6] + m.p[1, 3:], {"p": (2, 9)}),
    "slices with None": (lambda m, x: x * m.p[None, :, None][0, 0], {"p": (6,)}),
    "selection by ids": (lambda m, x: x + m.p[torch.arange(x.shape[1])], {"p": (9, 6)}),
    "index_select": (lambda m, x: x + m.p.index_select(0, torch.arange(x.shape[1])), {"p": (9, 6)}),
    "gather": (
        lambda m, x: x + m.p.gather(0, torch.zeros(x.shape[1], 6, dtype=torch.long)),
        {"p": (9, 6)},
    ),
    "iteration": (lambda m, x: sum(x * row for row in m.p), {"p": (3, 6)}),
    "unpacking": (lambda m, x: (lambda a, b: x * a + b)(*m.p), {"p": (2, 6)}),
    "chunk and split": (
        lambda m, x: x * m.p.chunk(2)[0] + m.p.split(6)[1] + m.p.unflatten(0, (2, 6)).unbind()[0],
        {"p": (12,)},
    ),
    "transpose": (lambda m, x: x @ m.w.T + x @ m.w.transpose(0, 1) + x @ m.w.mT, {"w": (3, 6)}),
    "permute and reshape": (
        lambda m, x: x @ m.w.permute(1, 0, 2).reshape(6, 6).view(-1).view(6, 6),
        {"w": (3, 2, 6)},
    ),
    "stack": (lambda m, x: x @ torch.stack((m.a, m.b), 1), {"a": (6,), "b": (6,)}),
    "outer": (lambda m, x: x @ torch.outer(m.a, m.b), {"a": (6,), "b": (3,)}),
    "reductions": (
        lambda m, x: x * m.p.mean(0) / m.p.norm() + m.p.std() + m.p.amax(0),
        {"p": (3, 6)},
    ),
    "softmax of a parameter": (lambda m, x: x * m.p.softmax(-1), {"p": (6,)}),
    "cumulative": (lambda m, x: x * m.p.cumsum(0) + m.p.flip(0), {"p": (6,)}),
    "clamp and sign": (lambda m, x: x * m.p.clamp(-1, 1) + m.p.abs().sqrt(), {"p": (6,)}),
    "clone": (lambda m, x: x * m.p.clone().contiguous(), {"p": (6,)}),
    "interpolation": (
        lambda m, x: x + F.interpolate(m.p, size=x.shape[1], mode="linear").transpose(1, 2),
        {"p": (1, 6, 3)},
    ),
    "padding": (lambda m, x: x * F.pad(m.p, (2, 1)), {"p": (3,)}),
    "normalisation of a weight": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), {"w": (3, 6)}),
    "cosine similarity": (lambda m, x: F.cosine_similarity(x, m.p, dim=-1), {"p": (6,)}),
    "distances": (lambda m, x: torch.cdist(x, m.p), {"p": (5, 6)}),
    "loss with a target": (
        lambda m, x: F.mse_loss(x, m.p.expand_as(x), reduction="none"),
        {"p": (6,)},
    ),
    "scatter": (
        lambda m, x: x.index_add(1, torch.tensor([0, 1]), m.p.expand(len(x), 2, -1)),
        {"p": (6,)},
    ),
    "written into a slice": (lambda m, x: _written(x.clone(), m.p), {"p": (6,)}),
    "written into a new tensor": (lambda m, x: _written(torch.zeros_like(x), m.p) + x, {"p": (6,)}),
    "in-place arithmetic": (lambda m, x: x.clone().mul_(m.p).sub_(m.p), {"p": (6,)}),
    "prelu": (lambda m, x: m.act(x.transpose(1, 2)), {"act": nn.PReLU(6)}),
    "prelu with one slope": (lambda m, x: m.act(x), {"act": nn.PReLU()}),
    "bilinear": (lambda m, x: m.both(x, x.flip(2)), {"both": nn.Bilinear(6, 6, 3)}),
    "a chain longer than the probe looks ahead": (
        lambda m, x: F.linear(x.transpose(0, 1), _long(m.w)).transpose(0, 1),
        {"w": (6, 6)},
    ),
    "a polynomial of one weight": (
        lambda m, x: x @ m.w @ m.w + x @ (m.w @ m.w).tanh() + x @ m.w.t(),
        {"w": (6, 6)},
    ),
    "matrix exponential": (lambda m, x: x @ torch.linalg.matrix_exp(m.w - m.w.t()), {"w": (6, 6)}),
}


def _written(x: Tensor, p: Tensor) -> Tensor:
    x[:, :1] = p
    x[:, 1, :3] += p[:3]
    return x


def _long(p: Tensor) -> Tensor:
    for _ in range(15):
        p = p * 1.01
    return p


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SKETCHES)
def test_mapped_over_the_rows(name: str, length: int) -> None:
    forward, parts = SKETCHES[name]
    assert_exact(Sketch(forward, **parts), squares, numbers(B, length, 6))


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrised_weights(kind: Callable[[nn.Module], nn.Module]) -> None:
    assert_exact(nn.Sequential(kind(nn.Linear(6, 4))), squares, numbers(B, 3, 6))


def test_cells() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 5)
        memory = hidden
        for step in x.unbind(1):
            hidden = m.gru(step, m.elman(step, hidden))
            hidden, memory = m.lstm(step, (hidden, memory))
        return hidden

    model = Sketch(forward, gru=nn.GRUCell(6, 5), lstm=nn.LSTMCell(6, 5), elman=nn.RNNCell(6, 5))
    assert_exact(model, squares, numbers(B, 3, 6))


def test_a_parameter_used_by_two_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6))
    model[2].weight = model[0].weight
    model[3].bias = model[2].bias
    assert_exact(model, squares, numbers(B, 3, 6))


def test_ids_of_each_row_select_from_a_parameter() -> None:
    model = Sketch(
        lambda m, ids: m.table[ids] * m.scale[ids, 0, None], table=(11, 6), scale=(11, 2)
    )
    assert_exact(model, squares, tokens(B, 5))


def test_targets_of_each_row_select_a_class() -> None:
    def loss(m: Sketch, batch: dict[str, Tensor]) -> Tensor:
        scores = F.linear(batch["x"], m.classes)
        return F.nll_loss(scores.log_softmax(-1), batch["y"], weight=None, reduction="mean")

    batch = {"x": numbers(B, 6), "y": tokens(B, below=3)}
    assert_exact(Sketch(lambda m, b: b, classes=(3, 6)), loss, batch)


def test_a_penalty_on_expressions() -> None:
    def loss(m: Sketch, x: Tensor) -> Tensor:
        low_rank = m.left @ m.right
        gram = low_rank.t() @ low_rank - torch.eye(6, dtype=x.dtype)
        return squares(m, x) + 0.1 * gram.square().sum() + 0.01 * m.left.abs().sum()

    model = Sketch(lambda m, x: x @ (m.left @ m.right), left=(6, 2), right=(2, 6))
    assert_exact(model, loss, numbers(B, 3, 6))


# ---------------------------------------------------------------------- refusals
REFUSALS: dict[str, tuple[Forward, str]] = {
    "an expression in place": (lambda m, x: x * (m.w + 1).mul_(2.0)[0], "in place"),
    "written into an expression": (
        lambda m, x: x * _written(m.w[None] + 0, m.w[0])[0, 0],
        "in place",
    ),
    "a shape that depends on values": (lambda m, x: x * m.w[m.w > 0].sum(), "vmap"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_mapped_is_refused_by_name(name: str) -> None:
    forward, why = REFUSALS[name]
    model = Sketch(forward, w=(2, 6))
    with pytest.raises(UnsupportedOperationError, match=why) as caught:
        per_example_gradients(model, squares, numbers(B, 3, 6))
    assert " on w: " in caught.value.found
    assert "freeze" in caught.value.remedy


def test_a_reduction_over_the_batch_is_refused_by_name() -> None:
    model = Sketch(lambda m, x: x + torch.einsum("btd,d->t", x, m.w)[:, None], w=(6,))
    with pytest.raises(UnsupportedOperationError, match=r"einsum on w: .*reduces over the batch"):
        per_example_gradients(model, squares, numbers(B, 3, 6))


def test_an_unknown_operation_whose_arguments_are_not_led_by_rows_is_refused() -> None:
    model = Sketch(lambda m, x: x @ m.w, w=(6, 3))
    with Capture(dict(model.named_parameters()), rows=B).opened():
        with pytest.raises(UnsupportedOperationError, match="not led by the rows"):
            model(numbers(5, B, 6))


@pytest.mark.parametrize(("layer", "remedy"), [("batch_norm", "GroupNorm")])
def test_remedies_by_operation(layer: str, remedy: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    with pytest.raises(UnsupportedOperationError, match=remedy):
        per_example_gradients(model, squares, numbers(B, 6))


def test_no_warning_about_slow_batching_rules() -> None:
    model = Sketch(lambda m, x: x * torch.renorm(m.w, 2, 0, 1.0)[0], w=(4, 6))
    assert_exact(model, squares, numbers(B, 6))


@pytest.mark.parametrize("how", ["scaled", "by position"])
def test_a_batch_mean_that_meets_parameters_is_refused_by_name(how: str) -> None:
    def scaled(m: Sketch, x: Tensor) -> Tensor:
        # Learnt loss weights: the mean over the batch is taken too early.
        return torch.exp(-m.log_scale) * squares(m.layer, x) + m.log_scale

    def by_position(m: Sketch, x: Tensor) -> Tensor:
        hidden = m.layer(x)
        return (hidden + hidden.mean(0) * m.log_scale).square().mean()

    model = Sketch(lambda m, x: x, layer=nn.Linear(6, 3), log_scale=())
    with pytest.raises(UnsupportedOperationError, match=r"log_scale.*a mean over the batch"):
        per_example_gradients(model, scaled if how == "scaled" else by_position, numbers(B, 6))


def test_learnt_loss_weights_on_each_example_s_own_loss() -> None:
    def loss(m: Sketch, x: Tensor) -> Tensor:
        each = m.layer(x).square().mean(1)
        return (torch.exp(-m.log_scale) * each + m.log_scale).mean()

    model = Sketch(lambda m, x: x, layer=nn.Linear(6, 3), log_scale=())
    assert_exact(model, loss, numbers(B, 6))


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_the_same_operation_on_the_same_parameters_in_other_roles(rows: int) -> None:
    # Once among parameters, once with the batch: learning the first must not decide the second.
    model = Sketch(lambda m, x: x @ (m.a @ m.b).tanh() + m.a[:6, 0], a=(6, 2), b=(2, 6))
    assert_exact(model, squares, numbers(rows, 6))


def test_a_constant_first_and_the_batch_in_a_later_round() -> None:
    bank = numbers(7, 6, seed=3)

    def forward(m: Sketch, x: Tensor) -> Tensor:
        return (x @ m.w.exp()) @ (bank.to(x.dtype) @ m.w).t()

    assert_exact(Sketch(forward, w=(6, 6)), squares, numbers(B, 6))
