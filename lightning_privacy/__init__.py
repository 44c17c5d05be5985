"""Differentially private training for PyTorch Lightning, by adding one callback.

The names below are the public surface. They are imported on first use, so that
``import lightning_privacy`` itself costs nothing: neither torch nor Lightning is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_privacy.accounting import PrivacyLedger
    from lightning_privacy.callbacks import AttentionNoise, DifferentialPrivacy
    from lightning_privacy.errors import (
        BudgetExceededError,
        ConfigurationError,
        GuaranteeError,
        PrivacyError,
        UnsupportedOperationError,
    )
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.strategies import (
        PrivateDDPStrategy,
        PrivateFSDPStrategy,
        PrivateSingleDeviceStrategy,
    )
    from lightning_privacy.types import NeighbouringRelation, PrivacyUnit

__version__ = "0.1.0"

__all__ = [
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
    "PrivateDDPStrategy",
    "PrivateFSDPStrategy",
    "PrivateSingleDeviceStrategy",
    "UnsupportedOperationError",
    "__version__",
]

_HOME = {
    "AttentionNoise": "callbacks",
    "BudgetExceededError": "errors",
    "ConfigurationError": "errors",
    "DifferentialPrivacy": "callbacks",
    "GuaranteeError": "errors",
    "NeighbouringRelation": "types",
    "PrivacyError": "errors",
    "PrivacyLedger": "accounting",
    "PrivacyPlan": "plan",
    "PrivacyUnit": "types",
    "PrivateDDPStrategy": "strategies",
    "PrivateFSDPStrategy": "strategies",
    "PrivateSingleDeviceStrategy": "strategies",
    "UnsupportedOperationError": "errors",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home module on first use.

    Args:
        name: One of ``__all__``.

    Returns:
        The class of that name.

    Raises:
        AttributeError: If the package has no public name like that.
    """
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, whether they were imported already or not."""
    return sorted(__all__)
