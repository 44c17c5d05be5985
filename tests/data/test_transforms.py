"""Preprocessing of images, sounds and texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_privacy.data import AudioTransform, ImageTransform, normalised_text
from lightning_privacy.errors import ConfigurationError

WAVE = np.sin(2 * np.pi * 440 * np.arange(4000) / 8000).astype(np.float32)


def test_a_text_is_written_in_one_form():
    assert normalised_text("  ﬁne\u00a0\n day ") == "fine day"


def test_an_image_is_scaled_by_public_constants_or_by_itself():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    scaled = ImageTransform(size=4, mean=0.25, std=0.5)
    torch.testing.assert_close(
        scaled.normalise(scaled.prepare(image)), (torch.arange(16).view(1, 4, 4) / 15 - 0.25) / 0.5
    )
    own = ImageTransform(size=4, normalisation="min_max")
    found = own.normalise(own.prepare(image // 2 + 40))
    assert (found.min(), found.max()) == (0, 1)


def test_colours_and_sizes_are_changed_to_what_the_encoder_reads():
    image = np.random.default_rng(0).random((20, 10, 3))
    assert ImageTransform(size=8).prepare(image).shape == (1, 8, 8)
    assert ImageTransform(size=8, mode="rgb").prepare(image[..., 0]).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["grey", "rgb"])
def test_an_image_is_varied_anew_each_time(mode):
    pytest.importorskip("kornia")
    transform = ImageTransform(
        size=12, mode=mode, rotation=20, shift=0.1, horizontal_flip=0.5, vertical_flip=0.5,
        colour=0.3,
    )  # fmt: skip
    image = transform.prepare(np.random.default_rng(0).random((12, 12, 3)))
    first, second = transform.augment(image), transform.augment(image)
    assert first.shape == image.shape
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(ImageTransform(size=12, mode=mode).augment(image), image)


def test_a_sound_has_the_rate_length_and_loudness_of_all():
    transform = AudioTransform(sample_rate=8000, seconds=0.25)
    for wave in (WAVE, np.stack([WAVE, WAVE], axis=1), (WAVE * 3000).astype(np.int16)):
        prepared = transform.prepare(wave, 8000)
        assert prepared.shape == (2000,)
        assert np.abs(prepared).max() == pytest.approx(1.0, abs=1e-3)
    short = transform.prepare(WAVE[:500], 8000)
    assert not short[500:].any()


@pytest.mark.parametrize(("features", "height"), [("spectrogram", 24), ("mfcc", 13)])
def test_frames_have_about_unit_size(features, height):
    pytest.importorskip("librosa")
    transform = AudioTransform(features=features, bands=24, coefficients=13, seconds=0.5)
    frames = transform.frames(transform.prepare(WAVE, 8000))
    assert frames.shape == (height, transform.width)
    assert frames.shape[0] == transform.height
    assert frames.abs().max() < 8
    silence = transform.frames(np.zeros(4000, dtype=np.float32))
    assert silence.isfinite().all()


def test_coefficients_are_scaled_by_public_constants():
    """Each by its own; whatever other sounds there are, a sound has the same frames."""
    pytest.importorskip("librosa")
    dct = pytest.importorskip("scipy.fft").dct
    rng = np.random.default_rng(0)
    for wave in (WAVE, rng.normal(size=4000).astype(np.float32), np.zeros(4000, np.float32)):
        settings = {"bands": 24, "coefficients": 13, "seconds": 0.5}
        decibels = 20 * AudioTransform(**settings).frames(wave).numpy()
        cepstrum = dct(decibels, axis=0, norm="ortho")[:13]
        spread = 60 / np.sqrt(np.arange(1, 14))[:, None]
        found = AudioTransform(features="mfcc", **settings).frames(wave)
        np.testing.assert_allclose(found, cepstrum / spread, atol=1e-5)


def test_a_sound_is_varied_anew_each_time():
    pytest.importorskip("audiomentations")
    transform = AudioTransform(seconds=0.5, noise=0.1, stretch=0.2, pitch=2.0)
    wave = transform.prepare(WAVE, 8000)
    first, second = transform.augment(wave), transform.augment(wave)
    assert first.shape == wave.shape
    assert not np.array_equal(first, second)
    assert AudioTransform(seconds=0.5).augment(wave) is wave


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"std": 0.0}, {"mode": "cmyk"}, {"horizontal_flip": 2.0}], ids=str
)
def test_images_that_could_not_be_meant_are_refused(settings):
    with pytest.raises(ConfigurationError):
        ImageTransform(**settings)


@pytest.mark.parametrize(
    "settings", [{"coefficients": 40}, {"features": "raw"}, {"stretch": 1.0}], ids=str
)
def test_sounds_that_could_not_be_meant_are_refused(settings):
    with pytest.raises(ConfigurationError):
        AudioTransform(**settings)
