"""Recurrent layers as dense layers in time: the same outputs, exact gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.clipping.capture import Capture
from lightning_privacy.errors import UnsupportedOperationError
from tests.clipping.reference import Sketch, assert_exact, numbers, plain_gradient, squares

B = 4
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def run(layer: nn.RNNBase, x: Tensor, state: Any = None) -> Tensor:
    """All outputs and last states of ``x [B, T, I]``, ``[B, *]``."""
    output, last = layer(x if layer.batch_first else x.transpose(0, 1), state)
    output = output if layer.batch_first else output.transpose(0, 1)
    last = last if isinstance(last, tuple) else (last,)
    return torch.cat((output.flatten(1), *(t.transpose(0, 1).flatten(1) for t in last)), 1)


def sketch(layer: nn.RNNBase) -> Sketch:
    return Sketch(lambda m, x: run(m.layer, x), layer=layer)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, options: dict[str, Any], batch_first: bool) -> None:
    assert_exact(
        sketch(KINDS[kind](3, 5, batch_first=batch_first, **options)), squares, numbers(B, 3, 3)
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_steps_as_rows(batch_first: bool) -> None:
    assert_exact(sketch(nn.GRU(3, 5, batch_first=batch_first)), squares, numbers(B, B, 3))


def test_rectified_activation() -> None:
    assert_exact(sketch(nn.RNN(3, 5, nonlinearity="relu")), squares, numbers(B, 3, 3))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_projected_state(bias: bool) -> None:
    layer = nn.LSTM(3, 5, 2, proj_size=2, bidirectional=True, bias=bias, batch_first=True)
    assert_exact(sketch(layer), squares, numbers(B, 3, 3))


def test_a_learnt_first_state() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        return run(m.layer, x, (m.hidden.expand(-1, len(x), -1), m.memory.repeat(1, len(x), 1)))

    model = Sketch(forward, layer=nn.LSTM(3, 5), hidden=(1, 1, 5), memory=(1, 1, 5))
    assert_exact(model, squares, numbers(B, 3, 3))


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l0"])
def test_partly_frozen(frozen: str) -> None:
    layer = nn.LSTM(3, 5)
    layer.get_parameter(frozen).requires_grad_(False)
    assert_exact(sketch(layer), squares, numbers(B, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_torch_s_own(kind: str) -> None:
    layer = KINDS[kind](3, 5, 2, bidirectional=True, dropout=0.0, batch_first=True).double()
    x = numbers(B, 6, 3).double()
    expected = run(layer, x)
    with Capture(dict(layer.named_parameters()), rows=B).opened():
        found = run(layer, x)
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_between_layers() -> None:
    torch.manual_seed(0)
    model = sketch(nn.LSTM(3, 50, 2, dropout=0.5)).double().train()
    x = numbers(B, 6, 3).double()

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        torch.manual_seed(3)
        return squares(module, batch)

    found = {name: g.mean(0) for name, g in per_example_gradients(model, loss, x).items()}
    expected = plain_gradient(model, loss, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    assert not torch.equal(run(model.layer, x), run(model.eval().layer, x))


def test_dropout_is_off_in_eval_mode() -> None:
    layer = nn.GRU(3, 5, 2, dropout=0.5).eval()
    assert_exact(sketch(layer), squares, numbers(B, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_refused(kind: str) -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), 3)
        _, last = m.layer(pack_padded_sequence(x, lengths, batch_first=True))
        return (last[0] if isinstance(last, tuple) else last)[0]

    model = Sketch(forward, layer=KINDS[kind](3, 5, batch_first=True))
    with pytest.raises(UnsupportedOperationError, match="packed sequence") as caught:
        per_example_gradients(model, squares, numbers(B, 4, 3))
    assert "layer.weight_ih_l0" in caught.value.found
    assert "padded" in caught.value.remedy
    assert "backward direction" in caught.value.remedy
