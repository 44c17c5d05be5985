"""Small encoders that turn an image or a sound into tokens of a decoder's width.

Every layer acts on each example alone: group norm in the place of batch norm, average pooling, and
a learned token in the place of what an example does not have.

Legend: ``B`` examples, ``N`` tokens, ``W`` the decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_GROUPS = 4
_COST = "There would be no such encoder."


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSettings:
    """How images become tokens: convolutions, and a mean over each cell of a grid.

    Args:
        channels: Of an image, 1 for grey and 3 for colour.
        hidden_size: Channels of the last convolution; a multiple of 8.
        grid: The grid has so many cells on each side.
        layers: Convolutions, each of which halves height and width; at least 1.
        summary: 0 for a token for each cell; or so many tokens, each a linear function of all
            cells. These know where something is without the help of the decoder, which learns
            little from few private steps.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    channels: int = 1
    hidden_size: int = 32
    grid: int = 3
    layers: int = 2
    summary: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _require(self, 1, "channels", "layers")
        _require(self, 0, "summary")
        _require(self, 2 if self.summary else 1, "grid")
        _require_groups(self.hidden_size, 2 * _GROUPS)

    @property
    def length(self) -> int:
        """How many tokens an image becomes."""
        return self.summary or self.grid**2


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioSettings:
    """How a sound's frames become tokens: convolutions over time, and a mean over parts.

    Args:
        features: Numbers of a frame, mel bands or cepstral coefficients.
        hidden_size: Channels of the convolutions; a multiple of 4.
        tokens: Parts of equal length that the time is divided into.
        layers: Convolutions, each of which halves the time; 0 for means of the frames themselves,
            which serves cepstral coefficients.
        summary: 0 for a token for each part; or so many tokens, each a linear function of all.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    features: int = 32
    hidden_size: int = 32
    tokens: int = 8
    layers: int = 2
    summary: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _require(self, 1, "features")
        _require(self, 0, "layers", "summary")
        _require(self, 2 if self.summary else 1, "tokens")
        _require_groups(self.hidden_size, _GROUPS)

    @property
    def length(self) -> int:
        """How many tokens a sound becomes."""
        return self.summary or self.tokens


class ModalityEncoder(nn.Module):
    """Turns one modality into tokens, or into a learned token where an example lacks it.

    Args:
        features: From a batch ``[B, ..]`` to ``[B, hidden, ..]`` with so many places.
        hidden_size: Channels of what it returns.
        places: Of what it returns.
        summary: N, tokens that read all places; 0 for a token for each.
        width: W, the decoder's.
    """

    def __init__(
        self, features: nn.Module, hidden_size: int, places: int, summary: int, width: int
    ) -> None:
        super().__init__()
        self.features = features
        self.summary, self.width = summary, width
        # What all places share says nothing of this example.
        self.norm = nn.GroupNorm(hidden_size, hidden_size) if summary else nn.Identity()
        inputs, outputs = (
            (hidden_size * places, width * summary) if summary else (hidden_size, width)
        )
        self.projection = nn.Linear(inputs, outputs)
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
        places = self.norm(self.features(torch.where(present.view(shape), values, 0)))
        read = places.flatten(1) if self.summary else places.flatten(2).transpose(1, 2)
        tokens = self.projection(read).view(len(values), -1, self.width)
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
    outer = settings.hidden_size
    sizes = [settings.channels, *[outer // 2] * (settings.layers - 1), outer]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.GroupNorm(_GROUPS, outputs),
            nn.GELU(),
        ]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(settings.grid))
    return ModalityEncoder(features, outer, settings.grid**2, settings.summary, width)


def audio_encoder(settings: AudioSettings, width: int) -> ModalityEncoder:
    """Make a convolutional encoder of frames ``[B, features, time]``.

    Args:
        settings: Its sizes.
        width: The decoder's.

    Returns:
        The encoder, from random weights.
    """
    sizes = [settings.features, *[settings.hidden_size] * settings.layers]
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(sizes)):
        kernel = 3 if place else 5
        layers += [
            nn.Conv1d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
            nn.GroupNorm(_GROUPS, outputs),
            nn.GELU(),
        ]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(settings.tokens))
    return ModalityEncoder(features, sizes[-1], settings.tokens, settings.summary, width)


def refuse_other_widths(
    settings: Mapping[str, ImageSettings | AudioSettings], preprocessing: Any
) -> None:
    """Refuse data whose images or sounds have another number of channels than an encoder reads.

    Args:
        settings: Of the encoders, by modality.
        preprocessing: What the data module does, with an ``image`` and an ``audio``.

    Raises:
        ConfigurationError: If the numbers differ.
    """
    for name, own in settings.items():
        if isinstance(own, ImageSettings):
            key, model, data = "channels", own.channels, preprocessing.image.channels
            there = "`data.preprocessing.image.mode` (grey or rgb)"
        else:
            key, model, data = "features", own.features, preprocessing.audio.height
            there = "`data.preprocessing.audio` (bands or coefficients)"
        if model != data:
            raise ConfigurationError(
                must=f"The model's `{name}.{key}` is that of the data.",
                found=f"The model has {model}, the data {data}.",
                cost="The first batch would not pass the encoder.",
                remedy=f"Set `model.{name}.{key}` to {data}, or change {there}.",
            )


def _require(settings: object, at_least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        whole_number(name, value, at_least=at_least, cost=_COST, remedy="Give such a number.")


def _require_groups(hidden_size: int, multiple: int) -> None:
    whole_number(
        f"hidden_size / {multiple}",
        hidden_size // multiple if hidden_size % multiple == 0 else hidden_size / multiple,
        at_least=1,
        cost="Group norm could not divide the channels into groups.",
        remedy=f"Give `hidden_size` as a multiple of {multiple}.",
    )
