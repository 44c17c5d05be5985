"""Raw and clipped gradients give inputs away; noised ones do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.audit.attacks import (
    invert_gradient,
    peak_signal_to_noise,
    recover_tokens,
    structural_similarity,
    token_recovery,
)
from lightning_privacy.clipping import clipped_gradient_sum
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.noise import GaussianNoise, fresh_secret


def updates(module: nn.Module, loss: object, batch: object) -> dict[str, dict[str, Tensor]]:
    """A single example's raw, clipped (C = 1) and noised (σ = 1) gradient."""
    raw, _ = clipped_gradient_sum(module, loss, batch, clip_norm=1e9)  # type: ignore[arg-type]
    clipped, _ = clipped_gradient_sum(module, loss, batch, clip_norm=1.0)  # type: ignore[arg-type]
    noise = GaussianNoise(fresh_secret())
    noised = {n: noise.add_(g.clone(), n, 0, 1.0) for n, g in clipped.items()}
    return {"raw": raw, "clipped": clipped, "noised": noised}


def text_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(500, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 500)
        )


def test_tokens_are_read_off_until_there_is_noise() -> None:
    module = text_model()
    tokens = torch.randint(500, (1, 12), generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])

    different = len(set(tokens[0, :-1].tolist()))
    share = {
        kind: token_recovery(recover_tokens(update["0.weight"], different), tokens[:, :-1])
        for kind, update in updates(module, loss, tokens).items()
    }
    assert share["raw"] == share["clipped"] == 1
    # Two in a hundred tokens are hit by chance: six of these eleven once in ten million runs.
    assert share["noised"] < 0.5


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 64, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def picture_loss(model: nn.Module, picture: Tensor) -> Tensor:
    return F.cross_entropy(model(picture), torch.tensor([2]))


def test_a_picture_is_rebuilt_until_there_is_noise() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Picture()
    grid = torch.linspace(0, 1, 8)
    picture = (0.5 + 0.5 * torch.sin(7 * grid)[:, None] * torch.cos(5 * grid))[None, None]
    start = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    quality = {}
    for kind, update in updates(module, picture_loss, picture).items():
        found = invert_gradient(module, picture_loss, update, start, steps=150)
        quality[kind] = (
            peak_signal_to_noise(found, picture),
            structural_similarity(found, picture),
        )
    for kind in ("raw", "clipped"):
        assert quality[kind][0] > 25, quality
        assert quality[kind][1] > 0.9, quality
    assert quality["noised"][0] < 15, quality
    assert quality["noised"][1] < 0.5, quality


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 256, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def dialled() -> Tensor:
    """The spectrogram of four tones, one after the other: 16 frequencies by 16 frames."""
    seconds = torch.arange(512) / 2000
    tones = torch.tensor([200.0, 700.0, 450.0, 820.0]).repeat_interleave(128)
    wave = torch.sin(2 * torch.pi * tones * seconds)
    window = torch.hann_window(30)
    spectrum = torch.stft(wave, 30, hop_length=32, window=window, return_complex=True).abs()
    levels = spectrum[:, :16].clamp(min=1e-2).log10()
    return ((levels - levels.min()) / (levels.max() - levels.min()))[None, None]


def test_a_sound_is_rebuilt_until_there_is_noise() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Sound()
    sound = dialled()
    assert sound.shape == (1, 1, 16, 16)
    start = torch.rand(sound.shape, generator=torch.Generator().manual_seed(2))
    right, quality = {}, {}
    for kind, update in updates(module, picture_loss, sound).items():
        found = invert_gradient(module, picture_loss, update, start, steps=200)
        quality[kind] = peak_signal_to_noise(found, sound)
        # Which frequency is loudest in each frame: what was dialled.
        right[kind] = float((found.argmax(2) == sound.argmax(2)).float().mean())
    for kind in ("raw", "clipped"):
        assert quality[kind] > 20, quality
        assert right[kind] > 0.8, right
    assert quality["noised"] < 15, quality
    assert right["noised"] < 0.5, right


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="vocabulary"):
        recover_tokens(torch.ones(3, 2), 4)
    with pytest.raises(ConfigurationError, match="names"):
        invert_gradient(Picture(), picture_loss, {"x": torch.ones(1)}, torch.ones(1, 1, 8, 8))
