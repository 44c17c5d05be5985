"""The public surface changes on purpose only."""

from __future__ import annotations

import inspect

import pytest

import lightning_privacy

SURFACE = {
    "AttentionNoise",
    "BudgetExceededError",
    "ConfigurationError",
    "DifferentialPrivacy",
    "GuaranteeError",
    "NeighbouringRelation",
    "PrivacyError",
    "PrivacyLedger",
    "PrivacyPlan",
    "PrivacyUnit",
    "PrivateSingleDeviceStrategy",
    "UnsupportedOperationError",
    "__version__",
}


def test_the_surface_is_what_this_list_says() -> None:
    assert set(lightning_privacy.__all__) == SURFACE
    assert dir(lightning_privacy) == sorted(SURFACE)


@pytest.mark.parametrize("name", sorted(SURFACE - {"__version__"}))
def test_every_name_is_a_documented_class(name: str) -> None:
    value = getattr(lightning_privacy, name)
    assert inspect.isclass(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'DifferentialPiracy'"):
        _ = lightning_privacy.DifferentialPiracy
