from __future__ import annotations

import fractions
import math

import numpy as np
import pytest

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import (
    NeighbouringRelation,
    PrivacyUnit,
    one_of,
    real_number,
    whole_number,
)

REASONS = {"cost": "something", "remedy": "something else"}


@pytest.mark.parametrize(
    ("within", "legal", "illegal"),
    [
        ("(0, 1]", [1, 0.5, 1e-300], [0, -1, 1.0000001, 2]),
        ("[0, 1)", [0, 0.5], [1, -1e-300]),
        ("(0, inf)", [1e-300, 1e300], [0, -1]),
        ("[0, inf)", [0, 7], [-1e-9]),
    ],
)
def test_an_interval_is_what_it_says(within, legal, illegal):
    for value in legal:
        assert real_number("x", value, within, **REASONS) == value
    for value in illegal:
        with pytest.raises(ConfigurationError) as caught:
            real_number("x", value, within, **REASONS)
        assert caught.value.must == f"`x` must be a finite number in {within}"
        assert caught.value.found == f"`x` = {value!r}"


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)])
def test_every_real_number_becomes_a_float(value):
    number = real_number("x", value, "(0, 1]", **REASONS)
    assert type(number) is float
    assert number == 0.5


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "1", None, 1j, [1], math.nan, math.inf, -math.inf]
)
def test_nothing_else_is_a_number(value):
    with pytest.raises(ConfigurationError, match="must be a finite number"):
        real_number("x", value, "[-inf, inf]", **REASONS)
    with pytest.raises(ConfigurationError, match="must be a whole number"):
        whole_number("x", value, at_least=-100, **REASONS)


def test_whole_numbers_become_ints():
    assert type(whole_number("x", np.int64(3), at_least=3, **REASONS)) is int
    for bad in (2, 3.0, np.float64(3)):
        with pytest.raises(ConfigurationError, match="`x` must be a whole number >= 3"):
            whole_number("x", bad, at_least=3, **REASONS)


def test_choices_are_listed():
    one_of("x", "a", ("a", "b"), **REASONS)
    for bad in ("c", None, 1, ["a"]):
        with pytest.raises(ConfigurationError, match="`x` must be one of 'a', 'b'"):
            one_of("x", bad, ("a", "b"), **REASONS)


def test_the_names_are_plain_strings():
    assert [str(unit) for unit in PrivacyUnit] == ["example", "user"]
    assert [str(relation) for relation in NeighbouringRelation] == ["add_or_remove", "zero_out"]
