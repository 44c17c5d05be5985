"""Modules that nobody listed: operations composed at random, compared with the loop.

A program is a list of steps on a batch ``[B, T, D]`` whose parameters come from a small pool, so
that they are shared between steps. ``T`` is drawn from sizes that equal, divide or are a multiple
of ``B``, so that no shape tells rows from positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_privacy.clipping import per_example_gradients
from tests.clipping.reference import (
    DOUBLE,
    assert_close,
    assert_sums,
    loop_gradients,
    numbers,
)

WIDTH, LONGEST, PLACES = 4, 10, 2
# Parameters by shape, PLACES of each; a step names a place.
SHAPES: dict[str, tuple[int, ...]] = {
    "square": (WIDTH, WIDTH),
    "vector": (WIDTH,),
    "scalar": (),
    "table": (LONGEST, WIDTH),
    "mixing": (LONGEST, LONGEST),
    "kernel": (WIDTH, WIDTH, 3),
    "token": (1, 1, WIDTH),
}
Step = Callable[["Program", Tensor, int], Tensor]
STEPS: dict[str, Step] = {}


class Program(nn.Module):
    """Runs its steps one after the other."""

    def __init__(self, steps: list[tuple[str, int]], modes: dict[str, bool]) -> None:
        super().__init__()
        self.steps, self.modes = steps, modes
        for number, (name, shape) in enumerate(SHAPES.items()):
            for place in range(PLACES):
                value = 0.5 * numbers(*shape, seed=100 * place + number + 1)
                setattr(self, f"{name}{place}", nn.Parameter(value))
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.group = nn.GroupNorm(2, WIDTH)
        self.words = nn.Embedding(LONGEST, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recurrence = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def get(self, name: str, place: int) -> Any:
        return getattr(self, f"{name}{place % PLACES}")

    def forward(self, x: Tensor) -> Tensor:
        for name, place in self.steps:
            x = self.run(name, x, place)
        return x

    def run(self, name: str, x: Tensor, place: int) -> Tensor:
        if self.modes["sequence first"]:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.modes["checkpointed"]:
            return checkpoint(STEPS[name], self, x, place, use_reentrant=False)
        return STEPS[name](self, x, place)


def step(function: Step) -> Step:
    STEPS[function.__name__.strip("_").replace("_", " ")] = function
    return function


@step
def _linear(m: Program, x: Tensor, place: int) -> Tensor:
    return m.layer(x)


@step
def _linear_over_time_first(m: Program, x: Tensor, place: int) -> Tensor:
    return F.linear(x.transpose(0, 1), m.get("square", place)).transpose(0, 1)


@step
def _linear_flattened(m: Program, x: Tensor, place: int) -> Tensor:
    return F.linear(x.flatten(0, 1), m.get("square", place), m.get("vector", place)).view_as(x)


@step
def _matmul_of_an_expression(m: Program, x: Tensor, place: int) -> Tensor:
    return x @ (m.get("square", place) + m.get("square", place + 1).t()).tanh()


@step
def _low_rank(m: Program, x: Tensor, place: int) -> Tensor:
    square = m.get("square", place)
    return x + x @ (square[:, :1] @ square[1:2])


@step
def _mix_positions(m: Program, x: Tensor, place: int) -> Tensor:
    length = x.shape[1]
    return x + m.get("mixing", place)[:length, :length].softmax(-1) @ x


@step
def _mix_by_einsum(m: Program, x: Tensor, place: int) -> Tensor:
    length = x.shape[1]
    return (
        torch.einsum(
            "btd,ts,de->bse", x, m.get("mixing", place)[:length, :length], m.get("square", place)
        )
        / 2
    )


@step
def _scale_and_shift(m: Program, x: Tensor, place: int) -> Tensor:
    return x * m.get("vector", place) + m.get("scalar", place)


@step
def _positions_by_slice(m: Program, x: Tensor, place: int) -> Tensor:
    return x + m.get("table", place)[: x.shape[1]]


@step
def _positions_by_lookup(m: Program, x: Tensor, place: int) -> Tensor:
    ids = torch.arange(x.shape[1])
    return x + m.words(ids[None] if place % 2 else ids)


@step
def _lookup_by_row(m: Program, x: Tensor, place: int) -> Tensor:
    ids = (x.detach().sum(-1).abs() * 3).long() % LONGEST
    return x.tanh() + m.words(ids) + m.get("table", place)[ids]


@step
def _tied_scores(m: Program, x: Tensor, place: int) -> Tensor:
    return F.linear(x, m.words.weight).softmax(-1) @ m.words.weight


@step
def _convolution(m: Program, x: Tensor, place: int) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.get("kernel", place), padding=1).transpose(1, 2).tanh()


@step
def _convolution_by_group(m: Program, x: Tensor, place: int) -> Tensor:
    kernel = m.get("kernel", place)[:, :2]
    return F.conv1d(
        x.transpose(1, 2), kernel, m.get("vector", place), padding=1, groups=2
    ).transpose(1, 2)


@step
def _normalise(m: Program, x: Tensor, place: int) -> Tensor:
    return m.norm(x)


@step
def _normalise_by_group(m: Program, x: Tensor, place: int) -> Tensor:
    return m.group(x.transpose(1, 2)).transpose(1, 2)


@step
def _normalise_a_table(m: Program, x: Tensor, place: int) -> Tensor:
    return x + m.norm(m.get("table", place))[: x.shape[1]]


@step
def _attend(m: Program, x: Tensor, place: int) -> Tensor:
    return x + m.attention(x, x, x, need_weights=bool(place % 2))[0]


@step
def _attend_from_a_token(m: Program, x: Tensor, place: int) -> Tensor:
    query = m.get("token", place).expand(len(x), -1, -1)
    return x + m.attention(query, x, x)[0]


@step
def _prepend_a_token_and_drop_it(m: Program, x: Tensor, place: int) -> Tensor:
    longer = torch.cat((m.get("token", place).repeat(len(x), 1, 1), x), 1)
    return m.layer(longer).cumsum(1)[:, 1:] / 3


@step
def _write_into_a_slice(m: Program, x: Tensor, place: int) -> Tensor:
    x = x.clone()
    x[:, :1] = m.get("vector", place)
    x[:, -1] += m.get("vector", place + 1)
    return x


@step
def _recur(m: Program, x: Tensor, place: int) -> Tensor:
    return m.recurrence(x)[0]


@step
def _gate(m: Program, x: Tensor, place: int) -> Tensor:
    return torch.where(x > m.get("vector", place), x, m.get("scalar", place) * x) + x.tanh()


@step
def _stack_of_parameters(m: Program, x: Tensor, place: int) -> Tensor:
    both = torch.stack((m.get("vector", 0), m.get("vector", 1), m.get("square", place)[0]))
    return x + (x @ both.t()).softmax(-1) @ both


@step
def _bilinear(m: Program, x: Tensor, place: int) -> Tensor:
    square = m.get("square", place)
    return x + torch.einsum("btd,de,bse->bts", x, square, x).softmax(-1) @ x


@step
def _turn(m: Program, x: Tensor, place: int) -> Tensor:
    return x.flip(1).roll(1, 2) * m.get("scalar", place).sigmoid()


def loss_of(m: Program, x: Tensor) -> Tensor:
    output = m(x)
    loss = (output.sin().mean((1, 2)) + output.square().mean((1, 2)).sqrt()).mean()
    if m.modes["penalised"]:
        loss = loss + 0.1 * sum(p.square().mean() for p in m.parameters())
    return loss


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[str, int]], dict[str, bool], int, int, bool]:
    rows = draw(st.integers(1, 5))
    length = draw(st.sampled_from([rows, 2 * rows, 1, 2, 3, 5]))
    names = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, PLACES - 1))
    steps = draw(st.lists(names, min_size=1, max_size=5))
    names_of_modes = ("sequence first", "checkpointed", "penalised")
    modes = {name: draw(st.booleans()) for name in names_of_modes}
    return steps, modes, rows, length, draw(st.booleans())


Case = tuple[list[tuple[str, int]], dict[str, bool], int, int, bool]
PLAIN = {"sequence first": False, "checkpointed": False, "penalised": False}


def check(case: Case) -> None:
    steps, modes, rows, length, grouped = case
    model = Program(steps, modes).double()
    batch = numbers(rows, length, WIDTH, seed=17).double()
    expected = loop_gradients(model, loss_of, batch)
    assert_close(per_example_gradients(model, loss_of, batch), expected, DOUBLE)
    units = [row // 2 for row in range(rows)] if grouped else None
    assert_sums(model, loss_of, batch, expected, units)


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize(("rows", "length"), [(3, 3), (2, 4)])
def test_each_step_alone(name: str, rows: int, length: int) -> None:
    check(([(name, 0)], PLAIN, rows, length, False))


QUIET = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(QUIET, max_examples=20)
@given(cases())
def test_random_compositions(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(QUIET, max_examples=1000, derandomize=False)
@given(cases())
def test_many_random_compositions(case: Case) -> None:
    check(case)
