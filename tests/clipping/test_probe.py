"""Learning layouts by running the forward with two and with three rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.clipping.layout import Layouts, RowDim
from lightning_privacy.clipping.probe import learn_layouts
from tests.clipping.reference import Sketch, assert_untouched, numbers, squares


def learnt_from(model: nn.Module, *shape: int) -> tuple[Layouts, list[int]]:
    asked = []

    def forward(rows: int) -> object:
        asked.append(rows)
        return squares(model, numbers(1, *shape).expand(rows, *shape))

    return learn_layouts(dict(model.named_parameters()), forward), asked


def rows_in(layouts: Layouts, operation: str) -> list[RowDim | None]:
    """Where the first plain tensor of each use of ``operation`` holds its rows."""
    found = []
    for key, signatures in layouts._known.items():
        assert isinstance(key, tuple)
        if operation in key[1] and key[0] == "rule":
            found.extend(signature.inputs[0].rows for signature in signatures)
    return found


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.layer(x), RowDim(0, flattened=False)),
        (lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), RowDim(1, flattened=False)),
        (lambda m, x: m.layer(x.flatten(0, 1)).view_as(x), RowDim(0, flattened=True)),
        (lambda m, x: x + m.layer(torch.ones(5, 6)), None),
    ],
)
@pytest.mark.parametrize("length", [2, 3, 5])
def test_rows_of_a_dense_layer(
    forward: Callable[[Sketch, Tensor], Tensor], expected: RowDim | None, length: int
) -> None:
    layouts, _ = learnt_from(Sketch(forward, layer=nn.Linear(6, 6)), 5, 6)
    assert rows_in(layouts, "linear") == [expected]


def test_each_round_learns_one_further_step_until_nothing_is_new() -> None:
    model = Sketch(lambda m, x: F.linear(x, (m.w * 2).t().contiguous()), w=(6, 3))
    layouts, asked = learnt_from(model, 5, 6)
    operations = {key[1].rpartition(".")[2] for key in layouts._known}  # type: ignore[index]
    assert operations == {"mul", "t", "contiguous", "linear"}
    assert asked[:2] == [2, 3]
    assert len(asked) % 2 == 0
    # Four steps, the first of which is seen twice: as no case of its rule, and by the general one.
    assert len(asked) <= 2 * 6


def test_a_model_without_a_single_known_use() -> None:
    layouts, asked = learnt_from(Sketch(lambda m, x: x, w=(6, 3)), 5, 6)
    assert layouts._known == {}
    assert asked == [2, 3]


def test_gradients_are_neither_computed_nor_left() -> None:
    model = nn.Linear(6, 3)
    learnt_from(model, 5, 6)
    assert_untouched(model)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_restored_when_the_forward_fails(kind: type[BaseException]) -> None:
    model = nn.Linear(6, 3)

    def forward(rows: int) -> object:
        model(numbers(rows, 6))
        if rows == 3:
            raise kind
        return None

    with pytest.raises(kind):
        learn_layouts(dict(model.named_parameters()), forward)
    assert_untouched(model)
