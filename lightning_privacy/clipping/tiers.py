"""Another clip norm for each unit, at most the rule's own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_privacy.clipping.norms import ClippingRule


@dataclasses.dataclass(frozen=True, slots=True)
class TieredClipping:
    """A rule whose bound is ``shares[u] * C`` for unit ``u``.

    Scaling a gradient to norm ``r C`` is ``r`` times scaling ``g / r`` to norm C, so the factors
    are the rule's own at ``|g|^2 / r^2``.

    Attributes:
        rule: the rule for units with the whole clip norm.
        shares: ``[U]`` in (0, 1].
    """

    rule: ClippingRule
    shares: Tensor

    @property
    def sensitivity(self) -> float:
        """The rule's: no unit has more."""
        return self.rule.sensitivity

    @property
    def groups(self) -> int:
        """The rule's."""
        return self.rule.groups

    def group_of(self, name: str) -> int:
        """The rule's."""
        return self.rule.group_of(name)

    def factors(self, squared_norms: Tensor) -> Tensor:
        """``[K, U]`` from ``[K, U]``."""
        shares = self.shares.to(squared_norms.dtype)
        return self.rule.factors(squared_norms / shares.square())
