"""Recurrent layers: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu``.

The fused operations hide how often a weight is used. Here the same recurrence runs as dense
layers, one step of time after the other, so that the rule for dense layers sees every use.
Equations, the order of gates and the draws of dropout are those of `torch.nn.LSTM`, `torch.nn.GRU`
and `torch.nn.RNN`.

Legend: ``B`` rows, ``T`` steps of time, ``I`` inputs, ``H`` state, ``P`` the state a layer gives on
(``H``, or LSTM's ``proj_size``), ``L`` layers, ``D`` directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_privacy.clipping.registry import operation
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from lightning_privacy.clipping.capture import Capture

State = tuple[Tensor, ...]
# From the projected input [B, gates * H], the weights' own step and the state: the next state.
Cell = Callable[[Tensor, "_Weights", State], State]


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of the padded signature, in torch's order."""

    x: Tensor
    hx: Any
    weights: list[Any]
    has_biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Weights:
    """One layer in one direction. ``projection`` is LSTM's ``weight_hr``."""

    capture: Capture
    inner: Any
    outer: Any
    inner_bias: Any = None
    outer_bias: Any = None
    projection: Any = None

    def of_input(self, x: Tensor) -> Tensor:
        """``[B, T, gates * H]`` from ``[B, T, I]``: all steps at once."""
        return self._dense(x, self.inner, self.inner_bias)

    def of_state(self, state: Tensor) -> Tensor:
        """``[B, gates * H]`` from ``[B, P]``."""
        return self._dense(state, self.outer, self.outer_bias)

    def projected(self, state: Tensor) -> Tensor:
        """``[B, P]`` from ``[B, H]``."""
        return state if self.projection is None else self._dense(state, self.projection, None)

    def _dense(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        result: Tensor = self.capture.apply(F.linear, (x, weight, bias), {})
        if _is_expression(self.capture, result):
            raise _without_rows(self.capture, (weight, bias))
        return result


@operation(torch.lstm)
def lstm(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Output, last states and last cells."""
    return _recurrent(capture, args, kwargs, _lstm_cell)


@operation(torch.gru)
def gru(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Output and last states."""
    return _recurrent(capture, args, kwargs, _gru_cell)


@operation(torch.rnn_tanh)
def rnn_tanh(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Output and last states."""
    return _recurrent(capture, args, kwargs, _elman_cell(torch.tanh))


@operation(torch.rnn_relu)
def rnn_relu(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Output and last states."""
    return _recurrent(capture, args, kwargs, _elman_cell(torch.relu))


@operation(torch.lstm_cell)
def lstm_cell(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One step; the other cells are left to `generic`, which can map them."""
    if kwargs or len(args) != 6 or any(_is_expression(capture, t) for t in (args[0], *args[1])):
        return NotImplemented
    weights = _Weights(capture, *args[2:])
    return _lstm_cell(weights.of_input(args[0]), weights, tuple(args[1]))


def _recurrent(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any], cell: Cell) -> Any:
    if kwargs or len(args) != len(dataclasses.fields(_Call)):
        return NotImplemented
    if not isinstance(args[3], bool):
        raise _packed(capture, args)
    call = _Call(*args)
    states: State = tuple(call.hx) if isinstance(call.hx, tuple | list) else (call.hx,)
    if any(_is_expression(capture, tensor) for tensor in (call.x, *states)):
        return NotImplemented
    x = call.x.transpose(0, 1) if call.batch_first else call.x
    last: list[State] = []
    for layer in range(call.layers):
        outputs = []
        for direction in range(call.directions):
            number = layer * call.directions + direction
            weights = _weights(capture, call, number)
            start = tuple(state[number] for state in states)
            output, end = _one_direction(x, weights, start, cell, backwards=direction == 1)
            outputs.append(output)
            last.append(end)
        x = torch.cat(outputs, 2) if call.bidirectional else outputs[0]
        if call.dropout and layer < call.layers - 1:
            x = F.dropout(x, call.dropout, call.train)
    output = x.transpose(0, 1) if call.batch_first else x
    return output, *(torch.stack(part) for part in zip(*last, strict=True))


def _one_direction(
    x: Tensor, weights: _Weights, state: State, cell: Cell, *, backwards: bool
) -> tuple[Tensor, State]:
    """``[T, B, P]`` from ``[T, B, I]``, and the state after the last step."""
    steps = list(weights.of_input(x.transpose(0, 1)).unbind(1))
    outputs = []
    for step in reversed(steps) if backwards else steps:
        state = cell(step, weights, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _lstm_cell(step: Tensor, weights: _Weights, state: State) -> State:
    hidden, memory = state
    let_in, forget, new, let_out = (step + weights.of_state(hidden)).chunk(4, 1)
    memory = forget.sigmoid() * memory + let_in.sigmoid() * new.tanh()
    return weights.projected(let_out.sigmoid() * memory.tanh()), memory


def _gru_cell(step: Tensor, weights: _Weights, state: State) -> State:
    (hidden,) = state
    of_input, of_state = step.chunk(3, 1), weights.of_state(hidden).chunk(3, 1)
    reset, keep = (torch.sigmoid(a + b) for a, b in zip(of_input[:2], of_state[:2], strict=True))
    new = torch.tanh(of_input[2] + reset * of_state[2])
    return (new + keep * (hidden - new),)


def _elman_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(step: Tensor, weights: _Weights, state: State) -> State:
        return (activation(step + weights.of_state(state[0])),)

    return cell


def _weights(capture: Capture, call: _Call, number: int) -> _Weights:
    """Torch keeps one flat list: two weights, two biases and a projection for each direction."""
    each = len(call.weights) // (call.layers * call.directions)
    own = call.weights[number * each : (number + 1) * each]
    biases = own[2:4] if call.has_biases else [None, None]
    projection = own[-1] if each % 2 else None
    return _Weights(capture, own[0], own[1], biases[0], biases[1], projection)


def _is_expression(capture: Capture, tensor: object) -> bool:
    return capture.slot(tensor) is not None or hasattr(tensor, "rows")


def _names(capture: Capture, weights: Iterable[Any]) -> str:
    slots = (capture.slot(weight) for weight in weights)
    return ", ".join(slot.name for slot in slots if slot is not None)


def _without_rows(capture: Capture, weights: Iterable[Any]) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        must="each step of a recurrence holds one state for each row of the batch",
        found=f"the rows lie along the time of the layer that holds {_names(capture, weights)}",
        cost="each example would be a step in the same sequence, so that its gradient depends on "
        "the others",
        remedy="construct the layer with batch_first=True, or pass the time as first dimension",
    )


def _packed(capture: Capture, args: tuple[Any, ...]) -> UnsupportedOperationError:
    names = _names(capture, next(a for a in args if isinstance(a, list)))
    return UnsupportedOperationError(
        must="each operation on a trainable parameter keeps its rows in one known dimension",
        found=f"a packed sequence (pack_padded_sequence, pack_sequence) enters {names}",
        cost="packing lays the steps of all examples end to end by length, so the gradient of one "
        "example could not be told from another's",
        remedy="pass the padded tensor itself, and leave the padded steps out of each example's "
        "own loss; a backward direction would begin with the padding, so pad to a fixed length, or "
        "use a second layer on rows that were reversed within their own length",
    )
