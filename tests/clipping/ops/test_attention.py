"""``nn.MultiheadAttention`` in all its forms, and attention with trainable parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.clipping.reference import Sketch, assert_exact, numbers, squares

B = 3
LENGTHS = [2, B]


def attention_of(layer: nn.MultiheadAttention, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Attend from ``batch["x"]`` to ``batch["memory"]``, both ``[B, T, E]``."""
    query = batch["x"]
    memory = batch.get("memory", query)
    if not layer.batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    output, weights = layer(query, memory, memory, **options)
    output = output if layer.batch_first else output.transpose(0, 1)
    return (
        output if weights is None else output + weights.flatten(1).square().mean(1)[:, None, None]
    )


def check(layer: nn.MultiheadAttention, batch: dict[str, Tensor], **options: Any) -> None:
    model = Sketch(lambda m, b: attention_of(m.layer, b, **options), layer=layer)
    assert_exact(model, squares, batch)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=str,
)
def test_self_attention(options: dict[str, Any], batch_first: bool, length: int) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    check(layer, {"x": numbers(B, length, 8)})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_cross_attention_with_other_widths(length: int, batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=batch_first, add_bias_kv=True)
    check(layer, {"x": numbers(B, length, 8), "memory": numbers(B, 4, 5, seed=2)})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias_kv", [True, False])
@pytest.mark.parametrize("mask", ["boolean", "float", "by head", "causal"])
def test_attention_masks(mask: str, bias_kv: bool, need_weights: bool) -> None:
    length = 4
    upper = torch.ones(length, length, dtype=torch.bool).triu(1)
    options: dict[str, Any] = {"need_weights": need_weights}
    if mask == "by head":
        # [B * heads, T, T]: the rows lie flattened, though no parameter meets them.
        def forward(m: Sketch, x: Tensor) -> Tensor:
            heads = upper.expand(2 * len(x), -1, -1)
            return attention_of(m.layer, {"x": x}, attn_mask=heads, **options)

        layer = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=bias_kv)
        assert_exact(Sketch(forward, layer=layer), squares, numbers(B, length, 8))
        return
    options["attn_mask"] = upper
    if mask == "causal":
        options["is_causal"] = True
    layer = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=bias_kv)

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if mask == "float":
            dtype = batch["x"].dtype
            options["attn_mask"] = torch.zeros(length, length, dtype=dtype).masked_fill(upper, -1e9)
        return squares(module, batch)

    model = Sketch(lambda m, b: attention_of(m.layer, b, **options), layer=layer)
    assert_exact(model, loss, {"x": numbers(B, length, 8)})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias_kv", [True, False])
def test_padding_of_each_row(bias_kv: bool, batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=bias_kv)
    padded = torch.arange(5)[None] >= torch.tensor([5, 2, 3])[:, None]
    model = Sketch(lambda m, b: attention_of(m.layer, b, key_padding_mask=b["padded"]), layer=layer)
    assert_exact(model, squares, {"x": numbers(B, 5, 8), "padded": padded})


@pytest.mark.parametrize("frozen", ["in_proj_weight", "out_proj.weight", "in_proj_bias"])
def test_partly_frozen(frozen: str) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    layer.get_parameter(frozen).requires_grad_(False)
    check(layer, {"x": numbers(B, 4, 8)})


@pytest.mark.parametrize("length", LENGTHS)
def test_learnt_queries(length: int) -> None:
    model = Sketch(
        lambda m, x: m.layer(m.norm(m.queries).expand(len(x), -1, -1), x, x)[0],
        layer=nn.MultiheadAttention(8, 2, batch_first=True),
        norm=nn.LayerNorm(8),
        queries=(length, 8),
    )
    assert_exact(model, squares, numbers(B, 4, 8))


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers(batch_first: bool) -> None:
    options = {"dropout": 0.0, "batch_first": batch_first}

    def forward(m: Sketch, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        x = m.decoder(x, m.encoder(x))
        return x if batch_first else x.transpose(0, 1)

    model = Sketch(
        forward,
        encoder=nn.TransformerEncoderLayer(8, 2, 12, **options),
        decoder=nn.TransformerDecoderLayer(8, 2, 12, norm_first=True, **options),
    )
    assert_exact(model, squares, numbers(B, B, 8))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_trainable_bias_on_the_scores(length: int) -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        bias = m.bias[:, :length, :length] + m.table(
            (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
        ).permute(2, 0, 1)
        output = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        return output.transpose(1, 2).flatten(2)

    model = Sketch(forward, bias=(2, 5, 5), table=nn.Embedding(5, 2))
    assert_exact(model, squares, numbers(B, length, 8))


def test_grouped_queries() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        query = m.query(x).unflatten(2, (4, 2)).transpose(1, 2)
        key, value = (part(x).unflatten(2, (2, 2)).transpose(1, 2) for part in (m.key, m.value))
        output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return output.transpose(1, 2).flatten(2)

    model = Sketch(
        forward, query=nn.Linear(8, 8), key=nn.Linear(8, 4), value=nn.Linear(8, 4, bias=False)
    )
    assert_exact(model, squares, numbers(B, 4, 8))
