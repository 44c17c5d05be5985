"""The embedded examples of three modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_privacy.data import GlyphCorpus, GlyphsAndTones
from lightning_privacy.data.glyphs import _COLUMNS, _KEYS, _ROWS, dialled, drawn
from lightning_privacy.errors import ConfigurationError

SMALL = GlyphCorpus(n_users=30, test_examples=10, p_missing=0.3)


def test_the_same_settings_make_the_same_examples():
    first, second = SMALL.split(), SMALL.split()
    for one, other in zip(first.train, second.train, strict=True):
        assert one.text == other.text
        assert one.label == other.label
        assert (one.image is None) == (other.image is None)
        if one.audio is not None:
            assert np.array_equal(one.audio.wave, other.audio.wave)
    assert len(first.train) + len(first.validation) == 120
    assert len(first.test) == 10


def test_the_text_does_not_tell_the_digit():
    """Everything that a text says is the user's, and the digits of the examples differ."""
    split = SMALL.split()
    by_user: dict[str, set[str]] = {}
    for example in (*split.train, *split.validation, *split.test):
        by_user.setdefault(example.user, set()).add(example.text)
    assert all(len(texts) == 1 for texts in by_user.values())


def test_a_key_has_its_two_tones():
    rng = np.random.default_rng(0)
    for digit, (row, column) in enumerate(_KEYS):
        wave = dialled(rng, digit, noise=0.0).wave
        spectrum = np.abs(np.fft.rfft(wave))
        loudest = np.sort(np.argsort(spectrum)[-2:] * 8000 / len(wave))
        assert loudest == pytest.approx([_ROWS[row], _COLUMNS[column]], abs=4)


def test_a_glyph_is_where_the_noise_is_not():
    image = drawn(np.random.default_rng(0), 8, noise=0.0)
    assert image.shape == (28, 28)
    assert set(np.unique(image)) == {0.0, 1.0}
    assert image.sum() == 9 * 17  # dots of 3 x 3 pixels


def test_a_batch_has_masks_for_what_is_missing():
    data = GlyphsAndTones(SMALL, batch_size=60)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape[1:] == (1, 28, 28)
    assert batch["audio"].shape[1:] == (32, 13)
    for name in ("image", "audio"):
        mask = batch[f"{name}_mask"]
        assert 0 < mask.sum() < len(mask)
        assert not batch[name][~mask].any()
    assert batch["labels"].dtype == torch.int64


def test_a_subset_of_the_modalities_is_all_that_is_read():
    batch = next(iter(GlyphsAndTones(SMALL, modalities=["image"]).val_dataloader()))
    assert "audio" not in batch
    assert batch["input_ids"].shape[1] == 1


@pytest.mark.parametrize("setting", [{"p_member": 1.0}, {"n_users": 1}, {"image_noise": -1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigurationError):
        GlyphCorpus(**setting)
