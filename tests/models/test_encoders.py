"""Encoders of images and sounds: how many tokens they make, and what each of them reads."""

from __future__ import annotations

import pytest
import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models import AudioSettings, ImageSettings
from lightning_privacy.models.encoders import ModalityEncoder, audio_encoder, image_encoder
from tests.clipping.reference import assert_exact

WIDTH, ROWS = 6, 4
IMAGES = [
    ImageSettings(hidden_size=8, grid=3, layers=layers, summary=summary)
    for layers, summary in [(1, 0), (1, 1), (2, 3), (3, 1)]
]
SOUNDS = [
    AudioSettings(features=5, hidden_size=8, tokens=3, layers=layers, summary=summary)
    for layers, summary in [(0, 0), (0, 1), (1, 2), (2, 0), (3, 1)]
]


def shape_of(settings: ImageSettings | AudioSettings) -> str:
    return f"{type(settings).__name__}-layers={settings.layers}-summary={settings.summary}"


def encoder_of(settings: ImageSettings | AudioSettings) -> ModalityEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(settings, ImageSettings):
            return image_encoder(settings, WIDTH)
        return audio_encoder(settings, WIDTH)


def values_of(settings: ImageSettings | AudioSettings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 24, 24) if isinstance(settings, ImageSettings) else (settings.features, 18)
    return torch.randn(ROWS, *shape, generator=generator)


def loss_of(encoder: ModalityEncoder, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return encoder(*batch).sin().mean()


@pytest.mark.parametrize("settings", [*IMAGES, *SOUNDS], ids=shape_of)
def test_each_example_has_its_own_tokens_and_gradients(settings):
    encoder, values = encoder_of(settings), values_of(settings)
    present = torch.arange(ROWS) != 1
    tokens = encoder(values, present)
    assert tokens.shape == (ROWS, settings.length, WIDTH)
    for row in range(ROWS):
        alone = encoder(values[row : row + 1], present[row : row + 1])
        torch.testing.assert_close(alone[0], tokens[row])
    assert_exact(encoder, loss_of, (values, present))


@pytest.mark.parametrize("settings", [IMAGES[1], SOUNDS[1]], ids=shape_of)
def test_a_summary_reads_every_place(settings):
    encoder, values = encoder_of(settings), values_of(settings)
    present = torch.ones(ROWS, dtype=torch.bool)
    before = encoder(values, present)
    for place in (slice(0, 4), slice(-4, None)):
        changed = values.clone()
        changed[..., place] = 0
        assert (encoder(changed, present) - before).abs().amax(dim=(1, 2)).min() > 1e-3


def test_what_a_sound_has_all_the_time_is_taken_out_of_a_summary_alone():
    """So a loud line, or another microphone, is the same sound."""
    shift = torch.arange(5.0)[:, None]
    present = torch.ones(ROWS, dtype=torch.bool)
    for settings, same in ((SOUNDS[1], True), (SOUNDS[0], False)):
        encoder, values = encoder_of(settings), values_of(settings)
        moved = (encoder(values + shift, present) - encoder(values, present)).abs().max()
        assert (moved < 1e-4) == same


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        (ImageSettings, {"layers": 0}, "layers"),
        (ImageSettings, {"summary": -1}, "summary"),
        (ImageSettings, {"hidden_size": 12}, "hidden_size"),
        (ImageSettings, {"summary": 1, "grid": 1}, "grid"),
        (AudioSettings, {"layers": -1}, "layers"),
        (AudioSettings, {"summary": -1}, "summary"),
        (AudioSettings, {"summary": 1, "tokens": 1}, "tokens"),
    ],
)
def test_sizes_without_an_encoder_are_refused(kind, settings, found):
    with pytest.raises(ConfigurationError, match=found):
        kind(**settings)
