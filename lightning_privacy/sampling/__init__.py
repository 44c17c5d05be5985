"""Sampling: which units a private step draws, and how a draw is cut into micro-batches.

`PrivateLoader` is imported on first use, so that planning a run does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.sampling.base import MicroBatch, UnitRows, micro_batches, packed
from lightning_privacy.sampling.poisson import PoissonSampler
from lightning_privacy.sampling.rate import ResolvedSampling, resolve_sampling
from lightning_privacy.sampling.shards import ShardedSampler
from lightning_privacy.sampling.user_draws import BoundedSampler, UserSampler
from lightning_privacy.sampling.users import UserIndex, user_index
from lightning_privacy.sampling.views import ViewSampler

if TYPE_CHECKING:
    from lightning_privacy.sampling.loader import PrivateLoader

__all__ = [
    "BoundedSampler",
    "MicroBatch",
    "PoissonSampler",
    "PrivateLoader",
    "ResolvedSampling",
    "ShardedSampler",
    "UnitRows",
    "UserIndex",
    "UserSampler",
    "ViewSampler",
    "micro_batches",
    "packed",
    "resolve_sampling",
    "user_index",
]


def __getattr__(name: str) -> object:
    """Import the loader on first use.

    Args:
        name: The name that was asked for.

    Returns:
        The class.

    Raises:
        AttributeError: There is no such name.
    """
    if name == "PrivateLoader":
        from lightning_privacy.sampling.loader import PrivateLoader

        return PrivateLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
