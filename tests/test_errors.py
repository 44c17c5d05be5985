from __future__ import annotations

import copy
import pickle

import pytest

from lightning_privacy import errors
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    PrivacyError,
    UnsupportedOperationError,
)

PARTS = {"must": "a must", "found": "b found", "cost": "c cost", "remedy": "d remedy"}
KINDS = [
    PrivacyError,
    ConfigurationError,
    UnsupportedOperationError,
    GuaranteeError,
    BudgetExceededError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_the_four_things(kind):
    error = kind(**PARTS)
    assert str(error) == (
        "Must hold: a must\nFound: b found\nIt would cost: c cost\nRemedy: d remedy"
    )
    assert {name: getattr(error, name) for name in PARTS} == PARTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind, protocol):
    error = kind(**PARTS)
    error.add_note("seen in worker 3")
    loaded = pickle.loads(pickle.dumps(error, protocol))
    assert type(loaded) is kind
    assert str(loaded) == str(error)
    assert loaded.__notes__ == ["seen in worker 3"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_copying(kind):
    error = kind(**PARTS)
    for other in (copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert str(other) == str(error)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigurationError, ValueError),
        (UnsupportedOperationError, ValueError),
        (GuaranteeError, RuntimeError),
        (BudgetExceededError, RuntimeError),
    ],
)
def test_an_error_is_also_the_builtin_that_callers_expect(kind, builtin):
    assert issubclass(kind, PrivacyError)
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("missing", PARTS)
def test_no_part_can_be_left_out(missing):
    with pytest.raises(TypeError, match=missing):
        ConfigurationError(**{name: text for name, text in PARTS.items() if name != missing})


def test_the_parts_have_names_only():
    with pytest.raises(TypeError):
        ConfigurationError(*PARTS.values())


def test_every_error_of_the_package_is_tested_here():
    found = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert found == set(KINDS)
