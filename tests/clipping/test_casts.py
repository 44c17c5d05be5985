"""A cast is of the tensor that asks, as it is now."""

from __future__ import annotations

import torch
from torch import nn

from lightning_privacy.clipping.casts import Casts

LOW = torch.bfloat16


def test_a_tensor_that_has_the_id_of_another_has_its_own_cast() -> None:
    casts = Casts([])
    for value in range(16):  # each is gone when the next one is made
        assert float(casts.parameter(torch.full((4,), float(value)), LOW)[0]) == value
        assert float(casts.activation(torch.full((4,), float(value)), LOW)[0]) == value


def test_a_tensor_that_was_written_to_is_cast_again() -> None:
    casts, weight = Casts([]), torch.ones(4)
    for cast in (casts.parameter, casts.activation):
        before = cast(weight, LOW)
        assert cast(weight, LOW) is before
        weight.mul_(2)
        assert torch.equal(cast(weight, LOW).float(), weight)


def test_what_was_computed_in_inference_mode_is_cast() -> None:
    """It has no version: a frozen encoder's features under autocast."""
    casts = Casts([])
    with torch.inference_mode():
        features = torch.ones(2, 3)
    assert casts.activation(features, LOW).dtype == casts.parameter(features, LOW).dtype == LOW


def test_a_parameter_is_cast_once() -> None:
    small, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    casts = Casts([small])
    for parameter in (small, frozen):
        assert casts.parameter(parameter, LOW) is casts.parameter(parameter, LOW)
