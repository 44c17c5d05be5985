"""What the private step asks of a source of noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@runtime_checkable
class NoiseMechanism(Protocol):
    """Draws the noise of one release, parameter by parameter.

    Guarantees: values of different releases, parameters and coordinates are independent; nothing
    that the program seeds elsewhere influences them, and drawing them influences nothing else.

    Attributes:
        sum_dtype: The least precise type in which parts of a noised sum may be added up.
    """

    sum_dtype: torch.dtype

    def sample(self, name: str, like: Tensor, release: int, std: float) -> Tensor:
        """Returns fresh noise.

        Args:
            name: The parameter's name.
            like: A tensor whose shape and device the noise gets.
            release: The number of the release, >= 0.
            std: Standard deviation in every coordinate, >= 0.

        Returns:
            A float32 tensor (float64 for a float64 ``like``), contiguous.
        """
        ...

    def add_(self, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        """Adds fresh noise to a tensor in place.

        Args:
            tensor: Where to add; float32 or float64.
            name: The parameter's name.
            release: The number of the release, >= 0.
            std: Standard deviation in every coordinate, >= 0.

        Returns:
            ``tensor``.
        """
        ...
