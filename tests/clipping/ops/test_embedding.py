"""Lookup tables: tokens, positions that all rows share, tied output layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import Sketch, assert_exact, squares, tokens

B = 4
LENGTHS = [1, 2, 3, B, 2 * B]


@pytest.mark.parametrize("padding", [None, 0, -1, 3])
@pytest.mark.parametrize("shape", [(), (5,), (B, 3)], ids=str)
def test_tokens(shape: tuple[int, ...], padding: int | None) -> None:
    table = nn.Embedding(11, 6, padding_idx=padding)
    ids = tokens(B, *shape)
    ids[0] = 0 if padding is None else padding % 11
    assert_exact(nn.Sequential(table, nn.Linear(6, 3)), squares, ids)


def test_a_row_of_one_repeated_token() -> None:
    ids = tokens(B, 40)
    ids[1] = 3
    assert_exact(nn.Embedding(11, 6), squares, ids)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", ["T", "1T", "BT", "TT"])
def test_position_ids(shape: str, length: int) -> None:
    def forward(m: Sketch, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        positions = {
            "T": steps,
            "1T": steps[None],
            "BT": steps.expand(len(ids), -1),
            "TT": (steps[:, None] - steps[None]).abs(),
        }[shape]
        where = m.positions(positions)
        return m.words(ids) + (where.sum(0) if shape == "TT" else where)

    model = Sketch(forward, words=nn.Embedding(11, 6), positions=nn.Embedding(9, 6))
    assert_exact(model, squares, tokens(B, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_positions_are_a_slice_of_a_table(length: int) -> None:
    model = Sketch(
        lambda m, ids: m.words(ids) + m.table[:length] + m.more.weight[1 : length + 1],
        words=nn.Embedding(11, 6),
        table=(9, 6),
        more=nn.Embedding(10, 6),
    )
    assert_exact(model, squares, tokens(B, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_tied_output_layer(length: int) -> None:
    model = Sketch(
        lambda m, ids: F.linear(m.norm(m.words(ids)), m.words.weight).log_softmax(-1),
        words=nn.Embedding(11, 6, padding_idx=2),
        norm=nn.LayerNorm(6),
    )
    assert_exact(model, squares, tokens(B, length))


def test_tied_output_layer_in_gram_form() -> None:
    # A vocabulary so large that neither use is instantiated: their inner product counts.
    model = Sketch(
        lambda m, ids: F.linear(m.words(ids), m.words.weight).logsumexp(-1),
        words=nn.Embedding(150, 40),
    )
    assert_exact(model, squares, tokens(B, 3, below=150))


def test_sequence_first() -> None:
    model = Sketch(lambda m, ids: m.words(ids.t()).transpose(0, 1), words=nn.Embedding(11, 6))
    assert_exact(model, squares, tokens(B, 3))


def test_a_negative_padding_index_of_the_function() -> None:
    ids = tokens(B, 5)
    ids[0, 2] = 9
    model = Sketch(lambda m, ids: F.embedding(ids, m.table, padding_idx=-2), table=(11, 6))
    assert_exact(model, squares, ids)


def test_sparse_gradients_are_captured_dense() -> None:
    assert_exact(nn.Embedding(11, 6, sparse=True), squares, tokens(B, 3))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str) -> None:
    assert_exact(nn.EmbeddingBag(11, 6, mode=mode), squares, tokens(B, 5))


def test_a_low_rank_update_of_a_table() -> None:
    model = Sketch(
        lambda m, ids: (
            F.embedding(ids, m.table + m.left @ m.right) + F.embedding(ids, m.left) @ m.right
        ),
        table=(11, 6),
        left=(11, 2),
        right=(2, 6),
    )
    assert_exact(model, squares, tokens(B, 5))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_options_that_couple_examples_are_refused(option: dict[str, object]) -> None:
    model = nn.Sequential(nn.Embedding(11, 6, **option))
    with pytest.raises(UnsupportedOperationError, match=next(iter(option))) as caught:
        per_example_gradients(model, squares, tokens(B, 3))
    assert "0.weight" in caught.value.found
