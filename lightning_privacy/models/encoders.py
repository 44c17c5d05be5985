"""Small encoders that turn an image or a sound into tokens of a decoder's width.

Every layer acts on each example alone: group norm in the place of batch norm, average pooling, and
a learned token in the place of what an example does not have.

Legend: ``B`` examples, ``N`` tokens, ``W`` the decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS = 4
_COST = "There would be no such encoder."


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSettings:
    """How images become tokens: two convolutions, and a mean over each cell of a grid.

    Args:
        channels: Of an image, 1 for grey and 3 for colour.
        hidden_size: Channels of the last convolution; a multiple of 8.
        grid: The grid has so many cells on each side: ``grid`` squared tokens.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    channels: int = 1
    hidden_size: int = 32
    grid: int = 3

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _require_positive(self, "channels", "grid")
        _require_groups(self.hidden_size, 2 * _GROUPS)

    @property
    def tokens(self) -> int:
        """How many tokens an image becomes."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioSettings:
    """How a sound's frames become tokens: two convolutions over time, and a mean over parts.

    Args:
        features: Numbers of a frame, mel bands or cepstral coefficients.
        hidden_size: Channels of the convolutions; a multiple of 4.
        tokens: Parts of equal length that the time is divided into.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    features: int = 32
    hidden_size: int = 32
    tokens: int = 8

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _require_positive(self, "features", "tokens")
        _require_groups(self.hidden_size, _GROUPS)


class ModalityEncoder(nn.Module):
    """Turns one modality into tokens, or into a learned token where an example lacks it.

    Args:
        features: From a batch ``[B, ..]`` to ``[B, hidden, ..]`` with N places.
        hidden_size: Channels of what it returns.
        width: W, the decoder's.
    """

    def __init__(self, features: nn.Module, hidden_size: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.projection = nn.Linear(hidden_size, width)
        self.absent = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor, present: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            values: ``[B, ..]``, anything where an example lacks the modality.
            present: ``[B]`` booleans.

        Returns:
            Tokens ``[B, N, W]``.
        """
        shape = (-1, *[1] * (values.dim() - 1))
        # By selection: what fills the place of nothing may hold anything.
        places = self.features(torch.where(present.view(shape), values, 0))
        tokens = self.projection(places.flatten(2).transpose(1, 2))
        here = present.view(-1, 1, 1).to(tokens.dtype)
        return tokens * here + self.absent * (1 - here)


def image_encoder(settings: ImageSettings, width: int) -> ModalityEncoder:
    """Make a convolutional encoder of images ``[B, channels, height, width]``.

    Args:
        settings: Its sizes.
        width: The decoder's.

    Returns:
        The encoder, from random weights.
    """
    inner, outer = settings.hidden_size // 2, settings.hidden_size
    features = nn.Sequential(
        nn.Conv2d(settings.channels, inner, 3, stride=2, padding=1),
        nn.GroupNorm(_GROUPS, inner),
        nn.GELU(),
        nn.Conv2d(inner, outer, 3, stride=2, padding=1),
        nn.GroupNorm(_GROUPS, outer),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(settings.grid),
    )
    return ModalityEncoder(features, outer, width)


def audio_encoder(settings: AudioSettings, width: int) -> ModalityEncoder:
    """Make a convolutional encoder of frames ``[B, features, time]``.

    Args:
        settings: Its sizes.
        width: The decoder's.

    Returns:
        The encoder, from random weights.
    """
    hidden = settings.hidden_size
    features = nn.Sequential(
        nn.Conv1d(settings.features, hidden, 5, stride=2, padding=2),
        nn.GroupNorm(_GROUPS, hidden),
        nn.GELU(),
        nn.Conv1d(hidden, hidden, 3, stride=2, padding=1),
        nn.GroupNorm(_GROUPS, hidden),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(settings.tokens),
    )
    return ModalityEncoder(features, hidden, width)


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        whole_number(
            name, getattr(settings, name), at_least=1, cost=_COST, remedy="Give such a number."
        )


def _require_groups(hidden_size: int, multiple: int) -> None:
    whole_number(
        f"hidden_size / {multiple}",
        hidden_size // multiple if hidden_size % multiple == 0 else hidden_size / multiple,
        at_least=1,
        cost="Group norm could not divide the channels into groups.",
        remedy=f"Give `hidden_size` as a multiple of {multiple}.",
    )
