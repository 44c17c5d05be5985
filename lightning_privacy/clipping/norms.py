"""Clipping rules: from the norms of a unit's gradient to the factors that bound it.

Legend: ``K`` groups of parameters, ``U`` units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Protocol

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


LEAST_CLIP_NORM = 1e-9
"""Shorter gradients cannot be told from none: a square in float32 is zero below 1e-45."""


class ClippingRule(Protocol):
    """How much each unit's gradient is scaled.

    A rule answers for its own sensitivity: noise is calibrated from `sensitivity`, never from a
    second copy of the clip norm.
    """

    @property
    def sensitivity(self) -> float:
        """Largest Euclidean norm of one unit's scaled gradient over all parameters."""
        ...

    @property
    def groups(self) -> int:
        """Number of groups ``K`` that are clipped on their own."""
        ...

    def group_of(self, name: str) -> int:
        """The group of a parameter."""
        ...

    def factors(self, squared_norms: Tensor) -> Tensor:
        """``[K, U]`` factors from ``[K, U]`` squared norms, all finite."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatClipping:
    """One norm over all parameters: ``min(1, C / |g|)``.

    | gradient of the unit | contribution |
    |---|---|
    | norm at most C | unchanged |
    | norm above C | scaled to norm C |
    | zero | zero |
    | any NaN or infinity | exactly zero (see `clipped_sum`) |

    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        _require_clip_norm(self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """``clip_norm``."""
        return self.clip_norm

    @property
    def groups(self) -> int:
        """One."""
        return 1

    def group_of(self, name: str) -> int:
        """All parameters share the group."""
        return 0

    def factors(self, squared_norms: Tensor) -> Tensor:
        """``min(1, C / |g|)``; 1 for a zero gradient."""
        return (self.clip_norm / squared_norms.sqrt()).clamp(max=1.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerClipping:
    """One norm per layer, each clipped to ``C / sqrt(K)``, so that the whole is bounded by C.

    A layer is the module that owns the parameters. Source: McMahan et al. 2018, arXiv 1710.06963,
    section 3.1 ("per-layer clipping").
    """

    clip_norm: float
    layer_of: Mapping[str, int]

    def __post_init__(self) -> None:
        _require_clip_norm(self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """``clip_norm``: the root of K squares of ``C / sqrt(K)``."""
        return self.clip_norm

    @property
    def groups(self) -> int:
        """Number of layers."""
        return max(self.layer_of.values(), default=0) + 1

    def group_of(self, name: str) -> int:
        """The parameter's layer."""
        return self.layer_of[name]

    def factors(self, squared_norms: Tensor) -> Tensor:
        """``min(1, C / (sqrt(K) |g_k|))`` for each layer's gradient ``g_k``."""
        bound = self.clip_norm / math.sqrt(self.groups)
        return (bound / squared_norms.sqrt()).clamp(max=1.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticClipping:
    """Normalise instead of clipping: ``C / (|g| + stability)``.

    Every unit contributes with norm below C, small gradients too, so the learning rate no longer
    depends on C. Source: Bu et al. 2023, arXiv 2206.07136 (AUTO-S, ``stability`` 0.01).
    """

    clip_norm: float
    stability: float = 0.01

    def __post_init__(self) -> None:
        _require_clip_norm(self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """``clip_norm``: ``|g| / (|g| + stability) < 1``."""
        return self.clip_norm

    @property
    def groups(self) -> int:
        """One."""
        return 1

    def group_of(self, name: str) -> int:
        """All parameters share the group."""
        return 0

    def factors(self, squared_norms: Tensor) -> Tensor:
        """``C / (|g| + stability)``."""
        return self.clip_norm / (squared_norms.sqrt() + self.stability)


def clipping_rule(kind: str, clip_norm: float, names: Iterable[str]) -> ClippingRule:
    """The rule named ``kind`` for the parameters ``names``.

    Raises:
        ConfigurationError: an unknown kind, or a clip norm that is not positive and finite.
    """
    if kind == "flat":
        return FlatClipping(clip_norm=clip_norm)
    if kind == "automatic":
        return AutomaticClipping(clip_norm=clip_norm)
    if kind == "per_layer":
        layers = {name: name.rpartition(".")[0] for name in names}
        order = {layer: number for number, layer in enumerate(dict.fromkeys(layers.values()))}
        return PerLayerClipping(
            clip_norm=clip_norm, layer_of={name: order[layer] for name, layer in layers.items()}
        )
    raise ConfigurationError(
        must='clipping is "flat", "per_layer" or "automatic"',
        found=f"clipping={kind!r}",
        cost="no bound on a unit's contribution is defined",
        remedy='choose one of them; "flat" is the default',
    )


def _require_clip_norm(clip_norm: float) -> None:
    number = isinstance(clip_norm, int | float) and math.isfinite(clip_norm)
    if not (number and clip_norm >= LEAST_CLIP_NORM):
        raise ConfigurationError(
            must=f"clip_norm is a positive, finite number, at least {LEAST_CLIP_NORM}",
            found=f"clip_norm={clip_norm!r}",
            cost="a unit's contribution would not be bounded: of shorter gradients the squares "
            "are zero",
            remedy="set clip_norm near the median norm of a unit's gradient, often 0.1 to 1",
        )


__all__ = [
    "LEAST_CLIP_NORM",
    "AutomaticClipping",
    "ClippingRule",
    "FlatClipping",
    "PerLayerClipping",
    "clipping_rule",
]
